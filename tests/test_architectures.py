"""What other architectures have of their own: found, repaired or refused by what is in memory, not by their names."""

from __future__ import annotations

import copy
import io
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
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qlora_recipes import Recipe
from qlora_recipes.base import repairs
from qlora_recipes.base.adapters import adapter_sha256, add_adapter, attach
from qlora_recipes.base.checkpoint import layer_errors
from qlora_recipes.base.loading import base_sha256, load_base
from qlora_recipes.deploy.merging import merge
from qlora_recipes.deploy.mixing import restore_runs
from qlora_recipes.errors import QuantizationError, UsageError
from qlora_recipes.kernels import attention
from qlora_recipes.kernels.dequantize import dequantized, expand, is_4bit
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.kernels.output_layer import score_supervised_tokens
from qlora_recipes.memory.estimate import plan
from qlora_recipes.precision import precision_named, quantization_config
from qlora_recipes.preflight import gradient, weights
from qlora_recipes.preflight.probes import keeps_apart
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.signals import Stopped
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

Small = Callable[[str], Path]
RecipeFor = Callable[..., type[Recipe]]
CPU = torch.device("cpu")
MIXTURES = ("qwen3_moe", "gpt_oss", "mixtral", "olmoe")
EXPERTS = dict(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])


def load(folder: Path, precision: str = "nf4") -> Any:
    return load_base(str(folder), None, precision_named(precision), "bfloat16", device=CPU)


def as_stored(packed: nn.Module, folder: Path) -> Any:
    """Return the 16-bit base with the numbers that a 4-bit one multiplies by."""
    plain, _, _ = load(folder, "bf16")
    for name, module in packed.named_modules():
        if isinstance(module, ParametrizationList):
            plain.get_parameter(name.replace("parametrizations.", "")).data = module[0](module.original)
        elif is_4bit(module):
            plain.get_parameter(f"{name}.weight").data = dequantized(module)
    return plain


