"""The output layer and its loss on a CPU: tiles of plain logits, for the supervised tokens only.

TRL computes them with a kernel for GPUs that never holds all logits. On a CPU its code (`trl/trainer/utils.py` and
`trl/kernels/chunked_logprob.py` of 1.16) scores every position, in float32, in tiles that are 32,768 entries wide
whatever the vocabulary, and twice: a second time for the gradient. Here a tile's gradient is computed while its logits
exist, so two 16-bit products are enough. Knows nothing of recipes or runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

from qlora_recipes.kernels.blocked import blocks_of

TOKENS = 256
"""Tokens in one tile of logits: enough that reading the weights costs less than multiplying by them."""
CACHED = 32
"""Tokens whose float32 probabilities are computed at a time; with a vocabulary of 32,000 they fit a core's cache."""


class LogProbs(torch.autograd.Function):
    """Log-probability of each label, and the metrics TRL logs with it; takes the arguments of TRL's own function."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """hidden [tokens, size], weight [vocabulary, size], labels [tokens] -> log_probs, entropy, is_top1 [tokens].

        The gradient of a log-probability is (one-hot - probabilities) x weight; its negative is kept in 16 bits, and
        scaled in the backward pass.
        """
        count = len(hidden)
        log_probs, entropy = torch.empty(2, count)
        is_top1 = torch.empty(count, dtype=torch.bool)
        gradient = torch.empty_like(hidden, dtype=weight.dtype) if ctx.needs_input_grad[0] else None
        blocked = blocks_of(weight)
        score = blocked.times if blocked else partial(torch.matmul, other=weight.T)
        differentiate = blocked.times_transposed if blocked else partial(torch.matmul, other=weight)
        for start in range(0, count, TOKENS):
            rows = slice(start, min(start + TOKENS, count))
            logits = score(hidden[rows].to(weight.dtype))
            if bias is not None:
                logits += bias
            for first in range(start, rows.stop, CACHED):
                few = slice(first, min(first + CACHED, rows.stop))
                tile = logits[first - start : few.stop - start]
                log_probs[few], entropy[few], is_top1[few] = _score(tile, labels[few])
            if gradient is not None:
                gradient[rows] = differentiate(logits)
            del logits  # before the next tile's
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, None, None, is_top1

    @staticmethod
    def backward(ctx: Any, d_log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.mul_(-d_log_probs[:, None]).to(ctx.dtype), *[None] * 8)


def _score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probability, entropy and whether the label is the likeliest; logits become probabilities - one-hot."""
    shifted = logits.float()
    shifted -= shifted.amax(dim=-1, keepdim=True)
    of_labels = shifted.gather(1, labels[:, None])
    likeliest = of_labels.squeeze(1) == 0
    likeliest[likeliest.clone()] = shifted[likeliest].argmax(dim=-1) == labels[likeliest]  # among equals the first
    probs = shifted.exp()
    total = probs.sum(dim=-1, keepdim=True)
    probs /= total
    entropy = total.log().squeeze(1) - shifted.mul_(probs).sum(dim=-1)
    logits.copy_(probs.scatter_add_(1, labels[:, None], -torch.ones_like(of_labels)))
    return (of_labels - total.log()).squeeze(1), entropy, likeliest


class _ByDevice:
    """The function above on a CPU, for a frozen output layer and what an SFTTrainer asks for; otherwise TRL's own."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> Any:
        _, temperature, _, softcap, scale, outputs = arguments
        plain = (temperature, softcap, scale) == (1.0, None, 1.0) and set(outputs) <= {
            "log_probs",
            "entropy",
            "is_top1",
        }
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        function = LogProbs if hidden.device.type == "cpu" and plain and frozen else ChunkedLogProbFunction
        apply: Callable[..., Any] = function.apply  # which torch does not annotate
        return apply(hidden, weight, bias, *arguments)


def score_supervised_tokens() -> None:
    """Make TRL's trainers score only supervised tokens on a CPU, with the function above."""
    replaced: Any = utils
    replaced._use_triton = lambda device: device.type == "cpu" or chunked_logprob._use_triton(device)  # "compact" tiles
    replaced._ChunkedLogProbFunction = _ByDevice
