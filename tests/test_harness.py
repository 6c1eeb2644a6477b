"""Evaluation: the run's own weights, the training format to the token, results that are whole or not there."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from fake_runs import receipt
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora_recipes import Recipe, environment
from qlora_recipes.base.adapters import WEIGHTS
from qlora_recipes.commands import chat, merge
from qlora_recipes.commands.evaluate import main
from qlora_recipes.data.encoding import IGNORED
from qlora_recipes.errors import CheckError, DataError, ModelError, RecipesError, RunFolderError, UsageError
from qlora_recipes.evaluation import answers, harness, kl, loaded
from qlora_recipes.evaluation.bar import Bar
from qlora_recipes.evaluation.documents import hash_documents
from qlora_recipes.evaluation.generation import Generation, generate
from qlora_recipes.evaluation.harness import Options, default_tasks, evaluate_many
from qlora_recipes.evaluation.held_out import score_held_out
from qlora_recipes.evaluation.loaded import BaseKey, RestoredRun, check_remote_code, restore_base, restore_run
from qlora_recipes.evaluation.records import DocRecord, Scores, TaskResult, finished_tasks, read_task, write_task
from qlora_recipes.evaluation.task_loading import STANDIN_TASKS, EvalTask, _names_in, load_tasks
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.run.signals import Stopped
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train

SHORT = Options(limit=4, batch_size=4)
TASKS = ["standin_choice", "standin_answer", "standin_text", "held_out"]


def evaluate(folder: RunFolder, tasks: list[str], **flags: Any) -> list[TaskResult]:
    return evaluate_many([folder], tasks, **flags)[0]


@pytest.fixture(scope="module")
def trained(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], RunFolder]:
    """Return a function that trains a run of three steps, once."""
    made: dict[tuple[str, str], RunFolder] = {}

    def make(family: str = "llama2", precision: str = "nf4", seed: int = 0) -> RunFolder:
        key = (family, precision, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("runs") / "-".join(map(str, key))
            settings = resolve(
                recipe_for(family),
                precision=precision,
                model=str(tiny(family)),
                output_dir=folder,
                training={"seed": seed, "learning_rate": 0.05},
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(environment, "share_threads", lambda: None)  # test processes share the cores
                made[key] = train(settings)
        return made[key]

    return make


@pytest.fixture
def run(trained: Callable[..., RunFolder], tmp_path: Path) -> RunFolder:
    """A trained run of its own, to be evaluated or spoilt."""
    return RunFolder(Path(shutil.copytree(trained().path, tmp_path / "run")))


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_every_offline_task_is_scored_on_the_runs_own_weights(
    family: str, trained: Callable[..., RunFolder], tmp_path: Path
) -> None:
    folder = RunFolder(Path(shutil.copytree(trained(family).path, tmp_path / "run")))
    results = evaluate(folder, [*TASKS, "held_out_answers"], options=SHORT)
    receipt = folder.receipt()
    assert [result.task for result in results] == [*TASKS, "held_out_answers"]
    for result in results:
        assert result.adapter_sha256 == receipt.adapter.final_sha256
        assert result.base_sha256 == receipt.base.sha256
        assert result.adapter_on_off_difference > 0
        assert (result.limit, result.truncated, result.prompts_unlike_training) == (4, 0, 0)
        again, docs = read_task(folder.evaluation, result.task)
        assert again == result and 0 < len(docs) == result.n_docs <= 4
        assert result.metrics[result.metric] == pytest.approx(_pooled(result, docs))
        parts = result.seconds_by_part
        assert sum(parts[name] for name in ("prompts", "model", "scores")) == pytest.approx(result.seconds, abs=0.01)
        assert parts["base"] > 0 and parts["run"] > 0 and parts["model"] > 0
        assert result.documents_sha256 == hash_documents(doc.doc_hash for doc in docs)
    words = results[-1]
    assert words.metric == "rougeL" and {"rougeL", "bleu", "chrf", "ended"} == set(words.metrics)
    _, chosen = read_task(folder.evaluation, "standin_choice")
    assert {doc.subject for doc in chosen} == {"town"}
    asked = load_tasks(["standin_choice"])["standin_choice"][0].parts[0].eval_docs
    assert [doc.choices for doc in chosen] == [8] * 4
    assert [asked[i]["choices"][doc.picked] for i, doc in enumerate(chosen)] == [doc.answer for doc in chosen]
    _, answered = read_task(folder.evaluation, "standin_answer")
    assert {(doc.choices, doc.picked) for doc in answered} == {(None, None)}


def _pooled(result: TaskResult, docs: list[DocRecord]) -> float:
    if result.kind == "bits_per_byte":
        return sum(doc.bits for doc in docs) / sum(doc.bytes for doc in docs)
    return sum(doc.score for doc in docs) / len(docs)


def test_two_evaluations_give_the_same_scores(run: RunFolder) -> None:
    evaluate(run, TASKS, options=SHORT)
    first = [read_task(run.evaluation, task)[1] for task in TASKS]
    evaluate(run, TASKS, options=SHORT, overwrite=True)
    assert [read_task(run.evaluation, task)[1] for task in TASKS] == first


def test_runs_of_one_base_share_it_and_are_scored_as_alone(
    trained: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [RunFolder(Path(shutil.copytree(trained(seed=seed).path, tmp_path / str(seed)))) for seed in (0, 1)]
    alone = [evaluate(folder, ["held_out"], options=SHORT)[0].metrics for folder in folders]
    loads: list[BaseKey] = []
    monkeypatch.setattr(harness, "restore_base", lambda key: loads.append(key) or restore_base(key))
    together = evaluate_many(folders, ["held_out"], options=SHORT, overwrite=True)
    assert [results[0].metrics for results in together] == alone
    assert alone[0] != alone[1] and len(loads) == 1


@pytest.mark.parametrize(
    ("module", "measure"),
    [
        (harness, lambda folders: evaluate_many(folders, ["held_out", "standin_choice"], options=SHORT)),
        (kl, lambda folders: kl.measure(folders[0], folders[1:])),
    ],
    ids=["scores", "kl"],
)
def test_one_base_is_in_memory_at_a_time(
    module: ModuleType,
    measure: Callable[[list[RunFolder]], object],
    trained: Callable[..., RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    precisions = ("bf16", "nf4")
    folders = [RunFolder(Path(shutil.copytree(trained(precision=p).path, tmp_path / p))) for p in precisions]
    models: list[weakref.ref[object]] = []

    def load(key: BaseKey) -> object:
        assert not any(model() for model in models), "the base before is still in memory"
        base = restore_base(key)
        models.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(module, "restore_base", load)
    measure(folders)
    assert len(models) == len(precisions)


def test_controls_are_written_beside_the_run(trained: Callable[..., RunFolder], tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(trained(precision="bf16").path, tmp_path / "run")))
    (own,) = evaluate(folder, ["held_out"], options=SHORT)
    (base,) = evaluate(folder, ["held_out"], options=replace(SHORT, adapter=False))
    (cross_base,) = evaluate(folder, ["held_out"], options=replace(SHORT, precision="nf4"))
    assert (base.adapter_sha256, base.adapter_on_off_difference, base.base_sha256) == (None, None, own.base_sha256)
    assert (cross_base.adapter_sha256, cross_base.precision) == (own.adapter_sha256, "nf4")
    assert len({own.metrics["loss"], base.metrics["loss"], cross_base.metrics["loss"]}) == 3
    assert (folder.evaluation / "base" / "held_out.json").is_file()
    assert (folder.evaluation / "on-nf4" / "held_out.json").is_file()


def test_an_exchanged_adapter_is_refused(run: RunFolder) -> None:
    weights = load_file(run.adapter / WEIGHTS)
    first = sorted(weights)[0]
    weights[first] = weights[first] + 1e-3
    save_file(weights, run.adapter / WEIGHTS)
    with pytest.raises(CheckError, match="the adapter is not this run's"):
        evaluate(run, ["held_out"], options=SHORT)
    assert not run.evaluation.exists()


def test_an_adapter_that_does_nothing_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(run.adapter / WEIGHTS)
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, run.adapter / WEIGHTS)
    monkeypatch.setattr(loaded, "_check_same", lambda *_: None)
    with pytest.raises(CheckError, match="switching the adapter off changes no logit"):
        evaluate(run, ["held_out"], options=SHORT)


def test_another_base_is_refused(run: RunFolder, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny("llama2"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    _edit_receipt(run, lambda receipt: setattr(receipt.base, "model", str(other)))
    with pytest.raises(CheckError, match="the base is not this run's"):
        evaluate(run, ["held_out"], options=SHORT)


def test_an_edited_template_and_a_missing_adapter_are_refused(run: RunFolder) -> None:
    template = run.adapter / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(CheckError, match="the chat template is not this run's"):
        evaluate(run, ["held_out"], options=SHORT)
    (edited,) = evaluate(run, ["held_out"], options=replace(SHORT, other_template=True))
    assert edited.template_sha256 not in (None, run.receipt().template.sha256)
    shutil.rmtree(run.evaluation)
    template.write_text(template.read_text()[:-1])
    (run.adapter / WEIGHTS).unlink()
    with pytest.raises(RecipesError, match="no adapter at"):
        evaluate(run, ["held_out"], options=SHORT)


def _edit_receipt(run: RunFolder, edit: Callable[[Receipt], None]) -> None:
    receipt = run.receipt()
    edit(receipt)
    (run.path / "run.json").write_text(json.dumps(asdict(receipt)))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "crafted"

class Model(LlamaForCausalLM):
    config_class = Config

Path({ran!r}).touch()
"""


