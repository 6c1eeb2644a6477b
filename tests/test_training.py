"""Training end to end on small models: receipts that are true, runs that repeat, arms that differ in storage alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preflight_runs import ready, verdict_of
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_recipes import Recipe
from qlora_recipes.base import loading
from qlora_recipes.base.adapters import WEIGHTS, adapter_sha256, load_adapter
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.errors import ModelError, RecipeError, RunFolderError, SetupError
from qlora_recipes.precision import PRECISIONS, precision_named
from qlora_recipes.preflight import weights
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import QuantizedReceipt
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train

Train = Callable[..., RunFolder]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
) -> Train:
    """Train a recipe of a family in a fresh folder; equal arguments are trained once."""
    made: dict[str, RunFolder] = {}

    def run(family: str = "llama2", precision: str = "nf4", again: int = 0, **training: Any) -> RunFolder:
        key = repr((family, precision, again, training))
        if key not in made:
            recipe = recipe_for(family)
            folder = tmp_path_factory.mktemp("run") / "run"
            settings = resolve(
                recipe,
                model=str(tiny(family)),
                dataset=recipe.dataset.source,
                precision=precision,
                output_dir=folder,
                training=training,
            )
            made[key] = train(settings, command=["test"])
        return made[key]

    return run


@pytest.mark.parametrize("family", ["llama2", "falcon"])
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp16"])
def test_every_linear_is_stored_as_the_precision_says(runs: Train, family: str, precision: str) -> None:
    base = runs(family, precision).receipt().base
    per_layer = {"llama2": 7, "falcon": 4}[family]
    if precision == "bf16":
        assert base.quantized == QuantizedReceipt(expected=0, found=0)
        assert base.linears == {"Linear": 2 * per_layer}
    else:
        kind = "Linear8bitLt" if precision == "int8" else "Linear4bit"
        threshold = 6.0 if precision == "int8" else None
        assert base.quantized == QuantizedReceipt(2 * per_layer, 2 * per_layer, outlier_threshold=threshold)
        assert base.linears == {kind: 2 * per_layer}


def test_bytes_are_counted_from_what_is_stored(runs: Train) -> None:
    nf4, single, bf16 = (runs("llama2", name).receipt().base for name in ("nf4", "nf4-single", "bf16"))
    rotary = 16 // 2 * 2 * 4  # inverse frequencies of a head of 16, and a copy, in float32
    assert bf16.bytes == 2 * bf16.parameters + bf16.bytes_by_storage.get("float32", 0)
    assert bf16.bytes_by_storage.get("float32", 0) <= rotary
    assert nf4.bytes < bf16.bytes
    assert nf4.parameters == single.parameters == bf16.parameters
    assert nf4.bytes == sum(nf4.bytes_by_storage.values())


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_arms_of_one_seed_start_from_the_same_float32_adapter(runs: Train, family: str) -> None:
    adapters = [runs(family, name).receipt().adapter for name in ("nf4", "nf4-single", "fp4", "int8", "bf16")]
    assert len({adapter.initial_sha256 for adapter in adapters}) == 1
    assert len({adapter.final_sha256 for adapter in adapters}) == 5
    assert {adapter.dtype for adapter in adapters} == {"float32"}
    data = [runs(family, name).receipt().data for name in ("nf4", "bf16")]
    assert data[0] == data[1]


def test_the_same_seed_twice_gives_the_same_adapter(runs: Train) -> None:
    first, second = (runs(again=again).receipt() for again in (0, 1))
    assert first.adapter.final_sha256 == second.adapter.final_sha256
    assert first.training.final_loss == second.training.final_loss
    other = runs(seed=1).receipt()
    assert other.adapter.initial_sha256 != first.adapter.initial_sha256


def test_the_receipt_says_what_was_trained(runs: Train) -> None:
    folder = runs()
    receipt = folder.receipt()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    training = receipt.training
    assert training.steps == 3
    assert training.first_loss == losses[0]
    assert training.final_loss == losses[-1]
    assert training.tokens == max(row.get("num_tokens", 0) for row in rows)
    assert 0 < training.supervised_tokens < training.tokens
    assert training.tokens_per_second == pytest.approx(training.tokens / training.seconds)
    assert receipt.memory.peak_bytes > receipt.base.bytes
    assert receipt.adapter.parameters == sum(tensor.numel() for tensor in load_file(folder.adapter / WEIGHTS).values())
    assert receipt.template.end_token_trained
    assert receipt.template.bos_per_row == [1, 3]  # one a turn pair
    assert receipt.precision == "nf4"
    assert receipt.seed == 0
    assert receipt.versions["trl"]
    assert {check.verdict for check in receipt.checks} <= {"pass", "warn", "untested"}
    assert folder.loss_plot.stat().st_size > 5_000


@pytest.mark.parametrize("logging", [dict(logging_steps=50), dict(logging_strategy="no")])
def test_a_run_that_logs_no_loss_has_the_mean_of_its_steps(runs: Train, logging: dict[str, Any]) -> None:
    receipt, every = runs(**logging).receipt(), runs().receipt()
    losses = [json.loads(line).get("loss") for line in runs().metrics.read_text().splitlines()]
    mean = sum(loss for loss in losses if loss) / 3
    assert receipt.training.first_loss == receipt.training.final_loss == pytest.approx(mean)
    assert receipt.adapter.final_sha256 == every.adapter.final_sha256
    assert next(check for check in receipt.checks if check.name == "loss_fell").verdict == "untested"


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_packing_wastes_nothing_and_learns_from_the_same_tokens(runs: Train, family: str) -> None:
    packed = runs(family, packing=True, num_train_epochs=1, max_steps=-1, learning_rate=1e-3).receipt()
    loose = runs(family, packing=False).receipt()
    padded = runs(family, packing=False, padding_free=False).receipt()
    assert packed.training.packed
    assert packed.training.padding_share == 0
    assert packed.training.tokens == packed.data.tokens
    assert packed.training.supervised_tokens == packed.data.supervised_tokens
    assert loose.training.padding_share == 0
    assert padded.training.padding_share > 0
    assert loose.training.final_loss == pytest.approx(padded.training.final_loss, rel=1e-3)


def test_the_adapter_reloads_as_it_was_trained(runs: Train, tiny: Callable[[str], Path]) -> None:
    folder = runs()
    base, receipt, _ = loading.load_base(str(tiny("llama2")), None, precision_named("nf4"), "bfloat16", device=CPU)
    assert receipt.sha256 == folder.receipt().base.sha256
    model = load_adapter(base, folder.adapter)
    for weight in (p for name, p in model.named_parameters() if "lora_" in name):
        weight.requires_grad_(True)
    assert adapter_sha256(model) == folder.receipt().adapter.final_sha256


def test_the_saved_tokenizer_renders_the_training_template(
    runs: Train, recipe_for: Callable[..., type[Recipe]]
) -> None:
    spec = recipe_for().model
    tokenizer = AutoTokenizer.from_pretrained(runs().adapter)
    held_out = json.loads(runs().held_out.read_text())
    encoder = ConversationEncoder(tokenizer, spec.chat_template)
    for row in held_out[:5]:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        assert ids == encoder.encode(row["messages"]).input_ids


def test_no_pickle_is_left_and_the_card_tells_the_run(runs: Train) -> None:
    folder = runs()
    names = {path.name for path in folder.path.rglob("*")}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    card = (folder.adapter / "README.md").read_text()
    assert folder.receipt().adapter.final_sha256[:16] in card


def test_only_the_named_targets_are_adapted(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> None:
    recipe = recipe_for(lora=dict(r=4, target_modules=["q_proj", "v_proj"]))
    settings = resolve(recipe, model=str(tiny("llama2")), dataset=recipe.dataset.source, output_dir=tmp_path / "run")
    adapter = train(settings).receipt().adapter
    assert adapter.targets == ["q_proj", "v_proj"]
    assert adapter.modules == 4


def test_a_falcon_that_stays_unquantized_is_refused(
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What upstream does without a word: every layer in 16 bits under the name of NF4."""
    monkeypatch.setattr(loading.repairs, "plain_linears", lambda model: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = ready(recipe_for("falcon"), tiny("falcon"), tmp_path / "run")
    check = verdict_of(weights.quantized_linears, run)
    assert check.verdict == "fail"
    assert check.figure.startswith("0 of 8 as nf4") and "0.0% of their weights" in check.figure
    assert "--skip_checks quantized_linears" in check.advice
    assert run.base.quantized.share == 0


def test_float16_asks_for_cuda_and_says_why(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(SetupError, match="needs CUDA: CPUs multiply float16"):
        loading.load_base(str(tiny("llama2")), None, precision_named("fp16"), "float16", device=CPU)


def settings_of(recipe: type[Recipe], folder: Path, **choices: Any):
    choices.setdefault("dataset", recipe.dataset.source)
    return resolve(recipe, output_dir=folder, **choices)


def test_a_half_unknown_target_is_refused_before_a_folder_is_made(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> None:
    recipe = recipe_for(lora=dict(target_modules=["q_proj", "v_prj"]))
    with pytest.raises(RecipeError, match=r"'v_prj'.*Did you mean 'v_proj'"):
        train(settings_of(recipe, tmp_path / "run", model=str(tiny("llama2"))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["nobody/nothing", "empty"])
def test_a_model_that_cannot_be_had_is_one_error(
    recipe_for: Callable[..., type[Recipe]], tmp_path: Path, model: str
) -> None:
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / model) if model == "empty" else model
    with pytest.raises(ModelError, match="cannot load"):
        train(settings_of(recipe_for(), tmp_path / "run", model=source))
    assert not (tmp_path / "run").exists()


def test_a_run_never_touches_another(runs: Train, recipe_for: Callable[..., type[Recipe]], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds a finished run"):
        train(settings_of(recipe_for(), runs().path))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds other files"):
        RunFolder(tmp_path).check_free(overwrite=True)
    with pytest.raises(RunFolderError, match="holds other files"):
        RunFolder(tmp_path).claim()
    assert (tmp_path / "thesis.txt").exists()


def test_a_missing_package_is_refused_and_a_version_outside_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_recipes import environment

    asked = ["torch>=99", "rich>=1"]
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda name: asked)
    ((need, version),) = environment.outside_tested().items()
    assert need.name == "torch" and version.startswith("2.")
    assert environment.install([need]) == "Run: pip install 'torch>=99'"
    asked.append("nothere>=1")
    with pytest.raises(SetupError, match=r"nothere, expected nothere>=1. Run: pip install 'nothere>=1'"):
        environment.outside_tested()
