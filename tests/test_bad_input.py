"""Wrong input of every kind costs seconds: exit code 2, one message with what was got and the fix, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_recipes import DatasetSpec, Recipe, cli, environment
from qlora_recipes.base import upstream
from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.commands.recipe_cli import main
from qlora_recipes.models import LLAMA_2_7B_CHAT, ModelSpec
from qlora_recipes.run.folder import RunFolder

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe_for: Callable[..., type[Recipe]],
) -> Refused:
    """Return a function that runs a command in an empty folder, and returns its one message after checking the rest."""

    def run(*words: str, recipe: type[Recipe] | None = None, call: Callable[[], object] | None = None) -> str:
        here = tmp_path_factory.mktemp("here")
        monkeypatch.chdir(here)
        with pytest.raises(SystemExit) as ended:
            call() if call else main(recipe or recipe_for(), list(words))
        error = capsys.readouterr().err
        assert ended.value.code == 2, error
        message = error[error.index("error: ") :]
        assert "Traceback" not in error
        assert error.count("error: ") == 1
        assert not list(here.iterdir())
        return message

    return run


def lines(*rows: object) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def turns(*roles_and_words: str) -> dict[str, Any]:
    pairs = zip(roles_and_words[::2], roles_and_words[1::2], strict=True)
    return {"messages": [{"role": role, "content": words} for role, words in pairs]}


QA = {"question": "Why?", "answer": "Because."}

DATA: dict[str, tuple[str, bytes, Sequence[str]]] = {
    "empty file": ("a.jsonl", b"", ["a.jsonl has no rows"]),
    "blank lines": ("a.jsonl", b"\n \n\n", ["a.jsonl has no rows"]),
    "empty JSON": ("a.json", b"", ["a.json, line 1, column 1: broken JSON"]),
    "empty list": ("a.json", b"[]", ["a.json has no rows"]),
    "broken JSON at line 3": ("a.jsonl", lines(QA, QA) + b'\n{"question" 1}', ["a.jsonl, line 3, column 13: broken"]),
    "broken JSON in a list": ("a.json", b'[{"a": 1},\n{"a" 2}]', ["a.json, line 2, column 6: broken JSON"]),
    "cut in the middle": ("a.json", b'[{"question": "Wh', ["a.json, line 1", "Unterminated string"]),
    "Latin-1": ("a.jsonl", '{"question": "é"}'.encode("latin-1"), ["is not UTF-8: byte 14 is 0xe9; save it as"]),
    "UTF-16": ("a.jsonl", json.dumps(QA).encode("utf-16"), ["is not UTF-8: byte 0 is 0xff"]),
    "a number": ("a.json", b"3", ["holds int; expected a list of rows"]),
    "a word": ("a.json", b'"rows"', ["holds str; expected a list of rows"]),
    "one object without rows": ("a.json", b'{"a": 1}', ["one object with the keys a; expected a list of rows"]),
    "two lists of rows": ("a.json", b'{"a": [], "b": []}', ["lists under a, b"]),
    "nested without end": ("a.jsonl", lines(QA) + b"\n" + b"[" * 200_000, ["a.jsonl, line 2", "nested too deep"]),
    "nested without end, JSON": ("a.json", b"[" * 200_000, ["nested too deep"]),
    "number without end": ("a.jsonl", b'{"question": ' + b"9" * 5000 + b"}", ["line 1", "a number is too long"]),
    "broken CSV": ("a.csv", b'question,answer\n"x,1\n', ["a.csv, line 2: broken CSV"]),
    "CSV of a header": ("a.csv", b"question,answer\n", ["a.csv has no rows"]),
    "no Parquet": ("a.parquet", b"PAR1", ["a.parquet is not a Parquet file"]),
    "another kind of file": ("a.txt", b"hello", ["a.txt is not a data file; expected one that ends in .json"]),
    "rows that are words": ("a.jsonl", lines("a", "b"), ["2 not an object", "the first (line 1)"]),
    "rows that are lists": ("a.jsonl", lines(["a"], [1]), ["2 not an object"]),
    "unknown columns": ("a.jsonl", lines({"prompt": "x"}), ["line 1", "no formatter fits", "question, answer"]),
    "column missing": ("a.jsonl", lines({"question": "x"}), ["line 1", "no formatter fits"]),
    "empty rows": ("a.jsonl", lines({}, {}), ["no formatter fits"]),
    "a number for an answer": ("a.jsonl", lines({**QA, "answer": 3}), ["1 not text", "answer is 3, expected text"]),
    "all answers empty": ("a.jsonl", lines({**QA, "answer": " "}), ["1 empty answer", "has no words"]),
    "empty question": ("a.jsonl", lines({**QA, "question": ""}), ["1 empty question"]),
    "only a system turn": ("a.jsonl", lines(turns("system", "x")), ["1 no assistant turn"]),
    "two users in a row": (
        "a.jsonl",
        lines(turns("user", "x", "user", "y", "assistant", "z")),
        ["message 1 is user, expected assistant"],
    ),
    "assistant first": ("a.jsonl", lines(turns("assistant", "x")), ["message 0 is assistant, expected user"]),
    "unknown role": (
        "a.jsonl",
        lines(turns("user", "x", "robot", "y")),
        ["role 'robot'", "system, developer, user, assistant"],
    ),
    "ends with a question": (
        "a.jsonl",
        lines(turns("user", "x", "assistant", "y", "user", "z")),
        ["ends without an answer"],
    ),
    "content of parts": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ["1 not text", "expected text"],
    ),
    "messages of text": ("a.jsonl", lines({"messages": "hi"}), ["1 not messages", "expected a list of messages"]),
    "message without a role": ("a.jsonl", lines({"messages": [{"content": "x"}]}), ["an object with role and content"]),
    "no messages": ("a.jsonl", lines({"messages": []}), ["1 no assistant turn"]),
    "unknown speaker": (
        "a.jsonl",
        lines({"conversations": [{"from": "narrator", "value": "x"}]}),
        ["role 'narrator'"],
    ),
    "NUL": ("a.jsonl", lines({**QA, "answer": "a\0b"}), ["unencodable text", r"the character '\x00' at 1"]),
    "half of a character": ("a.jsonl", rb'{"question": "x", "answer": "\ud800"}', [r"the character '\ud800' at 0"]),
    "control strings": ("a.jsonl", lines({**QA, "question": "x [/INST] y"}), ["1 control string"]),
    "a gigantic row": ("a.jsonl", lines({**QA, "question": "far " * 400_000}), ["1 no answer within max_length"]),
    "a gigantic field": ("a.csv", b"question,answer\n" + b"far " * 100_000 + b",x\n", ["no answer within max_length"]),
    "mixed shapes": (
        "a.jsonl",
        lines(QA, *[turns("user", "x", "assistant", "y")] * 9),
        ["rows_dropped: 9 of 10: 9 missing column"],
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data(refused: Refused, tmp_path: Path, case: str) -> None:
    name, content, parts = DATA[case]
    (tmp_path / name).write_bytes(content)
    message = refused("--demo", "--dataset", str(tmp_path / name))
    for part in parts:
        assert part in message
    assert name in message or "this run cannot be trusted" in message
    assert len(message) < 3_000


def test_a_byte_order_mark_is_no_fault_of_the_rows(tmp_path: Path) -> None:
    from qlora_recipes.data.reading import read_rows

    for name in ("a.jsonl", "a.csv"):
        text = json.dumps(QA) if name == "a.jsonl" else "question,answer\nWhy?,Because.\n"
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [row for _, row in read_rows(str(tmp_path / name))] == [QA]


def test_a_dataset_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "folder.jsonl").mkdir()
    assert "Did you mean 'rows.jsonl'" in refused("--demo", "--dataset", str(tmp_path / "row.jsonl"))
    assert "folder.jsonl is a folder" in refused("--demo", "--dataset", str(tmp_path / "folder.jsonl"))
    assert "/dev/zero is a device" in refused("--demo", "--dataset", "/dev/zero")
    assert "no dataset 'nobody/nothing'" in refused("--demo", "--dataset", "nobody/nothing")


@pytest.mark.parametrize(
    ("format_row", "part"),
    [
        (lambda row: row["ask"], "failed with KeyError: 'ask'. The row has text"),
        (lambda row: None, "not messages: "),
        (lambda row: [{"role": "user"}], "an object with role and content"),
        (lambda row: 1 / 0, "failed with ZeroDivisionError"),
    ],
)
def test_a_formatter_that_fails_is_named_with_its_row(
    refused: Refused, recipe_for: Callable[..., type[Recipe]], format_row: Callable[..., Any], part: str
) -> None:
    message = refused("--demo", recipe=recipe_for(format_row=staticmethod(format_row)))
    assert part in message
    assert "line 1" in message


RECIPE = """
from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import LLAMA_2_7B_CHAT
class Mine(Recipe):
    {}