def of_a_pass(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return logits and gradients in training mode; the embedding is trained, so that all of a base is passed."""
    ids = torch.arange(20, 80)[None]
    model.get_input_embeddings().weight.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.train()(input_ids=ids, labels=ids)
    found.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"logits": found.logits.detach(), **gradients}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_are_quantized_while_loading_and_compute_with_their_numbers(mixture: str, small: Small) -> None:
    base, receipt, made = load(small(mixture))
    assert "quantize_experts" in made
    assert receipt.linears == {"Linear4bit": 8, "Experts4bit": 4}
    assert (receipt.quantized.expected, receipt.quantized.found, receipt.quantized.share) == (12, 12, 1.0)
    assert sum(receipt.parameters_by_storage.values()) == receipt.parameters
    errors = dict(layer_errors(base, {}, torch.bfloat16))
    assert len(errors) == 4 and all(0.05 < error < 0.12 for error in errors.values())
    plain = of_a_pass(as_stored(base, small(mixture)))
    packed = of_a_pass(base)
    expand(base, torch.bfloat16)
    base.zero_grad()
    for found in (packed, of_a_pass(base)):
        assert found.keys() == plain.keys()
        assert all(torch.equal(part, plain[name]) for name, part in found.items())
    assert base_sha256(base) == receipt.sha256


def test_experts_stay_in_16_bits_without_the_repair(small: Small) -> None:
    config = quantization_config(precision_named("nf4"), "bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(
        small("qwen3_moe"), quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    stack = plain.model.layers[0].mlp.experts.gate_up_proj
    assert stack.dtype == torch.bfloat16, "upstream quantizes experts: see whether repairs.quantize_experts can go"


def test_int8_is_refused_for_experts(small: Small) -> None:
    with pytest.raises(QuantizationError, match=r"has 4 stacks of fused experts .* Use --precision nf4 or bf16"):
        load(small("qwen3_moe"), "int8")


@pytest.mark.parametrize("mixture", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_4_bit_experts_train_as_on_the_same_numbers_in_16_bits(mixture: str, small: Small) -> None:
    base, receipt, _ = load(small(mixture))
    other = as_stored(base, small(mixture))
    before = of_a_pass(base)["logits"]
    base.get_input_embeddings().weight.requires_grad_(False)
    found: list[dict[str, torch.Tensor]] = []
    for model in (base, other):
        adapted: PeftModel = attach(model, EXPERTS, seed=0)
        fuse_lora_layers(adapted)
        found.append({"initial": adapter_sha256(adapted)})
        if model is base:
            assert torch.equal(of_a_pass(adapted)["logits"], before)  # it starts at the base
            adapted.zero_grad()
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        found[-1] |= of_a_pass(adapted)
    one, two = found
    assert one.pop("initial") == two.pop("initial")
    assert len(one) == 14  # logits, the embedding, and A and B of three modules in each of two layers
    assert all(part.any() and torch.equal(part, two[name]) for name, part in one.items())
    assert base_sha256(base) == receipt.sha256


def test_matrices_that_are_passed_over_are_named_with_their_share(
    small: Small,
    recipe_for: RecipeFor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repairs.experts, "stacks", lambda model: [])
    run = ready(recipe_for(lora=dict(r=4, target_modules=["q_proj"])), small("qwen3_moe"), tmp_path / "run")
    check = verdict_of(weights.quantized_linears, run)
    assert check.verdict == "fail"
    assert "8 of 12 as nf4 (8 Linear4bit, 4 Qwen3MoeExperts), 33.3% of their weights; not model.layers" in check.figure


@torch.no_grad()
def leak(model: nn.Module) -> float:
    first, other, second = (torch.arange(begin, begin + 300) for begin in (20, 400, 800))
    positions = torch.arange(300).repeat(2)[None]
    one, two = (
        model(input_ids=torch.cat([part, second])[None], position_ids=positions, use_cache=False).logits[0, 300:]
        for part in (first, other)
    )
    return float((one - two).abs().max())


def test_gpt_oss_keeps_packed_conversations_apart_by_the_repair_alone(
    small: Small,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, _, made = load(small("gpt_oss"), "bf16")
    assert "separate_packed" in made
    assert leak(base.eval()) == 0
    kind = type(base.base_model)
    monkeypatch.setattr(kind, "forward", kind.forward.__wrapped__)
    assert leak(base) > 1e-3, "upstream has fixed what repairs.separate_packed is for in gpt-oss"


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "gpt_oss", "mistral", "phi3"])
def test_attention_by_conversation_is_the_models_own(architecture: str, small: Small) -> None:
    """Sinks, a bound on scores, windows shorter and longer than a conversation, and heads of another size."""
    own, ours = (
        AutoModelForCausalLM.from_pretrained(small(architecture), dtype=torch.float32, attn_implementation=kind)
        for kind in ("eager", attention.NAME)
    )
    for lengths in ([300, 320], [120, 100, 127, 128, 90], [40, 30], [600]):
        ids = torch.arange(20, 20 + sum(lengths))[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        one, two = (model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False) for model in (own, ours))
        torch.testing.assert_close(one.logits, two.logits, atol=2e-5, rtol=0)
        one, two = (
            torch.autograd.grad(found.loss, model.get_input_embeddings().weight)
            for found, model in ((one, own), (two, ours))
        )
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere", "phi"])
def test_the_loss_is_the_models_own(architecture: str, small: Small) -> None:
    """A bound on the logits, a factor and a bias of the output layer."""
    score_supervised_tokens()
    model = AutoModelForCausalLM.from_pretrained(small(architecture), dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(20, 60)[None]
    labels = torch.where(torch.arange(40) < 10, -100, ids)
    fused = copy.deepcopy(model).requires_grad_(False)
    add_fused_lm_head(fused)
    found = []
    for each, others in ((model, {}), (fused, {"fused_lm_head": True})):
        embedded = each.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = each(inputs_embeds=embedded, labels=labels, use_cache=False, **others).loss
        found.append((loss, torch.autograd.grad(loss, embedded)[0]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["lfm2", "mamba"])
def test_a_model_that_mixes_along_time_otherwise_is_not_packed(
    architecture: str,
    small: Small,
    recipe_for: RecipeFor,
    tmp_path: Path,
) -> None:
    base, _, _ = load(small(architecture), "bf16")
    assert not keeps_apart(base)
    if architecture == "lfm2":
        run = ready(recipe_for(lora=dict(r=4, target_modules=["w1"])), small(architecture), tmp_path / "run")
        check = verdict_of(gradient.packing_leak, run)
        assert check.verdict == "pass"
        assert check.figure == "not packed, because this model would mix conversations of one row; one a row"
        assert verdict_of(gradient.gradient, run).verdict == "pass"


def test_packing_that_was_asked_for_is_refused_where_a_model_would_mix(
    small: Small, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    recipe = recipe_for(lora=dict(r=4, target_modules=["w1"]))
    for asked in ({"packing": True}, {"packing": False, "padding_free": True}):
        with pytest.raises(UsageError, match="Lfm2ForCausalLM does not keep conversations apart that share a row"):
            ready(recipe, small("lfm2"), tmp_path / "run", training=asked)
    run = ready(recipe, small("lfm2"), tmp_path / "run", training={"packing": False})
    assert not run.trainer.padding_free


def test_a_model_that_is_not_packed_trains_and_says_so(small: Small, recipe_for: RecipeFor, tmp_path: Path) -> None:
    recipe = recipe_for(lora=dict(r=4, target_modules=["w1"]))
    settings = resolve(recipe, model=str(small("lfm2")), dataset=recipe.dataset.source, output_dir=tmp_path / "run")
    said = io.StringIO()
    receipt = train(settings, skip_checks=["answers_end"], console=Console(file=said, width=200)).receipt()
    assert receipt.training.padding_share > 0
    assert "each conversation gets a row, because this model would mix those that share one" in said.getvalue()


@pytest.mark.parametrize("mixture", ["gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_an_adapter_of_experts_is_trained_resumed_and_restored_to_the_bit(
    mixture: str, small: Small, recipe_for: RecipeFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every check but that of answers, that of the reloaded adapter among them."""
    steps = dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2, warmup_steps=0)

    def go(folder: str, **options: Any) -> RunFolder:
        settings = resolve(
            recipe_for(lora=EXPERTS), model=str(small(mixture)), training=steps, output_dir=tmp_path / folder
        )
        made = train(settings, skip_checks=["answers_end"], console=Console(file=io.StringIO()), **options)
        receipt, planned = made.receipt(), plan(settings).training
        assert planned.adapter == 4 * receipt.adapter.parameters
        assert planned.base == pytest.approx(receipt.base.bytes, rel=0.005)
        return made

    whole = go("whole")
    receipt = whole.receipt()
    assert receipt.adapter.targets == ["down_proj", "gate_up_proj", "q_proj"]
    assert receipt.adapter.unchanged == []
    plain = RunTrainer.training_step

    def stop(self: RunTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise Stopped(signal.SIGTERM, 2)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RunTrainer, "training_step", stop)
        go("stopped")
    go("stopped", resume=True)
    assert outcome(tmp_path / "stopped") == outcome(whole.path)
    with restore_runs([whole]) as runs:  # proves the adapter's hash
        ids = torch.arange(20, 60)[None]
        expected = runs.model(input_ids=ids).logits
        assert list(add_adapter(runs.model, whole.adapter, "again").unexpected_keys) == []
        runs.model.set_adapter("again")
        assert torch.equal(runs.model(input_ids=ids).logits, expected)
        with runs.only("base"):
            assert not torch.equal(runs.model(input_ids=ids).logits, expected)
    with pytest.raises(UsageError, match=r"trains parameters \(target_parameters\)"):
        merge(whole, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_random_weight_of_a_block_is_refused(small: Small, recipe_for: RecipeFor, tmp_path: Path) -> None:
    run = ready(recipe_for(lora=dict(r=4, target_modules=["q_proj"])), small("qwen2"), tmp_path / "run")
    assert verdict_of(weights.checkpoint_names, run).verdict == "pass"
    run.base.missing_keys = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    check = verdict_of(weights.checkpoint_names, run)
    assert check.verdict == "fail"
    assert "model.layers.0.mlp.up_proj.weight first" in check.figure