def test_code_of_a_base_runs_only_where_it_is_allowed_again(
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    base, ran = Path(shutil.copytree(tiny("llama2"), tmp_path / "base")), tmp_path / "it ran"
    (base / "crafted.py").write_text(CODE.format(ran=str(ran)))
    config = json.loads((base / "config.json").read_text())
    config |= dict(model_type="crafted")
    config["auto_map"] = dict(AutoConfig="crafted.Config", AutoModelForCausalLM="crafted.Model")
    (base / "config.json").write_text(json.dumps(config))
    training = dict(trust_remote_code=True, learning_rate=0.05)
    folder = train(resolve(recipe_for(), model=str(base), output_dir=tmp_path / "run", training=training))
    assert ran.exists()
    for command in (main, merge.main, chat.main):
        with pytest.raises(UsageError, match="Give --trust_remote_code when you have read it"):
            command([str(folder.path)])
    asked: list[bool] = []
    plain = loaded.load_base
    monkeypatch.setattr(
        loaded, "load_base", lambda *a, **k: asked.append(k["trust_remote_code"]) or plain(*a, **k)
    )  # the code is in this process already, and would not run a second time
    main([str(folder.path), "--tasks", "held_out", "--limit", "2", "--trust_remote_code"])
    merge.main([str(folder.path), "--trust_remote_code"])
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    chat.main([str(folder.path), "--trust_remote_code"])
    assert asked == [True] * 3  # plain Transformers loads what is merged


def test_code_of_a_base_is_run_at_a_commit_only(trained: Callable[..., RunFolder]) -> None:
    receipt = trained().receipt()
    assert not BaseKey.of(receipt).trust_remote_code
    check_remote_code(receipt, allowed=False)
    receipt.settings.training["trust_remote_code"] = True
    receipt.base.model, receipt.base.revision = "some/model", "main"
    with pytest.raises(UsageError, match="revision as 'main'; expected a commit"):
        check_remote_code(receipt, allowed=True)
    receipt.base.revision = "0a" * 20
    check_remote_code(receipt, allowed=True)
    assert BaseKey.of(receipt).trust_remote_code


def test_finished_tasks_are_kept_and_unfinished_ones_run(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(run, ["held_out"], options=SHORT)
    monkeypatch.setattr(harness, "restore_base", lambda key: pytest.fail("loaded a base for a finished task"))
    evaluate(run, ["held_out"], options=SHORT)
    monkeypatch.undo()
    (run.evaluation / "held_out.json").unlink()  # as after a kill between the two files
    assert finished_tasks(run.evaluation) == {}
    assert [result.task for result in evaluate(run, ["held_out"], options=SHORT)] == ["held_out"]


TWO_TASKS = ["--tasks", "held_out", "standin_text", "--limit", "2"]


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_an_evaluation_and_the_same_command_does_what_is_left(
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    which: signal.Signals,
    code: int,
) -> None:
    plain, scored = harness._measure, []

    def measure(run: RestoredRun, task: EvalTask, *rest: Any) -> Scores:
        if task.name == "standin_text" and "standin_text" not in scored:
            scored.append(task.name)
            os.kill(os.getpid(), which)
        scored.append(task.name)
        return plain(run, task, *rest)

    monkeypatch.setattr(harness, "_measure", measure)
    with pytest.raises(Stopped) as stopped:
        main([str(run.path), *TWO_TASKS])
    assert stopped.value.code == code
    said = capsys.readouterr().err
    assert f"stopped by {which.name}; the same command resumes with the tasks that are left" in said
    assert f"{run.evaluation}: finished held_out, left standin_text" in said
    assert {file.name for file in run.evaluation.iterdir()} == {"held_out.json", "held_out.docs.jsonl"}
    main([str(run.path), *TWO_TASKS])
    assert scored == ["held_out", "standin_text", "standin_text"]  # begun, and then done
    assert set(finished_tasks(run.evaluation)) == {"held_out", "standin_text"}


def test_a_signal_in_a_write_leaves_a_whole_result(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = harness.write_task

    def write(*args: Any) -> TaskResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(harness, "write_task", write)
    with pytest.raises(Stopped):
        evaluate(run, ["held_out", "standin_text"], options=SHORT)
    assert set(finished_tasks(run.evaluation)) == {"held_out"}


SLOW = """
import sys, time
from qlora_recipes import cli
from qlora_recipes.evaluation import harness

def measure(*_):
    print("scoring", flush=True)
    time.sleep(60)

harness._measure = measure
cli.main(["evaluate", *sys.argv[1:]])
"""


def test_a_process_that_evaluates_ends_with_the_signals_code(run: RunFolder) -> None:
    words = [sys.executable, "-c", SLOW, str(run.path), "--tasks", "held_out"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "scoring\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Traceback" not in said and "finished none, left held_out" in said
    assert not run.evaluation.exists()


def test_results_of_other_options_are_not_replaced(run: RunFolder) -> None:
    evaluate(run, ["held_out"], options=SHORT)
    before = (run.evaluation / "held_out.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"held_out with limit 4, now None is asked for\. Give --overwrite"):
        evaluate(run, ["held_out"], options=Options(batch_size=4))
    assert (run.evaluation / "held_out.json").read_bytes() == before
    assert evaluate(run, ["held_out"], options=Options(batch_size=4), overwrite=True)[0].limit is None


def test_held_out_loss_is_that_of_one_row_at_a_time(run: RunFolder) -> None:
    key = BaseKey.of(run.receipt())
    with restore_run(run, restore_base(key), key) as it, torch.no_grad():
        scores = score_held_out(it, batch_size=2, limit=None, bar=_silent())
        for kept, doc in zip(it.held_out, scores.docs, strict=True):
            row = it.encoder.encode(kept.messages)
            labels = torch.tensor(row.labels[1:])
            logits = it.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
            expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            assert doc.bits * torch.log(torch.tensor(2.0)) == pytest.approx(float(expected), rel=1e-2)  # bf16 batches
            assert doc.bytes == sum(len(m["content"].encode()) for m in kept.messages if m["role"] == "assistant")


def _silent() -> Bar:
    from rich.console import Console

    return Bar("test", Console(quiet=True))


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_prompts_and_choices_are_the_training_format_to_the_token(
    family: str, trained: Callable[..., RunFolder]
) -> None:
    from qlora_recipes.evaluation.lm_eval_model import RunLanguageModel

    folder = trained(family)
    key = BaseKey.of(folder.receipt())
    (task,) = load_tasks(["standin_choice"])["standin_choice"]
    with restore_run(folder, restore_base(key), key) as it:
        model = RunLanguageModel(it, 2, _silent())
        part = task.parts[0]
        part.build_all_requests(limit=3, apply_chat_template=True, chat_template=model.apply_chat_template)
        for instance in part.instances:
            prompt, choice = instance.args
            messages = [
                {"role": "user", "content": instance.doc["question"]},
                {"role": "assistant", "content": instance.doc["choices"][instance.idx]},
            ]
            context, words = model._encode_pair(prompt, choice)
            whole = it.encoder.encode(messages).input_ids
            assert context == it.encoder.encode_prompt(messages[:1])
            assert context + words == whole[: len(context) + len(words)]
            assert model.tok_decode(whole[len(context) + len(words) :]).strip() == ""
        assert model.prompts_unlike_training == 0


def test_a_document_that_spells_a_control_token_is_counted(run: RunFolder, tmp_path: Path) -> None:
    folder = _task_folder(tmp_path, rows=[{"q": "What is </s>?", "a": "no"}, {"q": "What is two?", "a": "yes"}])
    (result,) = evaluate(run, [str(folder)], options=Options(batch_size=2))
    assert result.prompts_unlike_training == 1


def test_rolling_text_starts_with_one_bos(run: RunFolder) -> None:
    evaluate(run, ["standin_text"], options=SHORT)
    _, docs = read_task(run.evaluation, "standin_text")
    key = BaseKey.of(run.receipt())
    with restore_run(run, restore_base(key), key) as it, torch.no_grad():
        for doc in docs:
            plain = it.tokenizer(doc.target, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[it.tokenizer.bos_token_id, *plain]])
            logits = it.model(input_ids=ids).logits.float()
            nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
            assert doc.bits * torch.log(torch.tensor(2.0)) == pytest.approx(float(nats), rel=1e-2)


def test_lm_eval_still_scores_a_second_bos(trained: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our `loglikelihood_rolling`; when this fails, lm-eval has changed and the override can go."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from qlora_recipes.evaluation.lm_eval_model import RunLanguageModel

    key = BaseKey.of(trained().receipt())
    scored: list[list[int]] = []

    def window(self: HFLM, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        scored.extend(continuation for _, _, continuation in requests)
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", window)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("Anna lives here.",), idx=0)
    with restore_run(trained(), restore_base(key), key) as it:
        it.tokenizer.add_bos_token, bos = True, it.tokenizer.bos_token_id  # as Llama-2's own has it
        assert it.tokenizer("Anna")["input_ids"][0] == bos
        model = RunLanguageModel(it, 1, _silent())
        HFLM.loglikelihood_rolling(model, [request])
        model.loglikelihood_rolling([request])
    assert scored == [[bos, *scored[1]], scored[1]] and bos not in scored[1]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_loglikelihood_tokens", "self requests disable_tqdm override_bs"),
        ("_model_call", "self inps attn_mask labels"),
        ("_model_generate", "self context max_length stop generation_kwargs"),
        ("tok_batch_encode", "self strings padding_side left_truncate_len truncation"),
        ("apply_chat_template", "self chat_history add_generation_prompt"),
    ],
)
def test_what_is_overridden_of_lm_eval_takes_what_it_took(name: str, parameters: str) -> None:
    from lm_eval.models.huggingface import HFLM

    assert list(inspect.signature(getattr(HFLM, name)).parameters) == parameters.split()


def test_requests_that_lose_their_beginning_are_counted(trained: Callable[..., RunFolder]) -> None:
    from lm_eval.api.instance import Instance

    from qlora_recipes.evaluation.lm_eval_model import RunLanguageModel

    key, until = BaseKey.of(trained().receipt()), {"until": ["\n"], "max_gen_toks": 4}
    with restore_run(trained(), restore_base(key), key) as it:
        model = RunLanguageModel(it, 2, _silent())
        long = "word " * it.model.config.max_position_embeddings
        choices = [Instance("loglikelihood", {}, (prompt, " yes"), i) for i, prompt in enumerate(("Is it?", long))]
        assert len(model.loglikelihood(choices)) == 2 and model.truncated == 1
        questions = [Instance("generate_until", {}, (prompt, until), i) for i, prompt in enumerate(("Who?", long))]
        assert len(model.generate_until(questions)) == 2 and model.truncated == 2


def test_lm_eval_draws_no_bar_of_its_own(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate(run, ["standin_choice", "standin_answer", "standin_text"], options=SHORT)
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert not [line for line in lines if "it/s]" in line and not line.startswith("Loading weights")]


def test_peft_leaves_nothing_on_a_base(trained: Callable[..., RunFolder]) -> None:
    """Were its config left there, the next adapter would count as a second one."""
    folder = trained(precision="bf16")
    base = restore_base(BaseKey.of(folder.receipt())).model
    names = [name for name, _ in base.named_parameters()]
    assert loaded.load_adapter(base, folder.adapter).unload() is base
    assert not hasattr(base, "peft_config") and [name for name, _ in base.named_parameters()] == names


def test_a_batch_of_answers_is_what_each_prompt_gets_alone(tiny: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    for family in ("llama2", "falcon"):
        model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny(family))
        prompts = [tokenizer(text)["input_ids"] for text in ("Where does Anna live?", "Who?", "A longer one, is it?")]
        settings = dict(end=tokenizer.eos_token_id, pad=5, settings=Generation(max_new_tokens=8))
        together = generate(model, prompts, **settings)
        assert together == [generate(model, [prompt], **settings)[0] for prompt in prompts]
        assert all(0 < len(answer) <= 8 for answer in together)


def _task_folder(tmp_path: Path, *, rows: list[dict] | None = None, **changes: object) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = rows or [{"q": "Is it?", "a": "yes"}, {"q": "Was it?", "a": "no"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{['yes', 'no'].index(a)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    (folder / "mine.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def test_a_folder_of_your_own_is_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _task_folder(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (task,) = load_tasks(["../mine"])["../mine"]
    assert (task.name, task.metric, task.kind, len(task.parts[0].eval_docs)) == ("mine", "acc", "accuracy", 2)
    assert load_tasks([str(folder / "mine.yaml")])


def test_lm_eval_still_reads_relative_data_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, its TaskManager can read folders of tasks in the place of its private YAML loader."""
    from lm_eval.tasks import TaskManager

    folder = _task_folder(tmp_path)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(FileNotFoundError, match="rows"):
        manager.load(["mine"])
    monkeypatch.chdir(folder)
    assert manager.load(["mine"])["tasks"]


def test_lm_eval_still_compiles_a_template_for_every_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, `_compile_templates_once` can go."""
    from lm_eval.utils import apply_template, env

    load_tasks(["standin_choice"])
    assert env.from_string("{{ a }}") is env.from_string("{{ a }}")
    assert [apply_template("{{ a }}", {"a": word}) for word in "xy"] == ["x", "y"]
    monkeypatch.delattr(env, "from_string")
    assert env.from_string("{{ a }}") is not env.from_string("{{ a }}")
    assert "env.from_string(template)" in inspect.getsource(apply_template)


def test_names_read_from_lm_evals_files_are_those_of_its_index() -> None:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders, listed = _names_in(root)
    for folder in ("arc", "hellaswag", "mmlu"):
        index = lm_eval.tasks.TaskManager(include_path=str(root / folder), include_defaults=False).all_tasks
        assert index and set(index) <= {*folders, *listed}
        assert {folders[name] for name in index if name in folders} == {folder}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"metric_list": [{"metric": "acuracy"}]}, UsageError, "no metric 'acuracy'"),
        ({"metric_list": [{"metric": "acc", "aggregation": "maen"}]}, UsageError, "Did you mean 'mean'"),
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, DataError, "names the data gone.jsonl"),
        ({"doc_to_target": "{{nothing"}, DataError, "lm-eval cannot make a task of it"),
        ({"include": "gone.yaml"}, DataError, "cannot be read as a task"),
        ({"task": None}, DataError, "names no task"),
    ],
)
def test_a_broken_task_is_refused_before_anything_runs(
    changes: dict, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        load_tasks([str(_task_folder(tmp_path, **changes))])


def test_broken_yaml_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(DataError, match=r"broken\.yaml cannot be read as a task"):
        load_tasks([str(tmp_path)])
    with pytest.raises(UsageError, match="no task folder at"):
        load_tasks([str(tmp_path / "gone")])


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown task 'standin_choce'\. Did you mean 'standin_choice'\?"):
        load_tasks(["standin_choce"])


def test_a_task_asked_for_twice_is_refused(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="the task standin_text is asked for twice"):
        evaluate(run, ["standin_text", "eval/tasks"], options=SHORT)


def test_the_folder_of_tasks_holds_the_shipped_ones() -> None:
    tasks = load_tasks(["eval/tasks"])["eval/tasks"]
    assert {task.name for task in tasks} == set(STANDIN_TASKS)


@pytest.mark.parametrize("limit", [1.0, 0.5, 0, -1, True, "4"])
def test_a_limit_that_is_no_count_is_refused(limit: object) -> None:
    with pytest.raises(UsageError, match="limit: got"):
        Options(limit=limit)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "1.0"], "got '1.0', expected a whole number"),
        (["--limits", "4"], "Did you mean 'limit'"),
        (["--batch_size", "auto"], "expected a whole number"),
        (["--precision", "nf5"], "got 'nf5', expected one of nf4"),
    ],
)
def test_a_wrong_flag_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(["run", *words])


def test_the_command_scores_and_prints(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run.path), "--tasks", "held_out", "--limit", "2"])
    printed = capsys.readouterr().out
    assert "held_out" in printed and "bits_per_byte" in printed and "NOT A RESULT" in printed
    assert re.search(r"seconds by part: base \d+\.\d, run .*, prompts .*, model .*, scores ", printed)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no finished run"):
        main([str(tmp_path)])