"""
WHOLE = "model = LLAMA_2_7B_CHAT\n    dataset = DatasetSpec('rows.jsonl')\n    "

RECIPES: dict[str, tuple[str, Sequence[str]]] = {
    "no model": ("dataset = DatasetSpec('rows.jsonl')", ["Mine cannot work", "model: missing, expected a hub id"]),
    "no dataset": ("model = LLAMA_2_7B_CHAT", ["dataset: missing, expected a file or a hub id"]),
    "neither": ("pass", ["model: missing", "dataset: missing"]),
    "a number for a model": (WHOLE + "model = 7", ["model: got 7, expected a hub id or a folder"]),
    "no name for a model": (WHOLE + "model = ' '", ["model: got ' ', expected a hub id or a folder"]),
    "unknown LoRA field": (WHOLE + "lora = dict(rank=8)", ["LoraConfig has no field 'rank'"]),
    "unknown training field": (WHOLE + "training = dict(learning_rat=1)", ["Did you mean 'learning_rate'?"]),
    "unknown attribute": (WHOLE + "trainig = dict()", ["no such attribute. Did you mean 'training'?"]),
    "rank 0": (WHOLE + "lora = dict(r=0)", ["r: got 0, expected a rank of at least 1"]),
    "rank in words": (WHOLE + "lora = dict(r='big')", ["r: got 'big', expected int"]),
    "dropout of 1": (WHOLE + "lora = dict(lora_dropout=1.0)", ["got 1.0, expected a probability below 1"]),
    "negative rate": (WHOLE + "training = dict(learning_rate=-1e-4)", ["got -0.0001, expected a positive number"]),
    "no steps": (WHOLE + "training = dict(max_steps=0)", ["max_steps: got 0, expected at least 1"]),
    "batch of none": (WHOLE + "training = dict(per_device_train_batch_size=0)", ["got 0, expected at least 1"]),
    "no patience": (WHOLE + "training = dict(early_stopping_patience=0)", ["got 0, expected at least 1 evaluation"]),
    "a list for settings": (WHOLE + "training = [1]", ["training: got [1], expected a dict of SFTConfig fields"]),
    "all held out": (WHOLE + "dataset = DatasetSpec('x.json', held_out=1.5)", ["got 1.5, expected a share"]),
    "formatter in words": (WHOLE + "format_row = 'alpaca'", ["format_row: got 'alpaca', expected a function"]),
    "tasks in one word": (WHOLE + "eval_tasks = 'mmlu'", ["eval_tasks: got 'mmlu', expected a list"]),
    "a derived field": (WHOLE + "training = dict(fp16=True)", ["fp16 is not set by hand", "--dtype float16"]),
    "checkpoints without optimizer": (WHOLE + "training = dict(save_only_model=True)", ["--resume"]),
    "a name that is not there": (WHOLE + "lora = dict(r=RANK)", ["line 7", "NameError", "RANK"]),
    "broken Python": ("model = = 3", ["line 5", "SyntaxError"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(refused: Refused, tmp_path: Path, case: str) -> None:
    body, parts = RECIPES[case]
    file = tmp_path / "mine.py"
    file.write_text(RECIPE.format(body))
    message = refused(call=lambda: cli.main(["plan", str(file)]))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("missing.py", None, "no recipe at"),
        ("none.py", "x = 1\n", "declares none as recipes; expected exactly one"),
        ("two.py", RECIPE.format(WHOLE) + "class Other(Mine): pass\nclass Third(Mine): pass\n", "Other, Third"),
        ("away.py", "import a_package_that_is_not_there\n", "line 1: the recipe's file fails with ModuleNotFoundError"),
    ],
)
def test_recipe_file(refused: Refused, tmp_path: Path, name: str, text: str | None, part: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert part in refused(call=lambda: cli.main(["plan", str(tmp_path / name)]))


WORDS: dict[str, tuple[Sequence[str], str]] = {
    "unknown flag": (["--learning_rat", "1"], "unknown flag --learning_rat. Did you mean 'learning_rate'?"),
    "dashes for underscores": (["--learning-rate", "1"], "Did you mean 'learning_rate'?"),
    "doubled": (["--r", "8", "--r", "8"], "--r is given twice"),
    "unknown precision": (["--precision", "nf5"], "unknown precision 'nf5', expected one of nf4"),
    "unknown dtype": (["--dtype", "float32"], "expected bfloat16 or float16"),
    "contradiction of dtypes": (["--precision", "bf16", "--dtype", "float16"], "leave --dtype out"),
    "resume and overwrite": (["--resume", "--overwrite"], "give one of them"),
    "a word": (["train"], "unexpected word 'train'"),
    "no value": (["--learning_rate"], "--learning_rate: got no value, expected float"),
    "a word for a number": (["--max_steps", "many"], "max_steps: got 'many', expected int"),
    "a fraction for a number": (["--r", "1.5"], "--r: got '1.5', expected int"),
    "not a number": (["--learning_rate", "nan"], "expected a positive number"),
    "a word for a switch": (["--demo", "perhaps"], "expected true or false"),
    "a derived flag": (["--bf16", "true"], "it follows from --dtype"),
    "no config": (["--config", "missing.yaml"], "--config missing.yaml cannot be read"),
    "unknown check": (["--demo", "--skip_checks", "gradent"], "Did you mean 'gradient'?"),
    "unknown schedule": (["--demo", "--lr_scheduler_type", "cosin"], "cosin is not a valid"),
    "unknown optimizer": (["--demo", "--optim", "adam"], "adam is not a valid"),
    "unknown strategy": (["--demo", "--eval_strategy", "sometimes"], "sometimes is not a valid"),
    "too short rows": (["--demo", "--max_length", "2"], "expected at least 8 tokens"),
    "remote code that can change": (["--model", "a/b", "--trust_remote_code", "true"], "pin the commit"),
    "half unknown targets": (["--demo", "--target_modules", "q_proj", "v_prj"], "Did you mean 'v_proj'?"),
    "best without evaluating": (["--demo", "--load_best_model_at_end", "true"], "--eval_strategy steps"),
    "patience without evaluating": (["--demo", "--early_stopping_patience", "2"], "--eval_strategy steps"),
}


@pytest.mark.parametrize("case", WORDS)
def test_command_line(refused: Refused, case: str) -> None:
    words, part = WORDS[case]
    assert part in refused(*words)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("learning_rat: 1\n", "flags.yaml, line 1: unknown flag 'learning_rat'. Did you mean 'learning_rate'?"),
        ("- a\n", "flags.yaml holds a list, expected `flag: value` lines"),
        ("a: [\n", "flags.yaml is not YAML"),
        ("max_steps: x\n", "flags.yaml, line 1: max_steps: got 'x', expected int"),
        ("fp16: true\n", "--dtype float16"),
        ("!!python/object/apply:os.system ['touch it-ran']\n", "flags.yaml, line 1: got the tag "),
        ("r: \xff", "flags.yaml is not UTF-8"),
    ],
)
def test_config_file(refused: Refused, tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "flags.yaml").write_bytes(text.encode("latin-1"))
    assert part in refused("--config", str(tmp_path / "flags.yaml"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["evalute"], "unknown command 'evalute'. Did you mean 'evaluate'?"),
        (["evaluate", "nowhere"], "nowhere holds no finished run"),
        (["evaluate", "nowhere", "--limit", "0.5"], "expected a whole number"),
        (["merge", "nowhere"], "nowhere"),
        (["chat", "nowhere"], "nowhere"),
        (["inspect", "falcon_faq", "--html", "."], "--html: got '.', expected a file in a folder that exists"),
        (["inspect", "falcon_faq", "--html", "faq.json"], "--html: got 'faq.json'"),
        (["throughput", "--plot", "rows.jsonl"], "--plot: got 'rows.jsonl'"),
        (["throughput", "--json", "rows.jsonl"], "--json: got 'rows.jsonl'"),
        (["throughput", "--tokenizer", "nowhere"], "--tokenizer nowhere: expected a folder with tokenizer.json"),
        (["plan", "llama2_guanaco", "--gpu", "0"], "--gpu: got '0', expected the memory of a GPU in GiB"),
        (["plan", "llama2_guanaco", "--gpu", "inf"], "--gpu: got 'inf'"),
    ],
)
def test_verbs(refused: Refused, words: list[str], part: str) -> None:
    assert part in refused(call=lambda: cli.main(words))


# ---- Models ----


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of a tiny model, to be broken."""
    shutil.copytree(tiny("llama2"), tmp_path / "model")
    return tmp_path / "model"


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(2)}, folder / "pytorch_model.bin")


