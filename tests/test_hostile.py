"""Nobody's data, model, checkpoint or name can run code, leave the run folder, or carry a secret into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlora_recipes import Recipe
from qlora_recipes.base import loading
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.commands.recipe_cli import main, parse, settings_from
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError, ModelError, UsageError
from qlora_recipes.fields import fields_of
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.settings import recipe_name, resolve

SECRET, OTHER = "hf_" + "PlantedInTheCommandLine" * 2, "planted-in-the-environment-4711"
PAT, FORM = "planted-as-access-0815", "ghp_" + "PlantedInTheName" * 2
CHECKS_OFF = ["answers_end", "gradient", "gradient_after_evaluation", "packing_leak", "starting_loss"]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]
) -> Path:
    """Train with a secret in the environment and two in the command line, and keep everything that was written."""
    folder = tmp_path_factory.mktemp("secrets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_API_KEY", OTHER)
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("GITLAB_PAT", PAT)
        words = [
            "--hub_token",
            SECRET,
            "--run_name",
            f"about-{OTHER}-{PAT}-{FORM}",
            "--save_strategy",
            "steps",
            "--save_steps",
            "1",
        ]
        recipe = recipe_for(training=dict(recipe_for().training, max_steps=2))
        model = ["--model", str(tiny("llama2")), "--output_dir", "run"]
        main(recipe, [*model, *words, "--skip_checks", *CHECKS_OFF])
    return folder


def test_secrets_reach_no_file(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"run.json", "started.json", "metrics.jsonl", "README.md", "trainer_state.json"} <= {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        for secret in (SECRET, OTHER, PAT, FORM):
            assert secret.encode() not in content, file
    command = json.loads((run / "run" / "run.json").read_text())["command"]
    assert command[command.index("--hub_token") + 1] == "***"
    assert "about-***-***-***" in command


def test_no_pickle_but_states_that_are_read_as_tensors(run: Path) -> None:
    pickles = [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert {path.name for path in pickles} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent.parent.name for path in pickles} == {"checkpoints"}


def test_upstream_reads_states_as_tensors_only(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """`check_torch_load_is_safe` and `weights_only=True` are Transformers'; this says when they are gone."""
    from transformers import Trainer

    asked: list[bool] = []
    plain = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("weights_only", True))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    trainer = Trainer.__new__(Trainer)
    trainer.args = type("Args", (), dict(world_size=1, parallel_mode=None))()
    Trainer._load_rng_state(trainer, str(run / "run" / "checkpoints" / "checkpoint-2"))
    assert asked == [True]


def test_code_of_a_model_folder_is_not_run(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama2"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "crafted",
        "auto_map": {"AutoConfig": "crafted.Config", "AutoModelForCausalLM": "crafted.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "crafted.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\n")
    load_tokenizer(LLAMA_2_7B_CHAT, str(folder), None)
    precision = resolve(recipe_for()).precision
    with pytest.raises(ModelError, match="cannot load"):
        loading.load_base(str(folder), None, precision, "bfloat16", device=torch.device("cpu"))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "351844e"])
def test_remote_code_asks_for_a_pinned_revision(recipe_for: Callable[..., type[Recipe]], revision: str | None) -> None:
    assert not resolve(recipe_for()).trust_remote_code
    training, lora = dict(trust_remote_code=True), dict(revision=revision)
    with pytest.raises(UsageError, match="40 hexadecimal digits"):
        resolve(recipe_for(), model="a/b", training=training, lora=lora)
    assert resolve(recipe_for(), model="a/b", training=training, lora=dict(revision="0a" * 20)).trust_remote_code


@pytest.mark.parametrize("name", ["...py", "..py", "a b.py", "…/x.py", "-.py"])
def test_a_recipe_names_no_folder_outside(tmp_path: Path, name: str) -> None:
    import sys
    import types

    module = types.ModuleType("hostile_name")
    module.__file__ = str(tmp_path / name)
    sys.modules["hostile_name"] = module
    recipe = type("Recipe_", (Recipe,), dict(model=LLAMA_2_7B_CHAT, dataset=_rows(), __module__="hostile_name"))
    folder = resolve(recipe).output_dir
    assert folder.parent.parent == Path("runs")
    assert recipe_name(recipe) not in ("", ".", "..")
    assert folder.resolve().is_relative_to(Path("runs").resolve())


def _rows() -> Any:
    from qlora_recipes import DatasetSpec

    return DatasetSpec("rows.jsonl")


def test_code_of_a_task_folder_is_named_when_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_recipes.evaluation.task_loading import load_tasks

    (tmp_path / "task.yaml").write_text("task: crafted\ndoc_to_text: !function crafted.ask\n")
    (tmp_path / "crafted.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(DataError, match=r"task\.yaml cannot be read as a task: .*it ran"):
        load_tasks([str(tmp_path)])
    assert f"running the Python code that {tmp_path / 'task.yaml'} names" in capsys.readouterr().err


def test_a_task_that_is_a_device_is_not_read() -> None:
    from qlora_recipes.evaluation.task_loading import load_tasks

    with pytest.raises(UsageError, match="/dev/zero is a FIFO, a socket or a device; expected a folder"):
        load_tasks(["/dev/zero"])


FLAGS = [f"--{name}" for name in (*fields_of("SFTConfig"), *fields_of("LoraConfig"), "precision", "demo", "config")]
WORDS = (
    st.sampled_from(FLAGS) | st.text(max_size=12) | st.sampled_from(["nf4", "true", "1e9999", "-1", "[", "{a: ", "0"])
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, max_size=6))
@example(words=["--r", "!!python/object/apply:os.system [id]"])
@example(words=["--target_modules", "\0", "[[["])
def test_any_words_are_settings_or_one_error(recipe_for: Callable[..., type[Recipe]], words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        return
    recipe = recipe_for()
    try:
        settings_from(recipe, parse(recipe, words))
    except UsageError as error:
        assert str(error)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]",:\n\0a1é', max_size=40).map(str.encode))
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_any_bytes_are_rows_or_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    try:
        list(read_rows(str(file)))
    except DataError as error:
        assert name in str(error)


def test_a_setting_that_is_a_secret_is_no_part_of_what_a_run_is(recipe_for: Callable[..., type[Recipe]]) -> None:
    from qlora_recipes.training.journal import settings_identity

    plain = resolve(recipe_for())
    with_token = replace(plain, training={**plain.training, "hub_token": SECRET})
    assert settings_identity(with_token) == settings_identity(plain)
