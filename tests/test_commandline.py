"""The command lines: every command reads its flags in one way, and has one clear error for what is none."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_structure import HEAVY

import qlora_recipes
from qlora_recipes import Recipe, cli, load_recipe
from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.flags import argv_of
from qlora_recipes.commands.recipe_cli import main, parse, settings_from, without_secrets
from qlora_recipes.errors import UsageError
from qlora_recipes.masking import masked
from qlora_recipes.settings import Settings

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
RECIPE = str(RECIPES / "falcon_faq.py")


def program(name: str) -> Callable[[Sequence[str]], None]:
    """Return the `main` of a program in eval/, called as the program calls it."""
    spec = importlib.util.spec_from_file_location(f"eval_{name}", ROOT / "eval" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return lambda argv: run_command(module.main, argv)


def verb(name: str) -> Callable[[Sequence[str]], None]:
    return lambda argv: cli.main([name, *argv])


# Command: how to call it; the words it needs; a misspelt flag and the nearest; a flag, a value that is none, and what
# was expected.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], list[str], str, str, str, str, str]] = {
    "recipe": (lambda argv: main(load_recipe(RECIPE), argv), [], "precison", "precision", "r", "big", "int"),
    "list": (verb("list"), ["recipes"], "debugg", "", "", "", ""),
    "train": (verb("train"), ["falcon_faq"], "learning_rat", "learning_rate", "max_steps", "1.5", "int"),
    "new": (verb("new"), ["mine"], "datset", "dataset", "dataset", "gone.csv", "a file that exists"),
    "demo": (verb("demo"), [], "margn", "margin", "margin", "100", "points above 0"),
    "benchmark": (verb("benchmark"), ["falcon_faq"], "precision_s", "precisions", "seeds", "1.5", "int"),
    "throughput": (verb("throughput"), [], "hiden_size", "hidden_size", "dtype", "float32", "one of bfloat16"),
    "plan": (verb("plan"), [RECIPE], "gpuu", "gpu", "gpu", "nan", "the memory of a GPU"),
    "plan, the recipe's": (verb("plan"), [RECIPE], "learning_rat", "learning_rate", "max_steps", "1.5", "int"),
    "inspect": (
        verb("inspect"),
        [RECIPE],
        "htm",
        "html",
        "html",
        "nowhere/page.html",
        "a file in a folder that exists",
    ),
    "inspect, the recipe's": (verb("inspect"), [RECIPE], "max_lenght", "max_length", "packing", "yes", "true or false"),
    "evaluate": (verb("evaluate"), ["run"], "limits", "limit", "limit", "0", "a whole number from 1 up"),
    "compare": (verb("compare"), ["a", "b"], "margn", "margin", "margin", "100", "points above 0, such as 1.0"),
    "merge": (verb("merge"), ["run"], "outptu", "output", "trust_remote_code", "", "true or false"),
    "chat": (verb("chat"), ["run"], "other_templat", "other_template", "max_new_tokens", "-1", "a whole number from 1"),
    "eval/compare.py": (program("compare"), ["a", "b"], "task", "tasks", "margin", "none", "points above 0"),
    "eval/benchmark.py": (program("benchmark"), [RECIPE], "precision_s", "precisions", "seeds", "1.5", "int"),
    "benchmark, the recipe's": (
        program("benchmark"),
        [RECIPE],
        "wamup_steps",
        "warmup_steps",
        "bias",
        "al",
        "one of none",
    ),
    "eval/throughput.py": (
        program("throughput"),
        [],
        "hiden_size",
        "hidden_size",
        "dtype",
        "float32",
        "one of bfloat16",
    ),
    "eval/families.py": (program("families"), [], "famlies", "families", "steps", "1", "a whole number from 2 up"),
    "eval/data_rate.py": (program("data_rate"), [], "rowz", "rows", "count", "0", "a whole number"),
}


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[], None]], str]:
    """Return a function that calls a command in an empty folder and returns its one message."""

    def run(command: Callable[[], None]) -> str:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            command()
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return said.err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_alike(refused: Callable[[Callable[[], None]], str], command: str) -> None:
    call, words, misspelt, near, flag, bad, expected = COMMANDS[command]
    message = refused(lambda: call([*words, f"--{misspelt}", "3"]))
    assert f"unknown flag --{misspelt}." in message
    assert f"Did you mean '{near}'?" in message if near else "--help lists the flags" in message
    assert f"unknown flag --{misspelt}." in refused(lambda: call([f"--{misspelt}=3", *words]))
    assert "unknown flag --zzz. --help lists the flags" in refused(lambda: call([*words, "--zzz"]))
    if flag:
        message = refused(lambda: call([*words, f"--{flag}={bad}"]))
        assert f"--{flag}: got {bad!r}, expected {expected}" in message
        if flag not in ("packing", "trust_remote_code"):  # which need no value
            assert f"--{flag}: got no value, expected " in refused(lambda: call([*words, f"--{flag}"]))
        again = {
            "html": "a.html",
            "margin": "1",
            "limit": "2",
            "dtype": "float16",
            "bias": "all",
            "dataset": __file__,
        }.get(flag, "16")
        again = "true" if flag in ("packing", "trust_remote_code") else again
        assert f"--{flag} is given twice" in refused(lambda: call([*words, f"--{flag}={again}", f"--{flag}", again]))


@pytest.mark.parametrize(
    ("command", "words", "part"),
    [
        ("plan", [], "RECIPE is missing: a recipe's file"),
        ("inspect", ["--r", "8"], "RECIPE is missing"),
        ("eval/benchmark.py", [], "RECIPE is missing"),
        ("eval/benchmark.py", [RECIPE], "--precisions: got none, expected two or more"),
        ("evaluate", ["--limit", "2"], "RUN is missing: run folders"),
        ("compare", [], "RUN is missing"),
        ("merge", [], "RUN is missing: run folder, such as runs/"),
        ("merge", ["a", "b"], "unexpected word 'b'"),
        ("evaluate", ["a", ""], "unexpected word ''"),
        ("list", [""], "unexpected word ''"),
        ("list", ["a", "b"], "unexpected word 'b'"),
        ("eval/throughput.py", ["fast"], "unexpected word 'fast'"),
        ("recipe", ["--r", "8", "9"], "unexpected word '9'"),
        ("recipe", ["--"], "unexpected word '--'"),
        ("plan", [RECIPE, "--init_lora_weights", "x"], "--init_lora_weights: got 'x', expected one of gaussian"),
        ("plan", [RECIPE, "--bf16"], "--bf16 is not set by hand; it follows from --dtype bfloat16"),
        ("plan", [RECIPE, "--gpu", "24", "--config", "["], "--config [ cannot be read"),
        ("recipe", ["--plan", "["], "--plan: got '[', expected true or false"),
        (
            "eval/benchmark.py",
            [RECIPE, "--precisions", "nf4", "bf16", "--seeds", "-1"],
            "expected whole numbers from 0",
        ),
    ],
)
def test_words_that_miss_or_are_too_many(
    refused: Callable[[Callable[[], None]], str], command: str, words: list[str], part: str
) -> None:
    assert part in refused(lambda: COMMANDS[command][0](words))


def test_flags_and_words_stand_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    verb("plan")(["--demo", "--packing", "false", "--debug", RECIPE, "--gpu", "2", "--init_lora_weights", "gaussian"])
    assert "falcon_faq-demo" in capsys.readouterr().out
    assert parse(load_recipe(RECIPE), ["--debug", "underflow_overflow"])["debug"] == "underflow_overflow"
    assert "debug" not in parse(load_recipe(RECIPE), ["--debug", "--r", "8"])


@pytest.mark.parametrize("command", [name for name in COMMANDS if "recipe's" not in name])
def test_debug_shows_where_it_was_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    call, words, *_ = COMMANDS[command]
    with pytest.raises(SystemExit):
        call([*words, "--debug", "--zzz"])
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "\nerror: unknown flag --zzz." in said


def test_help_and_refusals_are_quick_and_import_nothing_heavy() -> None:
    code = f"""
