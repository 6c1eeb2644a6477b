"""Attention by conversation against plain arithmetic in float64, and through real models against PyTorch's own."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_repairs import mended
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.falcon import modeling_falcon

from qlora_recipes.base import repairs
from qlora_recipes.kernels import attention
from qlora_recipes.kernels.attention import BLOCK, NAME, SHORT

Tiny = Callable[[str], Path]
Tensors = list[torch.Tensor]
HEADS = [(4, 4), (4, 2), (3, 1)]
"""Query and key heads: as many, grouped, one for all."""
LENGTHS = [[1], [BLOCK - 1], [BLOCK], [BLOCK + 1], [1, 1, 5, 1], [BLOCK + 1, 1, BLOCK, BLOCK - 1], [2 * BLOCK + 3, 7]]


def bounds_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(lengths: Sequence[int], heads: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensors:
    """Return query, key, value, and a gradient of the output, which is [batch, tokens, heads, size]."""
    draw = torch.Generator().manual_seed(sum(lengths) + sum(heads))
    tokens, size = sum(lengths), 16
    shapes = [(1, heads[0], tokens, size), *[(1, heads[1], tokens, size)] * 2, (1, tokens, heads[0], size)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def dense_mask(bounds: torch.Tensor) -> torch.Tensor:
    """Return which token sees which: causal blocks on the diagonal."""
    conversation = torch.bucketize(torch.arange(int(bounds[-1])), bounds[1:].long(), right=True)
    return (conversation[:, None] == conversation[None]).tril()


def scored(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attend by the formula: softmax(q k^T / sqrt(size)) v, pair by pair."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attend as PyTorch does with a dense mask."""
    found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return found.transpose(1, 2)


def by_conversation(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor | None
) -> torch.Tensor:
    return attention.attention(torch.nn.Identity(), query, key, value, bounds)[0]