def other_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))


def fewer_embeddings(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    small.resize_token_embeddings(300)
    small.save_pretrained(folder)


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "without weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
    "in pickle only": (pickle_weights, "weights in pickle (.bin, .pt) are never opened"),
    "cut short": (cut_weights, "cannot load"),
    "without a configuration": (lambda folder: (folder / "config.json").unlink(), "cannot load"),
    "with a broken configuration": (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    "of an unknown type": (other_type, "cannot load"),
    "without a tokenizer": (lambda folder: [f.unlink() for f in folder.glob("tokenizer*")], "cannot load"),
    "with more layers than its configuration says": (fewer_layers, "9 weights of the checkpoint have no place"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(refused: Refused, model: Path, case: str) -> None:
    damage, part = MODELS[case]
    damage(model)
    message = refused("--model", str(model))
    assert part in message


def test_a_model_with_fewer_embeddings_than_tokens(
    refused: Refused, model: Path, recipe_for: Callable[..., type[Recipe]]
) -> None:
    fewer_embeddings(model)
    said = refused(recipe=recipe_for(model=spoken_for(model)))
    assert "the tokenizer has 1,536 tokens, the embedding 300. This tokenizer belongs to another model" in said


def spoken_for(folder: Path) -> ModelSpec:
    """Return a spec of the model in a folder that says all that a tokenizer needs."""
    return replace(LLAMA_2_7B_CHAT, hub_id=str(folder), revision=None, sizes=None)


def test_a_model_that_is_nowhere(refused: Refused, tmp_path: Path) -> None:
    assert "cannot load nobody/nothing" in refused("--model", "nobody/nothing")
    assert "cannot load" in refused("--model", str(tmp_path))


def test_layers_that_are_no_linear_are_quantized_all_the_same(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    recipe_for: Callable[..., type[Recipe]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPT-2's layers are Transformers' own Conv1D; it was refused here before such layers were counted."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(tiny("llama2"), tmp_path / "gpt2")
    config = GPT2Config(vocab_size=1536, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(model=spoken_for(tmp_path / "gpt2"), lora=dict(target_modules=["c_attn"]))
    main(recipe, ["--output_dir", "run"])
    quantized = RunFolder(tmp_path / "run").receipt().base.quantized
    assert quantized.found == quantized.expected == 4 and quantized.share == 1.0


def test_an_adapter_of_another_base(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qlora_recipes.base.adapters import load_adapter
    from qlora_recipes.errors import ModelError

    falcon, llama = (AutoModelForCausalLM.from_pretrained(tiny(family)) for family in ("falcon", "llama2"))
    get_peft_model(falcon, LoraConfig(target_modules=["dense"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(llama, tmp_path)
    with pytest.raises(ModelError, match="no adapter at"):
        load_adapter(llama, tmp_path / "nowhere")


# ---- The environment ----


def test_versions(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda name: ["transformers>=99"])
    monkeypatch.setattr(upstream, "fingerprint", lambda name: "another")
    message = refused("--demo")
    assert "expected >=99" in message and "_save of transformers.trainer.Trainer" in message
    assert "pip install 'transformers>=99'" in message


def test_float16_without_cuda(refused: Refused) -> None:
    assert "needs CUDA" in refused("--demo", "--precision", "fp16")


def test_too_little_memory(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_recipes.preflight import machine

    free = machine.psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: free)
    message = refused("--demo")
    assert "memory_free" in message
    assert "--max_length" in message


def test_no_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused("--demo", "--save_strategy", "epoch")
    assert "disk_space" in message
    assert "0.0 GiB free" in message


def test_a_gated_model(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.errors as hub

    from qlora_recipes.base import tokenizer

    def gated(*args: Any, **kwargs: Any) -> None:
        gate = hub.GatedRepoError.__new__(hub.GatedRepoError)  # its own constructor wants the hub's answer
        raise OSError("You are trying to access a gated repo.") from gate

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", gated)
    assert "it is gated. Accept its terms on the hub, then run: hf auth login" in refused("--model", "a/b")


@pytest.mark.parametrize("kind", ["file", "taken", "run"])
def test_an_output_folder_that_is_taken(refused: Refused, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out"
    if kind == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        (folder / ("thesis.txt" if kind == "taken" else "started.json")).write_text("mine")
    message = refused("--demo", "--output_dir", str(folder))
    assert "an unfinished run" in message if kind == "run" else "other files" in message
    assert "--output_dir" in message
    assert ("--overwrite" in message) == (kind == "run")


# ---- Templates ----


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it ran for"),
        ("{% for a in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{{ 'x' * 10**10 }}", "MemoryError"),
        ("{{ '%10000000000d' % 1 }}", "Error"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ missing.name }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("a\nb\n{% if %}", "in line 3"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
    ],
)
def test_template(
    refused: Refused,
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    part: str,
) -> None:
    from qlora_recipes.data import encoding

    monkeypatch.setattr(encoding, "_RENDER_SECONDS", 0.3)
    (tmp_path / "mine.jinja").write_text(source)
    spec = replace(recipe_for().model, chat_template=ChatTemplate.from_file(tmp_path / "mine.jinja"))
    rows = recipe_for().dataset
    message = refused("--demo", recipe=recipe_for(model=spec, dataset=DatasetSpec(rows.source, demo=rows.demo)))
    assert "mine.jinja cannot render the conversation" in message
    assert part in message


def test_there_are_at_least_sixty_cases() -> None:
    assert len(DATA) + len(RECIPES) + len(WORDS) + len(MODELS) >= 60


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], recipe_for: Callable[..., type[Recipe]]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(recipe_for(), ["--precision", "nf5", "--debug"])
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "error: unknown precision 'nf5'" in error
