"""The output layer and its loss on a CPU: tiles of plain logits, of the supervised tokens alone.

TRL computes them without ever holding all logits, by a kernel for GPUs. Its way on a CPU, in `trl/trainer/utils.py` and
`trl/kernels/chunked_logprob.py` of 1.16, scores every position, in float32, in tiles that are 32,768 words wide
whatever the vocabulary, and twice: once more for the gradient. Here a tile's gradient is made while its logits are at
hand, so that two 16-bit products are all there is.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

TOKENS = 512
"""Tokens of one tile of logits: enough that reading the weights costs less than multiplying by them."""
CACHED = 32
"""Tokens whose float32 probabilities are worked on at a time; of 32,000 words they stay in a core's cache."""


_COMPUTED = {"log_probs", "entropy", "is_top1"}


class LogProbs(torch.autograd.Function):
    """Log-probability of each label, with what TRL logs beside it; takes what TRL's own function takes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        *_: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """hidden [tokens, size], weight [words, size], labels [tokens] -> log-probability, entropy, is_top1: [tokens].

        The gradient of a log-probability is (one-hot - probabilities) x weight; it is kept in 16 bits, and scaled
        in the backward pass.
        """
        count, words = len(hidden), len(weight)
        log_probs, entropy = torch.empty(2, count)
        is_top1 = torch.empty(count, dtype=torch.bool)
        gradient = torch.empty_like(hidden, dtype=weight.dtype) if ctx.needs_input_grad[0] else None
        buffer = weight.new_empty(min(TOKENS, count), words)
        for start in range(0, count, TOKENS):
            rows = slice(start, min(start + TOKENS, count))
            logits = torch.mm(hidden[rows].to(weight.dtype), weight.T, out=buffer[: rows.stop - start])
            if bias is not None:
                logits += bias
            for first in range(start, rows.stop, CACHED):
                few = slice(first, min(first + CACHED, rows.stop))
                tile = logits[first - start : few.stop - start]
                log_probs[few], entropy[few], is_top1[few] = _score(tile, labels[few])
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, None, None, is_top1

    @staticmethod
    def backward(ctx: Any, d_log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.mul_(d_log_probs[:, None]).to(ctx.dtype), *[None] * 8)


def _score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probability, entropy and whether the label is the likeliest; logits become one-hot - probabilities."""
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    probs = log_probs.exp()
    of_labels = log_probs.gather(1, labels[:, None])
    likeliest = log_probs.amax(dim=-1) == of_labels.squeeze(1)
    likeliest[likeliest.clone()] = (
        log_probs[likeliest].argmax(dim=-1) == labels[likeliest]
    )  # of equals the first counts
    entropy = -log_probs.mul_(probs).sum(dim=-1)
    torch.neg(probs, out=probs)
    logits.copy_(probs.scatter_add_(1, labels[:, None], torch.ones_like(of_labels)))
    return of_labels.squeeze(1), entropy, likeliest


class _ByDevice:
    """The function above on a CPU, for a frozen output layer and what an SFTTrainer asks of it; else TRL's own."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> Any:
        _, temperature, _, softcap, scale, outputs = arguments
        plain = (temperature, softcap, scale) == (1.0, None, 1.0) and set(outputs) <= _COMPUTED
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        function = LogProbs if hidden.device.type == "cpu" and plain and frozen else ChunkedLogProbFunction
        return function.apply(hidden, weight, bias, *arguments)


def score_supervised_tokens() -> None:
    """Have TRL's trainers score supervised tokens alone on a CPU, by the function above."""
    utils._use_triton = lambda device: device.type == "cpu" or chunked_logprob._use_triton(device)  # "compact" tiles
    utils._ChunkedLogProbFunction = _ByDevice