import contextlib, io, sys, time
from qlora_recipes.cli import VERBS
from test_commandline import COMMANDS
begun = time.process_time()
for name, (call, words, *_) in COMMANDS.items():
    for asked, code in (("--help", 0), ("--zzz", 2)):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            try:
                call([*words, asked])
            except SystemExit as ended:
                assert ended.code == code, name
        called = f"qlora-recipes {{name}}" if name in VERBS else ""
        assert out.getvalue().startswith(f"usage: {{called}}" if code == 0 else ""), name
        assert time.process_time() - begun < 2, name
        assert not {HEAVY!r} & set(sys.modules), name
        begun = time.process_time()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


# The values of a command line

VALUES: list[tuple[list[str], object]] = [
    (["--save_strategy", "no"], "no"),
    (["--run_name", "12:30"], "12:30"),
    (["--run_name", "2024-02-30"], "2024-02-30"),
    (["--run_name", "float16"], "float16"),
    (["--run_name", "010"], "010"),
    (["--run_name", "yes"], "yes"),
    (["--run_name", "{a: 1}"], "{a: 1}"),
    (["--run_name=--a b"], "--a b"),
    (["--run_name", "null"], None),
    (["--include_num_input_tokens_seen", "no"], "no"),
    (["--include_num_input_tokens_seen"], True),
    (["--seed", "10"], 10),
    (["--seed", "-1"], -1),
    (["--seed", "0"], 0),
    (["--learning_rate", "2e-4"], 2e-4),
    (["--learning_rate", "1"], 1.0),
    (["--max_length", "none"], None),
    (["--eval_steps", "null"], None),
    (["--packing"], True),
    (["--packing", "False"], False),
    (["--tf32", "null"], None),
    (["--report_to", "none"], "none"),
    (["--report_to", "wandb,tensorboard"], ["wandb", "tensorboard"]),
    (["--target_modules", "q_proj"], ["q_proj"]),
    (["--target_modules", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
    (["--target_modules", "q_proj,v_proj"], ["q_proj", "v_proj"]),
    (["--target_modules", '["q_proj"]'], ["q_proj"]),
    (["--target_modules", "all-linear"], "all-linear"),
    (["--target_modules", r".*\.[qv]_proj"], r".*\.[qv]_proj"),
    (["--target_modules", "[qv]_proj"], "[qv]_proj"),
    (["--modules_to_save", "lm_head"], ["lm_head"]),
    (["--layers_to_transform", "1,2"], [1, 2]),
    (["--layers_to_transform", "1", "2"], [1, 2]),
    (["--layers_to_transform", "null"], None),
    (["--layer_replication", "[[0, 4], [2, 5]]"], [[0, 4], [2, 5]]),
    (["--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'], {"every_n_layers": 2}),
    (["--rank_pattern", '{"q_proj": 4}'], {"q_proj": 4}),
    (["--init_lora_weights", "gaussian"], "gaussian"),
    (["--init_lora_weights", "false"], False),
    (["--bias", "all"], "all"),
    (["--skip_checks", "steps,hub"], ["steps", "hub"]),
    (["--accelerator_config", "a.json"], "a.json"),
    (["--output_dir=~/runs"], str(Path.home() / "runs")),
    (["--run_name=~/runs"], "~/runs"),
]


@pytest.mark.parametrize(("words", "value"), VALUES)
def test_a_word_is_read_by_the_type_of_its_field(words: list[str], value: object) -> None:
    name = words[0].removeprefix("--").split("=")[0]
    found = parse(load_recipe(RECIPE), words)
    assert found == {name: value} and type(found[name]) is type(value)
    assert parse(load_recipe(RECIPE), argv_of(found)) == found


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--seed", "010"], "--seed: got '010', expected int, without a leading zero"),
        (["--seed", "1_0"], "--seed: got '1_0', expected int"),
        (["--seed", "0x10"], "--seed: got '0x10', expected int"),
        (["--seed", "9" * 5000], "--seed: got '9999"),
        (["--seed", "null"], "expected int"),
        (["--learning_rate", "1_0"], "expected float"),
        (["--packing", "no"], "--packing: got 'no', expected true or false"),
        (["--lr_scheduler_kwargs", "{num_cycles: 2}"], "expected JSON, such as"),
        (["--lr_scheduler_kwargs", '{"a":' * 50_000], "expected JSON, such as"),
        (["--rank_pattern", "4"], "--rank_pattern: got '4', expected Optional[dict]"),
        (["--layers_to_transform", "1,x"], "--layers_to_transform: got 'x', expected int"),
        (["--layer_replication", "0,4"], "expected Optional[list[tuple[int, int]]]"),
        (["--bias", "lora_onl"], "expected one of none, all, lora_only. Did you mean 'lora_only'?"),
        (["--target_modules"], "--target_modules: got no value"),
        (["--target_modules", "q_proj,"], "--target_modules: got ''"),
        (["--dataset", ""], "--dataset: got '', expected text"),
        (["--run_name= "], "--run_name: got ' ', expected str | None"),
    ],
)
def test_a_word_of_another_type_is_refused(words: list[str], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(load_recipe(RECIPE), words)
    assert part in str(caught.value) and len(str(caught.value)) < 400


@pytest.fixture
def resolve(recipe_for: Callable[..., type[Recipe]]) -> Callable[..., Settings]:
    recipe = recipe_for()
    return lambda *words: settings_from(recipe, parse(recipe, words))


def test_flags_beat_the_recipe_and_its_defaults(resolve: Callable[..., Settings]) -> None:
    settings = resolve("--learning_rate", "5e-5", "--r", "32", "--seed", "7", "--precision", "bf16")
    assert settings.training["learning_rate"] == 5e-5
    assert settings.lora["r"] == 32
    assert settings.training["max_length"] == 128  # the recipe's
    assert settings.output_dir == Path("runs/conftest/bf16-seed7")
    assert settings.dtype == "bfloat16"


def test_booleans_lists_and_mappings_are_read(resolve: Callable[..., Settings]) -> None:
    settings = resolve("--packing", "--tf32", "false", "--target_modules", "q_proj", "v_proj")
    assert settings.training["packing"] is True
    assert settings.training["tf32"] is False
    assert settings.lora["target_modules"] == ["q_proj", "v_proj"]
    settings = resolve("--target_modules", "all-linear", "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    assert settings.lora["target_modules"] == "all-linear"
    assert settings.training["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_config_file_gives_flags_and_the_command_line_beats_it(
    resolve: Callable[..., Settings], tmp_path: Path
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("precision: fp4\nlearning_rate: 1e-3\nmax_steps: 7\ndemo: true\n")
    settings = resolve("--config", str(file), "--max_steps", "9")
    assert settings.precision.name == "fp4"
    assert settings.training["learning_rate"] == 1e-3
    assert settings.training["max_steps"] == 9
    assert settings.demo


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--learning_rat", "1"], "Did you mean 'learning_rate'?"),
        (["--precison", "nf4"], "Did you mean 'precision'?"),
        (["--precision", "nf5"], "Did you mean 'nf4'?"),
        (["--dtype", "float32"], "expected bfloat16 or float16"),
        (["--precision", "bf16", "--dtype", "float16"], "contradicts"),
        (["--max_steps", "many"], "max_steps: got 'many', expected int"),
        (["--r", "8", "--r", "9"], "--r is given twice"),
        (["--r", "0"], "a rank of at least 1"),
        (["--bf16", "true"], "it follows from --dtype"),
        (["--resume", "--overwrite"], "give one of them"),
        (["train"], "unexpected word 'train'"),
        (["--demo", "perhaps"], "expected true or false"),
        (["--config", "missing.yaml"], "cannot be read"),
        (["--learning_rate"], "learning_rate: got no value, expected float"),
    ],
)
def test_a_wrong_flag_is_refused(resolve: Callable[..., Settings], words: list[str], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(*words)
    assert part in str(caught.value)


BILLION_LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("learning_rat: 1\n", "line 1: unknown flag 'learning_rat'. Did you mean 'learning_rate'?"),
        ("r: 8\n\nconfig: other.yaml\n", "line 3: unknown flag 'config'"),
        ("- a\n", "holds a list"),
        ("hello\n", "holds a word"),
        ("", "holds nothing"),
        ("a: [\n", "is not YAML"),
        ("r: 8\nmax_steps: x\n", "line 2: max_steps: got 'x', expected int"),
        ("fp16: true\n", "--dtype float16"),
        ("r: 8\nseed: 1\nr: 9\n", "line 3: r is given twice"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "line 3: a is given twice"),
        ("? [a, b]\n: 1\n", "line 1: got a list or a mapping, expected a name"),
        ("r: 8\nmodel:\n", "line 2: model: got no value, expected text"),
        ("dataset: ''\n", "line 1: dataset: got no value, expected text"),
        ("run_name: ' '\n", "line 1: run_name: got no value"),
        ("model: null\n", "line 1: model: got None, expected text"),
        ("model: [a]\n", "line 1: model: got ['a'], expected text"),
        (BILLION_LAUGHS, "line 1: got the anchor a, expected values written out"),
        ("r: *x\n", "line 1: got the alias x"),
        ("r: !!python/name:os.system x\n", "line 1: got the tag tag:yaml.org,2002:python/name:os.system"),
        ("seed: 010\n", "line 1: seed: got '010', expected int, without a leading zero"),
        ("packing: yes\n", "line 1: packing: got 'yes', expected true or false"),
        ("target_modules: [[q_proj]]\n", "line 1: target_modules: got ['q_proj']"),
        ("skip_checks: steps\n", "line 1: skip_checks: got 'steps', expected a list of names"),
        ("[" * 100_000, "is nested too deep"),
        ("r: 8 # " + "x" * 2**20, "has more than 1,048,576 bytes"),
    ],
)
def test_a_wrong_config_file_is_refused(resolve: Callable[..., Settings], tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve("--config", str(file))
    assert part in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("save_strategy: no", "no"),
        ("run_name: 12:30", "12:30"),
        ("run_name: 2024-02-30", "2024-02-30"),
        ("run_name: 010", "010"),
        ("run_name: 'null'", "null"),
        ("learning_rate: 2e-4", 2e-4),
        ("packing: true", True),
        ("eval_steps: null", None),
        ("eval_steps: ~", None),
        ("output_dir: ~/runs", str(Path.home() / "runs")),
        ("target_modules: all-linear", "all-linear"),
        ("target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("layers_to_transform: [1, 2]", [1, 2]),
        (
            "gradient_checkpointing_kwargs: {every_n_layers: 2, x: no, y: 1e-3, z: true}",
            {"every_n_layers": 2, "x": "no", "y": 1e-3, "z": True},
        ),
    ],
)
def test_a_value_of_a_config_file_is_read_by_its_field(tmp_path: Path, text: str, value: object) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    assert parse(load_recipe(RECIPE), ["--config", str(file)]) == {text.split(":")[0]: value}


def test_only_a_file_is_a_config_file(resolve: Callable[..., Settings], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.close()
    places = {
        str(tmp_path): "is a folder, expected a YAML file",
        str(tmp_path / "fifo"): "is a FIFO",
        str(tmp_path / "socket"): "is a socket",
        "/dev/zero": "is a device",
        "https://example.org/flags.yaml": "is a URL, expected a file; download it first",
        str(tmp_path / "none.yaml"): "cannot be read: No such file",
        "a\0b": "is not YAML: embedded null",
    }
    for place, part in places.items():
        with pytest.raises(UsageError) as caught:
            resolve("--config", place)
        assert f"--config {place} {part}" in str(caught.value)


def test_a_demo_without_bundled_rows_says_what_to_give(recipe_for: Callable[..., type[Recipe]]) -> None:
    from qlora_recipes import DatasetSpec

    recipe = recipe_for(dataset=DatasetSpec("mine.jsonl"))
    with pytest.raises(UsageError, match="give --dataset FILE"):
        settings_from(recipe, parse(recipe, ["--demo"]))


def test_secrets_do_not_reach_the_receipt() -> None:
    words = ["recipe", "--hub_token", "hf_abc", "--hub_token=hf_abc", "--max_steps", "5"]
    assert "hf_abc" not in " ".join(without_secrets(words))
    assert without_secrets(words)[-1] == "5"
    counted = ["recipe", "--include_num_input_tokens_seen", "all", "--hub_token=x", "later"]
    assert without_secrets(counted) == ["recipe", "--include_num_input_tokens_seen", "all", "--hub_token=***", "later"]


KEYS = ["hf_" + "a1" * 12, "ghp_" + "a1" * 18, "github_pat_" + "a1_" * 12, "glpat-" + "a-1" * 8, "sk-proj-" + "a1" * 12]
KEYS += ["xoxb-1234567890-abc", "AKIA" + "A1" * 8]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_known_by_its_form(key: str) -> None:
    assert masked({"name": [f"about {key}", 3]}) == {"name": ["about ***", 3]}
    assert without_secrets(["recipe", f"--run_name=run-{key}"]) == ["recipe", "--run_name=run-***"]


@pytest.mark.parametrize("text", ["risk-analysis-of-the-second-quarter", "shf_task", "AKIAK", "sk-short"])
def test_what_only_looks_like_a_key_stays(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("name", ["GITHUB_PAT", "DB_PASS", "MY_PASSWORD", "SIGNING_KEY", "CI_TOKEN", "app_secret"])
def test_a_variable_named_like_a_secret_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "planted-4711")
    monkeypatch.setenv(f"SHORTER_{name}", "planted-")
    monkeypatch.setenv("SOME_PATH", "/usr/local")
    assert masked(["about planted-4711", "/usr/local"]) == ["about ***", "/usr/local"]


MINE = """from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import LLAMA_2_7B_CHAT
class Mine(Recipe):
    model = LLAMA_2_7B_CHAT
    dataset = DatasetSpec("mine.jsonl")
"""


def test_a_broken_file_does_not_stop_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {"raises": "1 / 0", "exits": "import sys; sys.exit(7)", "none": "", "syntax": "def", "quits": "exit()"}
    broken["dies"] = "import os; os._exit(3)"
    for name, text in {"mine": MINE, **broken}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "folder.py").mkdir()
    cli.main(["list", str(tmp_path)])
    said = capsys.readouterr().out
    assert "mine.jsonl" in said
    left_out = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 7 and all(any(f"{name}.py" in line for line in left_out) for name in (*broken, "folder"))
    (tmp_path / "mine.py").unlink()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["list", str(tmp_path)])
    assert "is a recipe\n" in capsys.readouterr().err


def test_a_file_that_loops_is_left_out_of_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loops.py").write_text("while True: pass\n")
    monkeypatch.setattr("qlora_recipes.commands.list._SECONDS", 1)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["list", str(tmp_path)])
    assert "loops.py: the recipe's file takes longer than 1 seconds" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--learning_rat", "1"], ["--dataset", "missing.jsonl", "--demo"]])