def test_default_tasks() -> None:
    demo = receipt("nf4", 0, settings__eval_tasks=["mmlu"])
    assert default_tasks(demo) == [*STANDIN_TASKS, "held_out"]
    assert default_tasks(replace(demo, demo=False)) == ["mmlu"]
    assert default_tasks(receipt("nf4", 0, demo=False)) == ["held_out", "held_out_answers"]
    with pytest.raises(UsageError, match="give --tasks"):
        default_tasks(receipt("nf4", 0, demo=False, data__rows_held_out=0))


def _result(**changes: object) -> TaskResult:
    values: dict = dict(
        task="a/b.c", kind="accuracy", metric="acc", higher_is_better=True, metrics={"acc": 1.0}, stderr={}, n_docs=1,
        limit=None, num_fewshot=0, chat_template=True, template_sha256="t", prompts_unlike_training=0, truncated=0,
        batch_size=8, loglikelihood_dtype="float32", version="1", precision="nf4", base_sha256="b",
        adapter_sha256="a", adapter_on_off_difference=0.5, device="cpu", seconds=1.0,
    )  # fmt: skip
    return TaskResult(**{**values, **changes})


def _doc(**changes: object) -> DocRecord:
    values: dict = dict(
        task="a/b.c", subject="s", doc_id="0", doc_hash="d", prompt_hash="p", target_hash="t", score=1.0,
        answer="line\u2028separator", target="\x85", prompt="\n\r'\"",
    )  # fmt: skip
    return DocRecord(**{**values, **changes})


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    written = write_task(tmp_path, _result(), [_doc(), _doc(doc_id="1", bits=2.0, bytes=3)])
    assert read_task(tmp_path, "a/b.c") == (written, [_doc(), _doc(doc_id="1", bits=2.0, bytes=3)])
    assert finished_tasks(tmp_path) == {"a/b.c": written}
    assert {file.parent for file in tmp_path.rglob("*")} == {tmp_path}  # a name cannot leave the folder


