"""The output layer on a CPU gives what TRL's own gives, of the supervised tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preflight_runs import read
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

from qlora_recipes import Recipe
from qlora_recipes.kernels import attention, output_layer
from qlora_recipes.kernels.output_layer import CACHED, TOKENS, LogProbs
from qlora_recipes.memory import step
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.training import build
from qlora_recipes.training.build import build_trainer, load_model
from qlora_recipes.training.trainer import RunTrainer

COUNTS = [1, CACHED - 1, CACHED + 1, TOKENS - 1, TOKENS, TOKENS + 1]
OUTPUTS = ("entropy", "is_top1")
FUNCTIONS = {"here": LogProbs, "upstream": ChunkedLogProbFunction}


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put TRL's own back, which any trainer of this package has replaced, and again after the test."""
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)


def drawn(count: int, dtype: torch.dtype, *, biased: bool = False, words: int = 300) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(count)
    return {
        "hidden": torch.randn(count, 24, generator=draw).to(dtype),
        "weight": (torch.randn(words, 24, generator=draw) / 2).to(dtype),
        "bias": torch.randn(words, generator=draw).to(dtype) if biased else None,
        "labels": torch.randint(words, (count,), generator=draw),
        "upstream": torch.randn(count, generator=draw),
    }


def scored(function: type[torch.autograd.Function], given: dict[str, Any]) -> dict[str, torch.Tensor]:
    hidden = given["hidden"].clone().requires_grad_()
    arguments = (given["weight"], given["bias"], given["labels"], 1.0, 64, None, 1.0, OUTPUTS)
    log_probs, entropy, sums, means, is_top1 = function.apply(hidden, *arguments)
    assert sums is means is None
    log_probs.backward(given["upstream"])
    return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "top1": is_top1, "gradient": hidden.grad}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_float32_gives_what_trl_gives(count: int, biased: bool) -> None:
    given = drawn(count, torch.float32, biased=biased)
    found, expected = (scored(function, given) for function in FUNCTIONS.values())
    for name in ("log_probs", "entropy", "gradient"):
        assert found[name].dtype == expected[name].dtype == torch.float32
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5), name
    assert torch.equal(found["top1"], expected["top1"])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_16_bits_are_as_near_to_the_formula_as_trl_is(count: int, biased: bool) -> None:
    given = drawn(count, torch.bfloat16, biased=biased)
    exact = {
        name: part.double() if torch.is_floating_point(part) else part
        for name, part in given.items()
        if part is not None
    }
    hidden = exact["hidden"].requires_grad_()
    log_probs = (hidden @ exact["weight"].T + exact.get("bias", 0)).log_softmax(-1)
    of_labels = log_probs.gather(1, given["labels"][:, None]).squeeze(1)
    of_labels.backward(exact["upstream"])
    expected = {
        "log_probs": of_labels,
        "entropy": -(log_probs * log_probs.exp()).sum(-1),
        "gradient": hidden.grad,
    }
    found, upstream = (scored(function, given) for function in FUNCTIONS.values())
    for name, part in expected.items():
        ours, theirs = ((one[name] - part).norm() / part.norm() for one in (found, upstream))
        assert found[name].dtype == upstream[name].dtype
        assert ours < max(1.5 * theirs, 0.004), (name, float(ours), float(theirs))


def test_float32_hidden_states_are_multiplied_in_the_weights_dtype() -> None:
    given = {**drawn(40, torch.bfloat16), "hidden": drawn(40, torch.float32)["hidden"]}
    found = scored(LogProbs, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as TRL computes them while training
        expected = scored(ChunkedLogProbFunction, given)
    assert found["gradient"].dtype == expected["gradient"].dtype == torch.float32
    for name in ("log_probs", "entropy"):
        assert torch.allclose(found[name], expected[name], atol=1e-4), name
    assert float((found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()) < 0.01


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [-1.0], [2.0]])
    given = {
        "hidden": torch.ones(5, 1),
        "weight": weight,
        "bias": None,
        "labels": torch.arange(5),
        "upstream": torch.ones(5),
    }
    found, expected = (scored(function, given)["top1"] for function in FUNCTIONS.values())
    assert found.tolist() == expected.tolist() == [False, True, False, False, False]


def test_logits_that_round_to_equal_ones_are_ties_as_trls() -> None:
    given = drawn(200, torch.bfloat16, words=4000)
    given["hidden"] = given["hidden"] / 64  # so that most of the words share a few logits
    given["weight"][:2000] = given["weight"][2000:]
    given["labels"] = (given["hidden"] @ given["weight"].T).argmax(-1)
    given["labels"][::2] = (given["labels"][::2] + 2000) % 4000  # its twin, which is as likely and not the first
    found, expected = (scored(function, given)["top1"] for function in FUNCTIONS.values())
    assert torch.equal(found, expected)
    assert found.any()
    assert not found.all()


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn(TOKENS + 3, torch.float32)
    made: list[tuple[int, ...]] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(
        output_layer.torch, "empty_like", lambda part, **kw: made.append(part.shape) or empty_like(part, **kw)
    )
    arguments = (given["weight"], None, given["labels"], 1.0, 64, None, 1.0, OUTPUTS)
    found = LogProbs.apply(given["hidden"], *arguments)
    assert made == []
    assert not found[0].requires_grad
    again = LogProbs.apply(given["hidden"].clone().requires_grad_(), *arguments)
    assert made == [(TOKENS + 3, 24)]
    assert torch.equal(found[0], again[0])
    assert again[0].requires_grad
    assert not again[1].requires_grad  # the entropy, which is only logged


