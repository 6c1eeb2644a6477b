"""Every kind of LoRA starts where it says, moves, and is saved so that it applies to the base as it was loaded."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_and_resume import outcome
from peft import PeftModel
from preflight_runs import ready, verdict_of
from rich.console import Console
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qlora_recipes import Recipe
from qlora_recipes.base.adapters import WEIGHTS, adapter_tensors, attach, load_adapter
from qlora_recipes.base.starts import distance_from_checkpoint, from_weights, takes_a_part
from qlora_recipes.deploy.choice import DEQUANTIZED, SIXTEEN_BIT
from qlora_recipes.deploy.merging import merge
from qlora_recipes.evaluation.loaded import BaseKey, restore_base, restore_run
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.memory.workload import workload_of
from qlora_recipes.preflight import Run, gradient, names
from qlora_recipes.preflight.probes import gradients, logits, probe_batch
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.run.signals import Stopped
from qlora_recipes.run.weights import adapter_file_sha256
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

Tiny = Callable[[str], Path]
RecipeFor = Callable[..., type[Recipe]]
SLOW = ("answers_end", "gradient_after_evaluation", "packing_leak", "starting_loss", "tokenizer_reloads")
DORA, PISSA, OLORA = {"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 7}}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dora nf4": ("nf4", DORA, {}),
    "dora bf16": ("bf16", DORA, {}),
    "pissa nf4": ("nf4", PISSA, {}),
    "pissa bf16": ("bf16", PISSA, {}),
    "fast pissa, patterns": ("nf4", {"init_lora_weights": "pissa_niter_4", **PATTERNS}, {}),
    "olora nf4": ("nf4", OLORA, {}),
    "loftq nf4": ("nf4", {"init_lora_weights": "loftq"}, {}),
    "loraplus nf4": ("nf4", {}, {"loraplus_lr_ratio": 4.0}),
    "patterns nf4": ("nf4", {**PATTERNS, "target_modules": "all-linear"}, {"neftune_noise_alpha": 5.0}),
    "embedding bf16": ("bf16", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
}


@pytest.fixture(scope="module")
def trained(
    tiny: Tiny, recipe_for: RecipeFor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[RunFolder, Receipt]]:
    """Return a function that trains a variant with every check, once, and returns its folder and its receipt."""
    made: dict[str, RunFolder] = {}

    def make(name: str) -> tuple[RunFolder, Receipt]:
        if name not in made:
            precision, lora, training = VARIANTS[name]
            settings = resolve(
                recipe_for(),
                model=str(tiny("llama2")),
                precision=precision,
                lora={"lora_alpha": 6, **lora},
                training=dict(learning_rate=1e-2, warmup_steps=0, logging_steps=1, **training),
                output_dir=tmp_path_factory.mktemp("run"),
            )
            made[name] = train(settings, skip_checks=SLOW, overwrite=True, console=Console(file=io.StringIO()))
        return made[name], made[name].receipt()

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_passes_its_checks_and_its_adapter_applies_to_the_base(
    name: str, trained: Callable[[str], tuple[RunFolder, Receipt]]
) -> None:
    folder, receipt = trained(name)
    verdicts = {check.name: check.verdict for check in receipt.checks}
    for check in ("gradient", "adapter_starts_at_base", "adapter_dtype", "adapter_changed", "adapter_finite"):
        assert verdicts[check] == "pass"
    assert verdicts["base_unchanged"] == verdicts["adapter_reloads"] == verdicts["optimizer_state_kept"] == "pass"
    assert adapter_file_sha256(folder.adapter / WEIGHTS) == receipt.adapter.final_sha256
    key = BaseKey.of(receipt)
    with restore_run(folder, restore_base(key), key) as run:  # which compares both hashes with the receipt's
        assert run.adapter_on_off_difference > 0


@pytest.mark.parametrize(("one", "other"), [("dora nf4", "dora bf16"), ("pissa nf4", "pissa bf16")])
def test_the_first_adapter_is_that_of_every_precision(
    one: str, other: str, trained: Callable[[str], tuple[RunFolder, Receipt]]
) -> None:
    first, second = (trained(name)[1].adapter for name in (one, other))
    assert first.initial_sha256 == second.initial_sha256
    assert first.final_sha256 != second.final_sha256


def test_receipts_tell_the_variant(trained: Callable[[str], tuple[RunFolder, Receipt]]) -> None:
    plain, patterns, dora, pissa = (
        trained(name)[1] for name in ("loraplus nf4", "patterns nf4", "dora nf4", "pissa nf4")
    )
    assert plain.settings.training["loraplus_lr_ratio"] == 4
    assert (plain.adapter.ranks, patterns.adapter.ranks) == ({"4": 14}, {"4": 12, "8": 2})
    assert pissa.adapter.ranks == {"8": 14} and pissa.adapter.parameters == plain.adapter.parameters
    assert patterns.adapter.parameters == plain.adapter.parameters + 2 * 4 * (64 + 64)
    outputs = 2 * (4 * 64 + 2 * 128 + 64)
    assert dora.adapter.parameters == plain.adapter.parameters + outputs
    assert "float32_dora_norm" in dora.repairs and "float32_dora_norm" not in pissa.repairs
    assert 8 * dora.adapter.parameters <= dora.training.optimizer_state["float32"] < 8.1 * dora.adapter.parameters


@pytest.mark.parametrize("name", ["dora nf4", "dora bf16"])
def test_doras_magnitudes_move(name: str, trained: Callable[[str], tuple[RunFolder, Receipt]]) -> None:
    folder, receipt = trained(name)
    weights = load_file(folder.adapter / WEIGHTS)
    magnitudes = {key: value for key, value in weights.items() if "magnitude" in key}
    assert len(magnitudes) == 14 and not receipt.adapter.unchanged
    assert {value.dtype for value in magnitudes.values()} == {torch.float32}
    assert any((value != value.bfloat16().float()).any() for value in magnitudes.values())


@pytest.mark.parametrize("name", ["dora nf4", "pissa bf16"])
def test_merging_writes_what_was_trained(
    name: str, trained: Callable[[str], tuple[RunFolder, Receipt]], tmp_path: Path
) -> None:
    way = DEQUANTIZED if name.endswith("nf4") else SIXTEEN_BIT  # the weights that it was trained on
    made = merge(trained(name)[0], tmp_path / "merged", base=way)
    assert 0 <= made.candidates[way].moved < 0.01


@pytest.mark.parametrize("name", ["pissa nf4", "olora nf4", "loftq nf4", "fast pissa, patterns"])
def test_what_is_saved_is_plain_lora(
    name: str, trained: Callable[[str], tuple[RunFolder, Receipt]], tiny: Tiny
) -> None:
    """PEFT would start a saved PiSSA again, on a base that it changes."""
    folder, receipt = trained(name)
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    start = receipt.settings.lora["init_lora_weights"]
    assert from_weights(start) and config["init_lora_weights"] is True
    assert config["r"] == (8 if takes_a_part(start) else 4)
    assert config["rank_pattern"] == ({"q_proj": 16} if "niter" in start else {})
    key = BaseKey.of(receipt, "bf16")
    with restore_run(folder, restore_base(key), key) as run:
        scalings = {name.split(".")[-1]: layer.scaling["default"] for name, layer in lora_layers(run.model)}
    rank = {"q_proj": 8}
    for module, scaling in scalings.items():
        alpha = 7 if module == "v_proj" else 6
        assert scaling == pytest.approx(alpha / rank.get(module, 4) ** 0.5 if "niter" in start else 6 / 4)


def lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def prepared(tiny: Tiny, recipe_for: RecipeFor, folder: Path, lora: dict[str, Any], **options: Any) -> Run:
    return ready(recipe_for(lora=dict(r=4, lora_alpha=6)), tiny("llama2"), folder, lora=lora, **options)


def test_pissa_trains_the_largest_directions_and_its_other_half_has_no_gradient(
    tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    run = prepared(tiny, recipe_for, tmp_path, PISSA)
    found = gradients(run, probe_batch(run))
    weights = load_file(tiny("llama2") / "model.safetensors")
    for name, layer in lora_layers(run.model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(a[:4], a[4:]) and torch.equal(b[:, :4], -b[:, 4:])
        assert found[f"{name}.lora_A.default.weight"][:4].any() and not found[f"{name}.lora_A.default.weight"][4:].any()
        weight = weights[f"{name.removeprefix('base_model.model.')}.weight"].float()
        left = torch.linalg.matrix_norm(weight - 1.5 * b[:, :4].detach() @ a[:4].detach(), 2)
        assert float(left) == pytest.approx(float(torch.linalg.svdvals(weight)[4]), rel=1e-3)
    assert verdict_of(gradient.gradient, run).verdict == "pass"
    for parameter in run.model.parameters():
        parameter._backward_hooks = None
    check = verdict_of(gradient.gradient, run)
    assert check.verdict == "fail" and "not frozen" in check.figure
    with torch.no_grad():
        layer.lora_B["default"].weight[:, 4:] = 0
    assert verdict_of(gradient.adapter_starts_at_base, run).verdict == "fail"


def test_loftq_starts_nearer_to_the_checkpoint_at_any_scaling(
    tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    run = prepared(tiny, recipe_for, tmp_path, {"init_lora_weights": "loftq"})
    stored, adapted = distance_from_checkpoint(run.model, None)
    assert adapted < 0.95 * stored
    for _, layer in lora_layers(run.model):
        layer.scaling["default"] *= 3  # as PEFT's, which leaves the scaling out
    assert verdict_of(gradient.adapter_starts_at_base, run).verdict == "fail"


def test_the_plan_counts_the_half_that_is_frozen(recipe_for: RecipeFor) -> None:
    ranks = [workload_of(resolve(recipe_for(), lora={"r": 4, **lora})).rank for lora in ({}, PISSA, OLORA)]
    assert ranks == [4, 8, 8]


def test_loraplus_gives_every_b_its_rate(tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path) -> None:
    run = prepared(tiny, recipe_for, tmp_path, DORA, training={"loraplus_lr_ratio": 8.0, "weight_decay": 0.1})
    weights = {id(weight): name for name, weight in run.model.named_parameters()}
    optimizer = run.trainer.create_optimizer()
    assert run.trainer.create_optimizer() is optimizer
    rates = {weights[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(rates) == 3 * 14
    assert all(rate == (2e-4 if "lora_A" in name else 8 * 2e-4) for name, rate in rates.items())
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}


@pytest.mark.parametrize("name", ["dora nf4", "loraplus nf4", "pissa nf4"])
def test_a_variant_resumes_to_the_same_bits(
    name: str, tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision, lora, training = VARIANTS[name]
    steps = dict(max_steps=4, save_strategy="steps", save_steps=2, warmup_steps=0, learning_rate=1e-2, **training)

    def go(folder: str, *, resume: bool = False) -> None:
        settings = resolve(
            recipe_for(), model=str(tiny("llama2")), precision=precision, lora=lora, training=steps,
            output_dir=tmp_path / folder,
        )  # fmt: skip
        train(settings, resume=resume, skip_checks=names(settings.recipe), console=Console(file=io.StringIO()))

    go("whole")
    plain = RunTrainer.training_step

    def stop(self: RunTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise Stopped(signal.SIGTERM, 2)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RunTrainer, "training_step", stop)
        go("stopped")
    go("stopped", resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_neftune_adds_noise_in_training_alone(tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path) -> None:
    """The noise is on from the first step to the last, and off when held-out rows are scored in between."""
    noisy = {"neftune_noise_alpha": 5.0, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    run = prepared(tiny, recipe_for, tmp_path, {}, training=noisy)
    embedding = run.model.get_input_embeddings()
    seen: list[tuple[bool, bool]] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        exact = torch.nn.functional.embedding(inputs[0], module.weight)
        seen.append((module.training, torch.equal(output, exact)))

    plain = run.trainer._run_epoch
    run.trainer._run_epoch = lambda *args, **kwargs: (embedding.register_forward_hook(look), plain(*args, **kwargs))
    run.trainer.train()
    assert {True, False} == {training for training, _ in seen}
    assert all(exact is not training for training, exact in seen)
    batch = probe_batch(run)
    assert torch.equal(logits(run, batch), logits(run, batch))


def test_experts_are_reached_by_the_name_of_their_parameter(tmp_path: Path) -> None:
    """In transformers 5 they are 3-D parameters, and no layer has the name of one."""

    def base() -> Qwen3MoeForCausalLM:
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, head_dim=16)
        heads = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
        config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)
        return Qwen3MoeForCausalLM(config).bfloat16().eval().requires_grad_(False)

    ids = torch.arange(12)[None]
    expected = base()(input_ids=ids).logits
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = attach(base(), {"r": 2, "target_modules": ["q_proj"], "target_parameters": experts}, seed=0)
    assert fuse_lora_layers(model) == 2
    assert torch.equal(model(input_ids=ids).logits, expected)
    tensors = dict(adapter_tensors(model))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32} and len(tensors) == 2 * 2 * 3
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert trained == {name for name in tensors if "lora_B" in name}
    for name, tensor in tensors.items():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 8)
    model.save_pretrained(tmp_path)
    moved = model(input_ids=ids).logits
    assert not torch.equal(moved, expected)
    assert torch.equal(load_adapter(base(), tmp_path).eval()(input_ids=ids).logits, moved)