def test_half_a_result_is_none(tmp_path: Path) -> None:
    write_task(tmp_path, _result(), [_doc()])
    (docs,) = tmp_path.glob("*.docs.jsonl")
    docs.write_text(docs.read_text() + docs.read_text())
    assert finished_tasks(tmp_path) == {}
    with pytest.raises(RunFolderError, match="is not the one that"):
        read_task(tmp_path, "a/b.c")
    with pytest.raises(RunFolderError, match="is missing"):
        read_task(tmp_path, "other")


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"document 7 of a/b\.c has the score nan"):
        write_task(tmp_path, _result(), [_doc(), _doc(doc_id="7", score=float("nan"))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["held_out_answers", "standin_answer"])
def test_drawn_answers_are_repeated_by_their_seed(task: str, run: RunFolder) -> None:
    def answered(**drawn: Any) -> tuple[str, list[str]]:
        (result,) = evaluate(run, [task], options=replace(SHORT, **drawn), overwrite=True)
        return result.decoding, [doc.answer for doc in read_task(run.evaluation, task)[1]]

    greedy = answered()
    assert greedy == answered(temperature=0.0)
    assert greedy[0] == "greedy"
    (_, likeliest), (_, again) = (answered(temperature=1.5, top_p=1e-6, seed=seed) for seed in (0, 1))
    assert likeliest == again
    # Of logits that are equal in 16 bits, greedy decoding takes the first and top_p the last.
    assert sum(one == other for one, other in zip(likeliest, greedy[1], strict=True)) >= len(likeliest) - 1
    drawn = answered(temperature=1.5, top_p=0.9, seed=1)
    assert drawn[0] == "temperature 1.5, top_p 0.9, seed 1"
    assert drawn == answered(temperature=1.5, top_p=0.9, seed=1)
    assert len({str(it[1]) for it in (greedy, drawn, answered(temperature=1.5, top_p=0.9, seed=2))}) == 3
    assert answered(temperature=1.5, top_k=1)[1] == likeliest
    cut = answered(max_new_tokens=2, repetition_penalty=1.2, num_beams=2)
    assert cut[0] == "greedy, num_beams 2, repetition_penalty 1.2, max_new_tokens 2"
    answered(temperature=1.5, top_p=0.9, seed=2)
    with pytest.raises(
        RunFolderError, match=r"with decoding temperature 1\.5, top_p 0\.9, seed 2, now greedy is asked"
    ):
        evaluate(run, [task], options=SHORT)


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, expected 0 or a number above"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: got 0.0 with temperature 1.0, expected a share above 0"),
        ({"top_p": 0.9}, "top_p: got 0.9 with temperature None, expected 1"),
        ({"top_k": 5}, "top_k: got 5 with temperature None, expected 0"),
        ({"top_k": -1, "temperature": 1.0}, "top_k: got -1, expected a whole number from 0 up"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected a whole number from 1 up"),
        ({"num_beams": 0}, "num_beams: got 0, expected a whole number from 1 up"),
    ],
)
def test_decoding_that_cannot_be_is_refused(drawn: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Options(**drawn)


def test_answers_before_and_after_tuning_stand_side_by_side(run: RunFolder) -> None:
    page = run.evaluation / "answers.md"
    evaluate(run, ["held_out_answers"], options=SHORT)
    assert not page.exists()
    evaluate(run, ["held_out_answers"], options=replace(SHORT, adapter=False))
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    _, before = read_task(run.evaluation / "base", "held_out_answers")
    _, after = read_task(run.evaluation, "held_out_answers")
    assert len(rows) == len(after) == 2 and [doc.answer for doc in before] != [doc.answer for doc in after]
    for row, one, two in zip(rows, before, after, strict=True):
        assert [text.strip() for text in row.strip("|").split("|")] == [
            answers._cell(text) for text in (one.prompt, one.answer, two.answer, one.target)
        ]
    evaluate(run, ["held_out_answers"], options=replace(SHORT, temperature=1.0), overwrite=True)
    assert not page.exists()  # the base's answers are the likeliest, the run's are drawn


def test_an_answer_cannot_leave_its_cell() -> None:
    assert answers._cell("a|b\n<b>*c*") == "a&#124;b<br>&lt;b&gt;&#42;c&#42;"


def test_a_lower_score_that_is_better_and_cut_prompts_are_recorded(run: RunFolder, tmp_path: Path) -> None:
    long = [{"q": "word " * 2000, "a": "yes"}, {"q": "Was it?", "a": "no"}]
    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]
    folder = _task_folder(tmp_path, rows=long, metric_list=metric)
    (result,) = evaluate(run, [str(folder)], options=Options(batch_size=2))
    assert not result.higher_is_better and result.truncated == 2  # a request for each choice


