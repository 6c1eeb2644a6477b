"""Attention within each conversation of a packed row, without a mask over the pairs of all of them.

Transformers tells packed conversations apart by a mask of tokens x tokens, computes all of its scores and throws most
of them away. Here the positions where conversations begin replace the mask. They reach every layer the way a mask does
(through checkpointing too), and each conversation attends by itself: 16 times fewer scores for 16 equal ones.

Knows nothing about recipes or adapters. Registered as `by_conversation`; where rows are not packed it is `sdpa`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from types import FunctionType
from typing import Any, cast

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "by_conversation"
SHORT = 512
"""Rows of up to this many tokens keep the mask: its scores cost less than the iterations of a loop."""
BLOCK = 128
"""Queries per product on a CPU: more would compute more scores of later tokens in vain, fewer leave cores idle."""
KEPT = 1024
"""Longest conversation whose probabilities are kept on a CPU for the backward pass: for longer ones they are computed
again, since their memory grows with the square."""
_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in PyTorch 2.11
_batch: ContextVar[Mapping[str, Any]] = ContextVar("batch")
_splits: dict[Hashable, bool] = {}
"""Kind of mask to whether it keeps apart exactly the conversations that the collator put into a row."""


@contextmanager
def packed_batch(batch: Mapping[str, Any]) -> Iterator[None]:
    """Have masks made from where TRL's collator saw conversations begin, on the CPU: asking a GPU is waiting for it."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


def conversation_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., torch.Tensor],
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor | None:
    """Return where the conversations of one packed row begin, and its end: int32, ascending, [conversations + 1].

    None is a row of one conversation. Anything else (padding, several rows, a cache, a mask that a model makes itself,
    a window that is shorter than a conversation, layers that share keys and cut the mask) gets the mask of `sdpa`.
    """
    packed = not allow_is_causal_skip  # how Transformers signals a mask that is more than causal
    plain = not others.get("use_vmap") and others.get("attention_mask") is None
    plain = plain and not getattr(others.get("config"), "num_kv_shared_layers", 0)
    if packed and plain and batch_size == 1 and SHORT < q_length == kv_length:
        bounds = _bounds(mask_function, q_length, others.get("local_size"), device)
        if bounds is not None:
            return bounds if len(bounds) > 2 else None
    others |= {"mask_function": mask_function, "allow_is_causal_skip": allow_is_causal_skip, "device": device}
    return sdpa_mask(batch_size, q_length, kv_length, **others)


def _bounds(
    mask_function: Callable[..., torch.Tensor], tokens: int, window: int | None, device: torch.device | str
) -> torch.Tensor | None:
    """Return where conversations begin and end in a mask; None where it is not causal within each of them.

    A GPU is asked once for each kind of mask, whether it agrees with the collator, which is then believed.
    """
    batch, kind = _batch.get({}), _kind(mask_function)
    known: torch.Tensor | None = batch.get("cu_seq_lens_q")
    if known is not None and len(known) > 2 and batch["input_ids"].numel() == tokens <= (window or tokens):
        if kind not in _splits:
            asked = _asked_bounds(mask_function, tokens, window, device)
            _splits[kind] = asked is not None and torch.equal(asked, known)
        if _splits[kind]:
            vars(known)["longest"] = batch["max_length_q"]
            return known
    return _asked_bounds(mask_function, tokens, window, device)


def _asked_bounds(
    mask_function: Callable[..., torch.Tensor], tokens: int, window: int | None, device: torch.device | str
) -> torch.Tensor | None:
    later = torch.arange(1, tokens, device=device)
    first = torch.zeros_like(later)
    if mask_function(first, first, later - 1, later).any():  # some tokens see later ones
        return None
    begins = (~mask_function(first, first, later, later - 1)).nonzero().flatten() + 1  # cannot see the token before
    bounds = functional.pad(functional.pad(begins, (1, 0)), (0, 1), value=tokens).to(torch.int32)
    return bounds if window is None or max(_lengths(bounds)) <= window else None


