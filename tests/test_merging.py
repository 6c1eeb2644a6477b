"""An adapter merged into the weights that lose the least: what is written, what is chosen, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deploy_runs import LINEAR_LAYERS, MODEL, deploy_run, single_turns
from fake_runs import make_run
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_recipes.base.adapters import attach
from qlora_recipes.base.checkpoint import weight_files
from qlora_recipes.base.loading import load_base
from qlora_recipes.chat_templates import without_markers
from qlora_recipes.commands import merge as command
from qlora_recipes.deploy import choice, weights
from qlora_recipes.deploy.choice import DEQUANTIZED, SIXTEEN_BIT
from qlora_recipes.deploy.merging import merge
from qlora_recipes.deploy.mixing import restore_runs
from qlora_recipes.errors import CheckError, DataError, ModelError, RunFolderError, UsageError
from qlora_recipes.evaluation.loaded import BaseKey, restore_base, restore_run
from qlora_recipes.kernels.dequantize import dequantized, is_4bit
from qlora_recipes.precision import precision_named
from qlora_recipes.run.files import write_json
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import model_location

RANK = 64


def correct_the_quantization(model: Any) -> None:
    """Make the adapter what 4 bits took from each weight, as far as its rank allows."""
    files = weight_files(MODEL, None)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            key = name.removeprefix("base_model.model.") + ".weight"
            with safe_open(files[key], "pt") as stored:
                lost = stored.get_tensor(key).float() - dequantized(layer.get_base_layer()).float()
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            layer.lora_A["default"].weight.copy_(v[:RANK])
            layer.lora_B["default"].weight.copy_(u[:, :RANK] * s[:RANK] / layer.scaling["default"])


@pytest.fixture(scope="module")
def correcting(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("merging") / "correcting"
    lora = {"r": RANK, "lora_alpha": RANK}
    return deploy_run(folder, [], single_turns(40), precision="fp4", change=correct_the_quantization, lora=lora)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    rows = single_turns(200)
    return deploy_run(tmp_path_factory.mktemp("merging") / "plain", rows[40:], rows[:40], precision="fp4", steps=8)


def test_an_adapter_that_corrects_the_quantization_goes_into_the_dequantized_weights(
    correcting: RunFolder, tmp_path: Path
) -> None:
    made = merge(correcting, tmp_path / "merged")
    assert made.merged_into == DEQUANTIZED and "it needs 0.0" in made.because
    assert made.candidates[DEQUANTIZED].moved < made.candidates[SIXTEEN_BIT].moved / 5
    assert "does not matter" in made.verdict


def test_an_adapter_that_does_not_goes_into_the_16_bit_base(plain: RunFolder, tmp_path: Path) -> None:
    made = merge(plain, tmp_path / "merged")
    assert made.merged_into == SIXTEEN_BIT and "on text the difference is a gain" in made.verdict
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == json.loads(json.dumps(asdict(made)))
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]


@torch.no_grad()
def test_the_merged_folder_answers_as_the_run_in_plain_transformers(
    plain: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([str(plain.path), "--base", "dequantized", "--output", str(tmp_path / "merged")])
    said = capsys.readouterr().out
    assert "dequantized weights, bfloat16, because no other was asked for" in said and "ms merged" in said
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    key = BaseKey.of(plain.receipt())
    with restore_run(plain, restore_base(key), key) as run:
        assert tokenizer.chat_template == without_markers(run.tokenizer.chat_template)
        ids = torch.tensor([run.encoder.encode(run.held_out[0].messages).input_ids])
        with_adapter, merged = (one(input_ids=ids).logits.float() for one in (run.model, model))
        with run.model.disable_adapter():
            without = run.model(input_ids=ids).logits.float()
    assert (merged - with_adapter).square().mean() < 1e-3 * (without - with_adapter).square().mean()


@pytest.mark.parametrize("name", ["nf4", "nf4-single", "fp4"])
def test_dequantized_weights_are_those_that_were_trained_on_to_the_bit(name: str) -> None:
    precision, files = precision_named(name), weight_files(MODEL, None)
    base, *_ = load_base(MODEL, None, precision, "bfloat16", device=torch.device("cpu"))
    layers = {f"{name}.weight": module for name, module in base.named_modules() if is_4bit(module)}
    assert len(layers) == base_count(base)
    for weight, layer in layers.items():
        with safe_open(files[weight], "pt") as stored:
            again = weights.quantized_and_back(stored.get_tensor(weight).to(torch.bfloat16), precision)
        assert torch.equal(again, dequantized(layer))


def base_count(base: Any) -> int:
    return len(LINEAR_LAYERS) * base.config.num_hidden_layers


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(model_location(MODEL)).save_pretrained(folder, max_shard_size="500KB")
    return folder


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_every_shard_has_what_peft_would_merge(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any]
) -> None:
    base, *_ = load_base(str(sharded), None, precision_named("bf16"), "bfloat16", device=torch.device("cpu"))
    model = attach(base, {"r": 4, "lora_alpha": 16, "target_modules": LINEAR_LAYERS, **lora}, 0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn(weight.shape))
    files = weight_files(str(sharded), None)
    written: list[set[str]] = []
    real = weights.save_file
    monkeypatch.setattr(
        weights, "save_file", lambda tensors, *a, **k: written.append(set(tensors)) or real(tensors, *a, **k)
    )
    weights.write_merged(files, weights.read_changes(model, files), tmp_path / "merged", torch.bfloat16)
    assert len(written) == len(set(files.values())) > 3  # one at a time, and each once
    assert sum(map(len, written)) == len(files)
    expected = {name: weight.float() for name, weight in model.merge_and_unload().state_dict().items()}
    for shard in (tmp_path / "merged").glob("*.safetensors"):
        for name, weight in load_file(shard).items():
            torch.testing.assert_close(weight.float(), expected[name], rtol=2**-6, atol=2**-10)
    weights.write_configuration(sharded, tmp_path / "merged", "bfloat16", 2)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # by its index
    assert weights.merged_bytes(files, torch.bfloat16) == sum(w.numel() * 2 for w in expected.values())


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ["embed_tokens"]}, "the adapter trains .*lora_embedding_A"),
        ({"trainable_token_indices": [5]}, "the adapter trains .*trainable_tokens"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(tiny: Callable[[str], Path], lora: dict[str, Any], said: str) -> None:
    folder = str(tiny("llama2"))
    base, *_ = load_base(folder, None, precision_named("bf16"), "bfloat16", device=torch.device("cpu"))
    model = attach(base, {"r": 2, "target_modules": ["q_proj"], **lora}, 0)
    with pytest.raises(UsageError, match=said):
        weights.read_changes(model, weight_files(folder, None))


def test_a_weight_that_the_checkpoint_does_not_have_is_named(tiny: Callable[[str], Path]) -> None:
    folder = str(tiny("llama2"))
    base, *_ = load_base(folder, None, precision_named("bf16"), "bfloat16", device=torch.device("cpu"))
    model = attach(base, {"r": 2, "target_modules": ["lm_head"]}, 0)
    files = {name: file for name, file in weight_files(folder, None).items() if name != "lm_head.weight"}  # tied
    with pytest.raises(UsageError, match=r"the checkpoint has no lm_head\.weight"):
        weights.read_changes(model, files)


def full(tensors: object, file: Path, **_: object) -> None:
    file.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def lost(update: object, weight: torch.Tensor) -> torch.Tensor:
    return weight.float()


def overflown(update: object, weight: torch.Tensor) -> torch.Tensor:
    return weight.float() * float("nan")


@pytest.mark.parametrize(
    ("target", "name", "value", "error", "said"),
    [
        (weights, "save_file", full, RunFolderError, "cannot be written: .*No space left on device.*Free some space"),
        (
            shutil,
            "disk_usage",
            lambda _: SimpleNamespace(free=10**6),
            RunFolderError,
            "has 0.0 GB free, expected 0.0 GB",
        ),
        (weights.Update, "applied", lost, CheckError, "bits per byte from the run, and the adapter itself makes"),
        (weights.Update, "applied", overflown, CheckError, "the model gives no finite figures in bfloat16"),
    ],
    ids=["full disk", "too small a disk", "lost adapter", "overflow"],
)
def test_a_merge_that_fails_leaves_nothing(
    plain: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: object,
    name: str,
    value: object,
    error: type[Exception],
    said: str,
) -> None:
    monkeypatch.setattr(target, name, value)
    with pytest.raises(error, match=said):
        merge(plain, tmp_path / "merged", base="dequantized")
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_gone_is_one_error(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny("llama2"), tmp_path / "base"))
    run = deploy_run(tmp_path / "run", [], single_turns(2), model=str(base), precision="bf16")
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=f"cannot load {base}"):
        merge(run, tmp_path / "merged")
    with pytest.raises(ModelError, match=f"cannot load {base}"), restore_runs([run]):
        pass
    assert list(tmp_path.iterdir()) == [run.path]


def test_a_merge_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path, "bf16"))
    with pytest.raises(UsageError, match="--base dequantized is for 4-bit runs, and this one is bf16"):
        merge(run, tmp_path / "merged", base="dequantized")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt has no words"):
        merge(run, tmp_path / "merged", text=tmp_path / "empty.txt")


def test_what_is_known_of_experts_is_said_before_the_base_is_loaded(tmp_path: Path) -> None:
    """Dequantized weights would have 16-bit experts; an adapter on them has no weight of the checkpoint to go into."""
    run = RunFolder(make_run(tmp_path, "nf4"))
    receipt = run.receipt()
    receipt.base.linears["Experts4bit"] = 2
    write_json(run.path / "run.json", asdict(receipt))
    with pytest.raises(UsageError, match=r"--base dequantized: 4-bit experts .* Expected --base 16bit"):
        merge(run, tmp_path / "merged", base="dequantized")
    receipt.settings.lora["target_parameters"] = ["experts.down_proj"]
    write_json(run.path / "run.json", asdict(receipt))
    with pytest.raises(UsageError, match=r"target_parameters.* cannot be merged"):
        merge(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [run.path]


def paired(sixteen: float, dequantized: float, count: int) -> tuple[Any, Any, choice.Documents]:
    noise = np.random.default_rng(0).normal(0, 0.1, count)
    sizes = {choice.HELD_OUT: np.full(count, 10)}
    asked = choice.Documents({}, sizes)
    return {choice.HELD_OUT: 10 + sixteen + noise}, {choice.HELD_OUT: 10 + dequantized + 0 * noise}, asked


@pytest.mark.parametrize(
    ("figures", "chosen", "why"),
    [
        ((-1.0, 0.0, 40), SIXTEEN_BIT, "needs 0.* bits per byte less on 40 documents"),
        ((1.0, 0.0, 40), DEQUANTIZED, "needs 0.0994 bits per byte less on 40 documents"),
        ((0.0, 0.0, 40), DEQUANTIZED, "no difference between the two is shown"),
        ((-1.0, 0.0, 5), DEQUANTIZED, "no difference between the two is shown"),
    ],
)
def test_the_choice_needs_an_interval_without_zero(figures: tuple[float, float, int], chosen: str, why: str) -> None:
    better, because = choice.choose(*paired(*figures))
    assert better == chosen and re.search(why, because)


@pytest.mark.parametrize(
    ("more", "said"),
    [(0.01, "does not matter"), (2.0, "matters: keep the adapter"), (-2.0, "is a gain"), (None, "too few documents")],
)
def test_whether_a_loss_matters_is_said(more: float | None, said: str) -> None:
    loss = {} if more is None else choice.compared(*paired(more, 0.0, 40))
    assert said in choice.in_words(loss)