def test_a_score_of_the_tasks_own_that_is_no_number_is_refused(run: RunFolder, tmp_path: Path) -> None:
    folder = _task_folder(tmp_path)
    (folder / "code.py").write_text("def scores(doc, results):\n    return {'acc': float('nan')}\n")
    yaml = (folder / "mine.yaml").read_text()
    (folder / "mine.yaml").write_text(yaml.replace('{"task"', '{"process_results": !function code.scores, "task"'))
    with pytest.raises(CheckError, match=r"document 0 of mine has the score nan.* or the task's own metric gives it"):
        evaluate(run, [str(folder)], options=SHORT)
    assert not run.evaluation.exists()


def test_the_task_of_the_documentation_is_scored(run: RunFolder, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    files = re.findall(r"`(capitals/\S+)`.*?:\n\n```\w+\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in files] == ["capitals/capitals.yaml", "capitals/capitals.jsonl"]
    (tmp_path / "capitals").mkdir()
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    (result,) = evaluate(run, [str(tmp_path / "capitals")])
    assert (result.metric, result.n_docs, result.prompts_unlike_training) == ("acc", 3, 0)
    _, docs = read_task(run.evaluation, "capitals")
    assert [(doc.target, doc.choices, doc.subject) for doc in docs] == [
        (" Nairobi", 2, "Africa"),
        (" Lima", 2, "America"),
        (" N'Djamena", 2, "Africa"),
    ]


def test_a_task_of_lm_evals_is_scored_from_a_local_cache(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": f"{i}?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[i]}
        for i in range(3)
    ]
    splits = {name: datasets.Dataset.from_list(rows) for name in ("train", "validation", "test")}
    _write_cache(tmp_path / "cache", "allenai/ai2_arc", "ARC-Easy", splits)
    (result,) = evaluate(run, ["arc_easy"], options=Options(batch_size=2))
    assert (result.metric, result.n_docs, result.chat_template) == ("acc", 3, False)
    _, docs = read_task(run.evaluation, "arc_easy")
    assert [doc.prompt for doc in docs] == [f"Question: {i}?\nAnswer:" for i in range(3)]
    assert [doc.target for doc in docs] == ["a", "b", "c"]


def _write_cache(cache: Path, path: str, name: str, splits: dict[str, datasets.Dataset]) -> None:
    """Write what a download from the hub leaves: Arrow files under path, name, version and the hash of a commit."""
    version, commit, stem = "0.0.0", "0" * 40, path.split("/")[-1]
    folder = cache / path.replace("/", "___") / name / version / commit
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        with datasets.arrow_writer.ArrowWriter(path=str(folder / f"{stem}-{split}.arrow")) as writer:
            writer.write_table(rows.data.table)
            writer.finalize()
    sizes = {split: datasets.SplitInfo(split, 0, len(rows), dataset_name=stem) for split, rows in splits.items()}
    info = datasets.DatasetInfo(
        features=splits["test"].features,
        splits=datasets.splits.SplitDict(sizes),
        builder_name="parquet",
        dataset_name=stem,
        config_name=name,
        version=datasets.Version(version),
    )
    info.write_to_directory(str(folder))


def test_a_tokenizer_that_fails_without_a_word_is_one_error(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(loaded.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"no tokenizer at .*: OSError"):
        loaded._tokenizer(run, run.receipt(), other_template=False)