def _kind(part: Any) -> Hashable:
    """Return what a mask function is made of, whatever tensors it holds."""
    if isinstance(part, tuple):
        return tuple(map(_kind, part))
    if isinstance(part, FunctionType):
        return part.__code__, *(_kind(cell.cell_contents) for cell in part.__closure__ or ())
    return part if isinstance(part, int) else type(part).__qualname__


def _lengths(bounds: torch.Tensor) -> list[int]:
    """Return the tokens of each conversation, asked for once for all layers."""
    held = vars(bounds)
    if "lengths" not in held:
        held["lengths"] = bounds.diff().tolist()
    return cast(list[int], held["lengths"])


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally, and within each conversation if `attention_mask` says where they begin.

    query [batch, heads, tokens, size]; key and value [batch, key/value heads, tokens, size]; returns
    [batch, tokens, heads, size], as Transformers' attention functions do.
    """
    bounds = attention_mask
    compute: Callable[..., tuple[torch.Tensor, None]] = sdpa_attention_forward
    if any(others.get(name) is not None for name in ("s_aux", "softcap")):  # which `sdpa` passes over or refuses
        compute = _written_out
    causal = others.get("is_causal", True) is not False and getattr(module, "is_causal", True)
    plain = compute is sdpa_attention_forward and others.get("position_bias") is None and dropout == 0.0 and causal
    plain = plain and value.shape[-1] == key.shape[-1]
    on_cpu = plain and query.device.type == "cpu"
    if on_cpu and bounds is None and query.shape[0] == 1 and query.shape[2] == key.shape[2] > 1:
        bounds = torch.tensor([0, query.shape[2]])
    grouped = plain and query.shape[1] > key.shape[1] and query.shape[2] == key.shape[2]
    if grouped and (bounds is None or bounds.ndim == 1) and _is_older_gpu(query):
        compute = _repeated
    if bounds is None or bounds.ndim != 1:
        return compute(module, query, key, value, bounds, dropout=dropout, scaling=scaling, **others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if plain and _has_flash(query):
        longest = vars(bounds).get("longest") or others.get("max_length_q") or max(_lengths(bounds))
        return _on_gpu(query, key, value, bounds, longest, scaling), None
    if on_cpu:
        with torch.autocast("cpu", enabled=False):  # which would compute the scores in 16 bits
            return _apply(query[0], key[0], value[0], bounds.tolist(), scaling)[None], None
    rows = zip(*(part.split(_lengths(bounds), dim=2) for part in (query, key, value)), strict=True)
    parts = [compute(module, q, k, v, None, dropout, scaling, **others)[0] for q, k, v in rows]
    return torch.cat(parts, dim=1), None


def _repeated(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention with keys and values repeated for every query head.

    The one fused kernel of GPUs without FlashAttention knows no groups: PyTorch would write out all scores in float32.
    """
    groups = query.shape[1] // key.shape[1]
    k, v = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    output = functional.scaled_dot_product_attention(query, k, v, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _written_out(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with all of its scores, for what no fused kernel has: a bound on them, or a sink [heads] beside them.

    `mask` is boolean or added, [batch, 1, queries, keys]; without one a query sees the keys up to its own.
    """
    shared, queries, keys = key.shape[1], query.shape[2], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query.unflatten(1, (shared, -1)) @ key[:, :, None].transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[:, :, None]
    if s_aux is not None:
        sinks = s_aux.view(1, shared, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys].to(query.dtype)
    output = functional.dropout(weights, dropout, module.training) @ value[:, :, None]
    return output.flatten(1, 2).transpose(1, 2), None


def _has_flash(query: torch.Tensor) -> bool:
    """Whether PyTorch's FlashAttention takes it: 16 bits, heads of 8 to 256 by 8, an NVIDIA GPU, Ampere or later."""
    suits = query.is_cuda and query.dtype != torch.float32 and query.shape[-1] in range(8, 257, 8)  # Gemma 4 has 512
    return suits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _is_older_gpu(query: torch.Tensor) -> bool:
    """Whether it is on a GPU on which PyTorch has no FlashAttention for it."""
    return query.is_cuda and not _has_flash(query)


def _on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    """PyTorch's own FlashAttention (2.13, `torch/nn/attention/varlen.py`), which needs no other package."""
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": groups > 1} if _TAKES_GROUPS else {}
    if groups > 1 and not _TAKES_GROUPS:
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    output = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **grouped)
    return cast(torch.Tensor, output)[None]  # with what else was asked for it would be a tuple


class _CausalOnCPU(torch.autograd.Function):
    """Causal attention in blocks of queries, whose probabilities are kept or computed again for the backward pass.

    PyTorch's own for CPUs takes up to twice as long (docs/performance.md). As there, scores and softmax are in float32,
    and probabilities are rounded to the dtype of the values.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], scaling: float
    ) -> torch.Tensor:
        """query [heads, tokens, size], key and value [key/value heads, tokens, size] -> [tokens, heads, size]."""
        kept = []
        heads, tokens, size = query.shape
        output = query.new_empty(tokens, heads, size)
        by_group = output.view(tokens, len(key), -1, size)
        for begin, end in pairwise(bounds):
            values = value[:, begin:end].contiguous()
            for start, stop, _, weights in _weights(query, key, begin, end, scaling):
                weighed = torch.bmm(weights, values[:, : stop - begin])
                by_group[start:stop] = weighed.view(len(key), -1, stop - start, size).permute(2, 0, 1, 3)
                if end - begin <= KEPT and any(ctx.needs_input_grad):
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.bounds, ctx.scaling = bounds, scaling
        return output

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # torch does not annotate its __call__
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        weights_kept = iter(kept)
        shared, tokens, size = key.shape
        d_query, d_key, d_value = (torch.empty(part.shape, dtype=part.dtype) for part in (query, key, value))
        d_grouped, by_group = d_query.unflatten(0, (shared, -1)), gradient.view(tokens, shared, -1, size)
        for begin, end in pairwise(ctx.bounds):
            keys, values = key[:, begin:end].contiguous(), value[:, begin:end].contiguous().transpose(1, 2)
            sum_key, sum_value = torch.zeros(2, shared, end - begin, size)  # float32: many blocks add to them
            known = weights_kept if end - begin <= KEPT else None
            for start, stop, rows, weights in _weights(query, key, begin, end, ctx.scaling, known):
                seen = stop - begin
                d_rows = by_group[start:stop].permute(1, 2, 0, 3).flatten(1, 2)
                sum_value[:, :seen] += torch.bmm(weights.transpose(1, 2), d_rows)
                d_weights = torch.bmm(d_rows, values[..., :seen])
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                d_block = torch.bmm(d_scores, keys[:, :seen]).mul_(ctx.scaling)
                d_grouped[:, :, start:stop] = d_block.view(shared, -1, stop - start, size)
                sum_key[:, :seen] += torch.bmm(d_scores.transpose(1, 2), rows)
            d_key[:, begin:end] = sum_key.mul_(ctx.scaling)
            d_value[:, begin:end] = sum_value
        return d_query, d_key, d_value, None, None


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    begin: int,
    end: int,
    scaling: float,
    known: Iterator[torch.Tensor] | None = None,
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Yield each block of a conversation: bounds, and [key heads, group x block, ...] of queries and probabilities."""
    shared = len(key)
    grouped = query.unflatten(0, (shared, -1))
    if known is None:
        keys = key[:, begin:end].float().transpose(1, 2) * scaling
        later = torch.full((BLOCK, BLOCK), -torch.inf).triu(1)
    for start in range(begin, end, BLOCK):
        stop = min(start + BLOCK, end)
        count, seen = stop - start, stop - begin
        rows = grouped[:, :, start:stop].flatten(1, 2)  # those of one key head, which need not be repeated
        if known is not None:
            yield start, stop, rows, next(known)
            continue
        scores = torch.bmm(rows.float(), keys[..., :seen])
        scores.view(shared, -1, count, seen)[..., start - begin :].add_(later[:count, :count])
        yield start, stop, rows, torch.softmax(scores, dim=-1).to(query.dtype)


_apply: Callable[..., torch.Tensor] = _CausalOnCPU.apply  # which torch does not annotate
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, conversation_mask)