def with_gradients(
    function: Callable[..., torch.Tensor], parts: Tensors, where: torch.Tensor, *, autocast: bool = False
) -> Tensors:
    """Return the output of a function, and the gradients of query, key and value, all in float64."""
    leaves = [part.clone().requires_grad_() for part in parts[:3]]
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        output = function(*leaves, where)
    output.backward(parts[3].to(output.dtype))
    return [output.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def errors(found: Tensors, expected: Tensors) -> list[float]:
    """Return how far each tensor is off, as a share of its norm."""
    return [float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradients_are_those_of_the_formula(lengths: list[int], heads: tuple[int, int]) -> None:
    parts, bounds = inputs(lengths, heads), bounds_of(lengths)
    expected = with_gradients(scored, [part.double() for part in parts], dense_mask(bounds))
    assert max(errors(with_gradients(by_conversation, parts, bounds), expected)) < 2e-6


@pytest.mark.parametrize("heads", HEADS)
def test_a_row_of_one_conversation_needs_no_bounds(heads: tuple[int, int]) -> None:
    parts = inputs([BLOCK + 9], heads)
    for one, other in zip(
        with_gradients(by_conversation, parts, None),
        with_gradients(by_conversation, parts, bounds_of([BLOCK + 9])),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_another_scale_than_the_heads_is_taken() -> None:
    query, key, value, _ = inputs([20], (2, 2))
    found = attention.attention(torch.nn.Identity(), query, key, value, bounds_of([20]), scaling=0.5)[0]
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[300], [70, BLOCK, 1, BLOCK + 1]], ids=str)
def test_16_bits_are_as_near_as_pytorch_is(lengths: list[int], heads: tuple[int, int]) -> None:
    parts, bounds = inputs(lengths, heads, torch.bfloat16), bounds_of(lengths)
    mask = dense_mask(bounds)
    expected = with_gradients(scored, [part.double() for part in parts], mask)
    ours = errors(with_gradients(by_conversation, parts, bounds), expected)
    theirs = errors(with_gradients(fused, parts, mask), expected)
    assert all(one < 1.5 * other for one, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_probabilities_of_short_conversations_are_kept_and_are_those_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths, found = [BLOCK + 9, 40, 2 * BLOCK + 1], []
    parts, bounds = inputs(lengths, (4, 2), torch.bfloat16), bounds_of(lengths)
    for longest, kept in ((0, 0), (BLOCK + 9, 2 + 1), (attention.KEPT, 2 + 1 + 3)):
        monkeypatch.setattr(attention, "KEPT", longest)
        leaves = [part.clone().requires_grad_() for part in parts[:3]]
        saved = Mock(side_effect=lambda one: one)
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda one: one):
            by_conversation(*leaves, bounds)
        assert saved.call_count == 3 + kept
        found.append(with_gradients(by_conversation, parts, bounds))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_scores_in_float32(dtype: torch.dtype) -> None:
    """Scores in 16 bits would be off by 2^-9 of some 20 each; the errors are the same to the last bit instead."""
    parts, bounds = inputs([200, 100], (4, 2), dtype), bounds_of([200, 100])
    parts[0] *= 4
    plain, cast = (with_gradients(by_conversation, parts, bounds, autocast=each) for each in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
    expected = with_gradients(scored, [part.double() for part in parts], dense_mask(bounds))
    assert max(errors(cast, expected)) < (2e-6 if dtype == torch.float32 else 0.02)


def test_no_conversation_moves_when_another_changes() -> None:
    lengths = [30, BLOCK + 5, 1, 60]
    bounds = bounds_of(lengths)
    parts = inputs(lengths, (4, 2), torch.bfloat16)
    before = with_gradients(by_conversation, parts, bounds)
    for changed, (begin, end) in enumerate(pairwise(bounds.tolist())):
        moved = [part.clone() for part in parts]
        for part in moved[:3]:
            part[:, :, begin:end] *= -3
        moved[3][:, begin:end] *= -3
        after = with_gradients(by_conversation, moved, bounds)
        for name, one, other in zip("output query key value".split(), before, after, strict=True):
            along = 1 if name == "output" else 2
            kept = [length for length in range(one.shape[along]) if not begin <= length < end]
            index = torch.tensor(kept)
            assert torch.equal(one.index_select(along, index), other.index_select(along, index)), (changed, name)
        assert not torch.equal(before[3], after[3])


def test_a_gradient_in_any_layout_is_taken() -> None:
    parts = inputs([40], (4, 2))
    expected = with_gradients(by_conversation, parts, None)
    turned = parts[3].transpose(1, 3).contiguous().transpose(1, 3)
    assert not turned.is_contiguous()
    found = with_gradients(by_conversation, [*parts[:3], turned], None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def models(tiny: Tiny) -> Callable[..., PreTrainedModel]:
    """Return a tiny model by family and attention; the repaired Falcon, as every run loads it."""
    config = AutoConfig.from_pretrained(tiny("falcon"))
    with torch.device("meta"):
        repairs.separate_packed(AutoModelForCausalLM.from_config(config))
    repairs.route_falcon_attention(NAME)
    made: dict[Any, PreTrainedModel] = {}

    def make(family: str, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        key = family, kind, dtype
        if key not in made:
            made[key] = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=dtype, attn_implementation=kind).eval()
        return made[key]

    return make


def packed(lengths: Sequence[int], seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 1000, (1, sum(lengths)), generator=draw)
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor | None]:
    """Return what the mask function has returned since."""
    seen: list[torch.Tensor | None] = []

    def noted(*arguments: Any, **others: Any) -> torch.Tensor | None:
        seen.append(attention.conversation_mask(*arguments, **others))
        return seen[-1]

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, NAME, noted)
    return seen


@pytest.mark.parametrize("family", ["llama2", "falcon"])
@pytest.mark.parametrize("lengths", [[SHORT - 50, 51], [300, 200, 1, 60], [SHORT - 50, 50], [7, 9], [SHORT + 1]])
@torch.no_grad()
def test_packed_rows_give_the_logits_of_a_dense_mask(
    models: Callable[..., PreTrainedModel], masks: list[torch.Tensor | None], family: str, lengths: list[int]
) -> None:
    row = packed(lengths)
    found, expected = (models(family, kind)(**row, use_cache=False).logits for kind in (NAME, "sdpa"))
    assert torch.allclose(found, expected, atol=2e-5)
    assert len(masks) == 1
    if sum(lengths) > SHORT and len(lengths) > 1:
        assert masks[0].dtype == torch.int32
        assert masks[0].tolist() == [0, *accumulate(lengths)]
    elif len(lengths) == 1:
        assert masks[0] is None
    else:
        assert masks[0].shape == (1, 1, sum(lengths), sum(lengths))


@pytest.mark.parametrize("family", ["llama2", "falcon"])
@torch.no_grad()
def test_padding_and_batches_have_the_mask_of_sdpa(
    models: Callable[..., PreTrainedModel], masks: list[torch.Tensor | None], family: str
) -> None:
    ids = packed([SHORT + 8] * 2)["input_ids"].view(2, -1)
    padded = torch.ones_like(ids)
    padded[1, -40:] = 0
    for row in ({"input_ids": ids, "attention_mask": padded}, {"input_ids": ids[1:], "attention_mask": padded[1:]}):
        found, expected = (models(family, kind)(**row, use_cache=False).logits for kind in (NAME, "sdpa"))
        real = row["attention_mask"].bool()
        assert torch.allclose(found[real], expected[real], atol=2e-5)
        assert masks[-1].ndim == 4
    row = {"input_ids": ids, "position_ids": packed([500, SHORT - 492])["position_ids"].repeat(2, 1)}
    found, expected = (models(family, kind)(**row, use_cache=False).logits for kind in (NAME, "sdpa"))
    assert torch.allclose(found, expected, atol=2e-5)
    assert masks[-1].ndim == 4


@pytest.mark.parametrize("family", ["llama2", "falcon"])
@pytest.mark.parametrize("tokens", [12, SHORT + 8])
@torch.no_grad()
def test_generation_gives_the_same_ids(models: Callable[..., PreTrainedModel], family: str, tokens: int) -> None:
    ids = packed([tokens] * 2)["input_ids"].view(2, -1)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    for given, mask in ((ids[:1], padded[1:]), (ids, padded)):
        answers = [
            models(family, kind).generate(
                input_ids=given, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            for kind in (NAME, "sdpa")
        ]
        assert torch.equal(*answers)


@torch.no_grad()
def test_a_cache_that_holds_something_is_seen(models: Callable[..., PreTrainedModel]) -> None:
    ids = packed([SHORT + 20])["input_ids"]
    for family in ("llama2", "falcon"):
        model = models(family, NAME)
        whole = model(input_ids=ids, use_cache=False).logits[:, -20:]
        first = model(input_ids=ids[:, :-20], use_cache=True)
        rest = model(input_ids=ids[:, -20:], past_key_values=first.past_key_values).logits
        assert torch.allclose(rest, whole, atol=2e-5)


def test_a_sliding_window_has_the_mask_of_sdpa() -> None:
    row = packed([400, 300])
    shared = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=1000, intermediate_size=32)
    config = MistralConfig(**shared, num_key_value_heads=1, sliding_window=100)
    torch.manual_seed(0)
    found, expected = (AutoModelForCausalLM.from_config(config, attn_implementation=kind) for kind in (NAME, "sdpa"))
    expected.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert torch.allclose(*(model(**row, use_cache=False).logits for model in (found, expected)), atol=2e-5)
    given = dict(
        inputs_embeds=torch.zeros(1, 700, 32),
        attention_mask=None,
        past_key_values=None,
        position_ids=row["position_ids"],
    )
    mask = create_sliding_window_causal_mask(config=found.config, **given)
    assert torch.equal(mask, create_sliding_window_causal_mask(config=expected.config, **given))
    plain = LlamaConfig(**shared)
    plain._attn_implementation = NAME
    assert create_causal_mask(config=plain, **given).tolist() == [0, 400, 700]


def test_a_batch_that_says_where_conversations_begin_is_asked_once_and_then_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_splits", {})
    plain = LlamaConfig(hidden_size=32, num_attention_heads=2)
    plain._attn_implementation = NAME

    def mask(lengths: list[int], said: list[int], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        row = packed(lengths)
        bounds = bounds_of(said)
        given = dict(inputs_embeds=torch.zeros(1, 700, 32), attention_mask=None, past_key_values=None)
        with attention.packed_batch({**row, "cu_seq_lens_q": bounds, "max_length_q": max(said)}):
            made = create_causal_mask(config=plain, position_ids=row["position_ids"], **given, **others)
        return made, bounds

    made, bounds = mask([400, 300], [400, 300])
    assert made is bounds
    monkeypatch.setattr(attention, "_asked_bounds", lambda *_: pytest.fail("the mask was asked"))
    made, bounds = mask([300, 250, 150], [300, 250, 150])
    assert made is bounds
    assert vars(bounds)["longest"] == 300
    monkeypatch.undo()

    monkeypatch.setattr(attention, "_splits", {})
    made, _ = mask([400, 300], [300, 400])  # which the mask denies, now and for good
    assert made.tolist() == [0, 400, 700]
    made, bounds = mask([400, 300], [400, 300])
    assert made is not bounds


def test_a_mask_of_a_models_own_is_the_mask_of_sdpa() -> None:
    plain = LlamaConfig(hidden_size=32, num_attention_heads=2)
    plain._attn_implementation = NAME
    mask = create_causal_mask(
        config=plain,
        inputs_embeds=torch.zeros(1, SHORT + 8, 32),
        attention_mask=None,
        past_key_values=None,
        and_mask_function=lambda batch, head, q, kv: q - kv < 3,
    )
    assert mask.ndim == 4
    assert mask[0, 0, 10].nonzero().flatten().tolist() == [8, 9, 10]


def test_a_mask_that_shows_what_comes_is_the_mask_of_sdpa() -> None:
    given = dict(batch_size=1, q_length=SHORT + 8, kv_length=SHORT + 8, allow_is_causal_skip=False)
    sees_the_next = lambda batch, head, q, kv: kv <= q + 1  # noqa: E731
    mask = attention.conversation_mask(**given, mask_function=sees_the_next)
    assert mask.ndim == 4
    assert mask[0, 0, 10].nonzero().max() == 11


@pytest.mark.parametrize("takes_groups", [True, False])
def test_key_heads_are_repeated_where_pytorchs_kernel_takes_no_groups(
    monkeypatch: pytest.MonkeyPatch, takes_groups: bool
) -> None:
    """With the signatures of PyTorch 2.13 and 2.11; the kernel itself needs a GPU."""

    def kernel(q, k, v, begins, _, longest, __, *, scale, window_size, **grouped):
        assert (longest, scale, window_size) == (30, 0.25, (-1, 0))
        assert (grouped, k.shape[1]) == (({"enable_gqa": True}, 2) if takes_groups else ({}, 4))
        parts = [part.transpose(0, 1)[None] for part in (q, k, v)]
        return fused(*parts, dense_mask(begins)).squeeze(0)

    monkeypatch.setattr(attention, "_TAKES_GROUPS", takes_groups)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    bounds = bounds_of([30, 20])
    query, key, value, _ = inputs([30, 20], (4, 2))
    found = attention._on_gpu(query, key, value, bounds, 30, 0.25)
    assert torch.allclose(found, fused(query, key, value, dense_mask(bounds)), atol=1e-6)


@pytest.mark.parametrize("bounds", [bounds_of([30, 20]), None])
def test_a_gpu_without_flash_attention_gets_as_many_key_heads_as_query_heads(
    bounds: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one fused kernel knows no groups; otherwise Falcon's 71 query heads make every score in float32."""
    asked: list[tuple[torch.Size, Any, Any]] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
        assert k.shape == v.shape == q.shape
        asked.append((k.shape, given.get("attn_mask"), given.get("is_causal")))
        assert not given.get("enable_gqa")
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "_is_older_gpu", lambda query: True)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", kernel)
    query, key = torch.empty(1, 71, 50, 64, device="meta"), torch.empty(1, 1, 50, 64, device="meta")
    found = attention.attention(torch.nn.Identity(), query, key, key, bounds)[0]
    assert found.shape == (1, 50, 71, 64)
    lengths = [50] if bounds is None else [30, 20]
    assert asked == [((1, 71, length, 64), None, True) for length in lengths]


@pytest.mark.parametrize(
    ("size", "capability", "taken"),
    [(256, (8, 6), True), (512, (9, 0), False), (20, (9, 0), False), (64, (7, 5), False)],
)
def test_flash_attention_gets_heads_that_its_kernel_has(
    size: int, capability: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses more than 256, which the layers of Gemma 4 that see everything have."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 8, 600, size), device="cuda:0")
    assert (attention._has_flash(query), attention._is_older_gpu(query)) == (taken, not taken)


def test_repeated_key_heads_give_the_same_attention() -> None:
    query, key, value, _ = inputs([30], (6, 2))
    found = attention._repeated(torch.nn.Identity(), query, key, value, None, scaling=0.25)[0]
    assert torch.allclose(found, fused(query, key, value, dense_mask(bounds_of([30]))), atol=1e-6)  # 16 ** -0.5


def test_what_the_loop_does_not_know_is_left_to_sdpa() -> None:
    query, key, value, _ = inputs([20], (2, 2))
    both_ways = torch.nn.Identity()
    both_ways.is_causal = False
    found = attention.attention(both_ways, query, key, value, None)[0]
    assert torch.equal(found, functional.scaled_dot_product_attention(query, key, value).transpose(1, 2))
    bias = torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    found = attention.attention(torch.nn.Identity(), query, key, value, None, position_bias=bias)[0]
    mask = bias.masked_fill(~dense_mask(bounds_of([20])), -torch.inf)
    assert torch.allclose(found, fused(query, key, value, mask), atol=1e-6)


def test_dropout_stays_within_conversations() -> None:
    bounds = bounds_of([30, 20])
    query, key, value, _ = inputs([30, 20], (4, 2))
    module = torch.nn.Identity()
    module.num_key_value_groups = 2
    found = []
    for change in (1, -3):
        torch.manual_seed(0)
        moved = value.clone()
        moved[:, :, :30] *= change
        found.append(attention.attention(module, query, key, moved, bounds, dropout=0.5)[0])
    assert torch.equal(found[0][:, 30:], found[1][:, 30:])
    assert not torch.equal(found[0][:, :30], found[1][:, :30])


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_checkpointed_gradients_are_the_same_bits(tiny: Tiny, models: Callable, family: str) -> None:
    models(family, NAME)  # with its repairs
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.bfloat16, attn_implementation=NAME).train()
    row = packed([400, 5, 200])
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            # Transformers before 5.23 has it under its old name alone.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**row, labels=row["input_ids"], use_cache=False).loss
        loss.backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert all(grad.any() for name, grad in found[0].items() if "attn" in name or "attention" in name)


@torch.no_grad()
def test_the_routed_falcon_gives_the_logits_of_its_own_way(models: Callable[..., PreTrainedModel]) -> None:
    row = packed([90])
    routed, own, eager = (models("falcon", kind) for kind in (NAME, "sdpa", "eager"))
    assert type(routed.transformer.h[0].self_attention) is not type(own.transformer.h[0].self_attention)
    assert routed.transformer.h[0].self_attention.num_kv_heads == 1
    expected = own(**row, use_cache=False).logits
    for model in (routed, eager):
        assert torch.allclose(model(**row, use_cache=False).logits, expected, atol=2e-5)
    own, routed = (models("falcon", kind, torch.bfloat16) for kind in ("sdpa", NAME))
    share = (own(**row).logits.float() - expected).norm(), (routed(**row).logits.float() - expected).norm()
    assert share[1] < 1.5 * share[0]


@torch.no_grad()
def test_the_routed_falcon_in_the_shapes_of_other_falcons() -> None:
    """As many key heads as query heads, and several groups, which Falcon-7B has not."""
    repairs.route_falcon_attention(NAME)
    row = packed([SHORT, 30])
    for shape in (dict(multi_query=False), dict(new_decoder_architecture=True, num_kv_heads=2)):
        config = modeling_falcon.FalconConfig(
            hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=1000, **shape
        )
        torch.manual_seed(0)
        found, expected = (
            AutoModelForCausalLM.from_config(config, attn_implementation=kind) for kind in (NAME, "sdpa")
        )
        expected.load_state_dict(found.state_dict())
        assert torch.allclose(*(model.eval()(**row, use_cache=False).logits for model in (found, expected)), atol=2e-5)


def test_upstreams_falcon_knows_no_registered_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect of Transformers 5.23 that `repairs.route_falcon_attention` is for."""
    gone = mended("route_falcon_attention")
    source = inspect.getsource(inspect.getmodule(modeling_falcon.FalconAttention))
    assert "FALCON_ATTENTION_CLASSES" in source, gone
    assert "AttentionInterface" not in source, gone
    assert "ALL_ATTENTION_FUNCTIONS" not in source, gone
    table = dict(modeling_falcon.FALCON_ATTENTION_CLASSES)
    table.pop(NAME, None)
    assert NAME not in table
    monkeypatch.setattr(modeling_falcon, "FALCON_ATTENTION_CLASSES", table)
    config = modeling_falcon.FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=100)
    try:
        AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    except KeyError as error:
        assert NAME in str(error)
    else:
        pytest.fail(gone)
    assert repairs.route_falcon_attention(NAME)
    assert not repairs.route_falcon_attention(NAME)
    AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