def test_errors_exit_with_2_and_leave_nothing(words: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, RECIPES / "llama2_guanaco.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag() -> None:
    command = [sys.executable, RECIPES / "falcon_faq.py", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--precision", "--dtype", "--demo", "--plan", "--resume", "--learning_rate", "--r", "--packing"):
        assert flag in text


def test_help_is_short_and_has_the_values_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for asked in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            main(load_recipe(RECIPE), asked)
        texts.append(capsys.readouterr().out)
    short, whole = texts
    assert len(short.splitlines()) <= 60 and "--help all lists" in short
    assert "--max_length N" in short and "(here: 512)" in short and "(here: fitted to the machine)" in short
    assert "--dora" not in short and "--use_dora true|false" in whole and "--bias none|all|lora_only" in whole
    assert not [word for word in ("Optional[", "| None", "|None", "Literal", "<a") if word in whole]


def test_list_cuts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    verb("list")([str(RECIPES)])
    said = capsys.readouterr().out
    assert "NousResearch/Llama-2-7b-chat-hf" in said and "timdettmers/openassistant-guanaco" in said
    assert "…" not in said


def test_version_and_help_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"qlora-recipes {qlora_recipes.__version__}\n"
    cli.main(["help"])
    assert capsys.readouterr().out.startswith("usage: qlora-recipes COMMAND")