def test_nothing_is_written_into_what_is_given() -> None:
    given = drawn(50, torch.bfloat16, biased=True)
    before = {name: part.clone() for name, part in given.items()}
    scored(LogProbs, given)
    assert all(torch.equal(part, before[name]) for name, part in given.items())


@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(0.5, None, 1.0), (1.0, 2.0, 1.0), (1.0, None, 0.25)])
def test_other_logits_than_plain_ones_are_left_to_trl(temperature: float, softcap: float | None, scale: float) -> None:
    given = drawn(20, torch.float32)
    arguments = (given["weight"], None, given["labels"], temperature, 64, softcap, scale, OUTPUTS)
    output_layer.score_supervised_tokens()
    found = utils._ChunkedLogProbFunction.apply(given["hidden"], *arguments)
    expected = ChunkedLogProbFunction.apply(given["hidden"], *arguments)
    assert torch.equal(found[0], expected[0])
    assert not torch.allclose(found[0], LogProbs.apply(given["hidden"], *arguments)[0])


def test_more_than_an_sft_trainer_asks_for_is_left_to_trl() -> None:
    given = drawn(20, torch.float32)
    output_layer.score_supervised_tokens()
    others = (given["labels"], 1.0, 64, None, 1.0)
    found = utils._ChunkedLogProbFunction.apply(
        given["hidden"], given["weight"], None, *others, ("mean_logits", "log_sum_sq_probs")
    )
    assert found[2].shape == found[3].shape == (20,)
    trained = given["weight"].clone().requires_grad_()
    utils._ChunkedLogProbFunction.apply(given["hidden"], trained, None, *others, OUTPUTS)[0].sum().backward()
    assert trained.grad.any()


def trainer_of(recipe: type[Recipe], model: Path, folder: Path) -> RunTrainer:
    trainer = build_trainer(load_model(read(recipe, model, output_dir=folder, precision="bf16")), RunFolder(folder))
    trainer.current_gradient_accumulation_steps = 1  # which the loop would set
    return trainer


def one_step(trainer: RunTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a trainer's first batch, and the gradients that it gives the adapter."""
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start, where A would have no gradient
            weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.training_step(trainer.model, inputs)
    return float(loss), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_a_step_is_that_of_trls_own_way(
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    forward = output_layer._ByDevice.apply
    monkeypatch.setattr(
        output_layer._ByDevice, "apply", lambda hidden, *rest: seen.append(len(hidden)) or forward(hidden, *rest)
    )
    here = one_step(trainer_of(recipe_for(family), tiny(family), tmp_path / "here"))
    assert utils._ChunkedLogProbFunction is output_layer._ByDevice
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    monkeypatch.setattr(build, "score_supervised_tokens", lambda: None)
    upstream = one_step(trainer_of(recipe_for(family), tiny(family), tmp_path / "upstream"))
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert len(seen) == 1
    assert here[0] == pytest.approx(upstream[0], rel=1e-3)
    assert here[1].keys() == upstream[1].keys()
    for name, gradient in here[1].items():
        assert float((gradient - upstream[1][name]).norm() / upstream[1][name].norm()) < 0.02, name


def test_only_supervised_tokens_are_scored(
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of(recipe_for(), tiny("llama2"), tmp_path)
    seen: list[torch.Tensor] = []
    forward = output_layer._ByDevice.apply
    monkeypatch.setattr(
        output_layer._ByDevice, "apply", lambda hidden, *rest: seen.append(rest[2]) or forward(hidden, *rest)
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    supervised = inputs["labels"][inputs["labels"] != -100]
    one_step(trainer)
    assert 0 < len(supervised) < inputs["labels"].numel()
    assert torch.equal(seen[0], supervised)


def test_a_row_without_a_supervised_token_gives_zero(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> None:
    trainer = trainer_of(recipe_for(), tiny("llama2"), tmp_path)
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = trainer.training_step(trainer.model, inputs)
    assert float(loss) == 0
    gradients = [weight.grad for weight in trainer.model.parameters() if weight.requires_grad]
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_no_tokens_are_no_log_probabilities() -> None:
    given = {**drawn(1, torch.bfloat16), "hidden": torch.empty(0, 24, dtype=torch.bfloat16)}
    found = scored(LogProbs, {**given, "labels": given["labels"][:0], "upstream": given["upstream"][:0]})
    assert [len(part) for part in found.values()] == [0, 0, 0, 0]


def test_upstream_scores_every_position_on_a_cpu() -> None:
    """What TRL 1.16 does without a GPU, for which `output_layer.py` is there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(config)
    seen: list[int] = []

    class Noted:
        @staticmethod
        def apply(hidden: torch.Tensor, *arguments: Any) -> Any:
            seen.append(len(hidden))
            return ChunkedLogProbFunction.apply(hidden, *arguments)

    utils.add_fused_lm_head(model)
    ids, labels = torch.arange(20)[None], torch.full((1, 20), -100)
    labels[0, 15:] = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", Noted)
        model(input_ids=ids, labels=labels, fused_lm_head=True)
        output_layer.score_supervised_tokens()
        patch.setattr(utils, "_ChunkedLogProbFunction", Noted)
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    mended = "upstream scores supervised tokens alone on a CPU: look whether output_layer.py still gains anything"
    assert seen[0] == 19, mended
    assert seen[1] == 5


def test_the_memory_plan_knows_the_same_tiles() -> None:
    assert (step.TILE_TOKENS, step.TILE_CACHED) == (TOKENS, CACHED)
    assert (step.SHORT, step.KEPT, step.BLOCK) == (attention.SHORT, attention.KEPT, attention.BLOCK)
