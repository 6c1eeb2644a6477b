"""Which 16-bit weights an adapter is better merged into, and whether anything is lost by it, in figures and in words.

Bits per byte on held-out answers and on a text, compared document by document. Knows nothing of adapters or files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from qlora_recipes.comparison.paired import FEWEST_TEXTS, BitsPerByte, bits_per_byte_difference
from qlora_recipes.data.encoding import IGNORED, Encoded
from qlora_recipes.evaluation.generation import context_length
from qlora_recipes.evaluation.held_out import row_losses, scored_words
from qlora_recipes.evaluation.loaded import RestoredRun

HELD_OUT, TEXT = "held-out answers", "text"
SIXTEEN_BIT, DEQUANTIZED = "16bit", "dequantized"
WEIGHTS = {SIXTEEN_BIT: "16-bit base", DEQUANTIZED: "dequantized weights"}
MARGIN = 0.01
"""Share of a run's bits per byte below which a loss by merging does not matter."""
_DOCUMENTS = 200  # of each kind: passes over more take minutes on a large model
_BATCH = 8
_STEPS = 16

Bits = dict[str, np.ndarray]
"""Kind of document to bits of each."""


@dataclass(frozen=True)
class Documents:
    """What models are measured on."""

    rows: Mapping[str, Sequence[Encoded]]
    """Kind of document to the documents as tokens; labels say what is scored."""
    sizes: Mapping[str, np.ndarray]
    """Length of what is scored of each, in bytes of UTF-8."""


def documents(run: RestoredRun, text: Sequence[str]) -> Documents:
    """Return the run's held-out answers and the lines of a text, as far as they fit into the model's context."""
    room = context_length(run.model) or math.inf
    held_out = []
    for row in run.held_out[:_DOCUMENTS]:
        length = sum(len(text.encode()) for text in scored_words(run, row))
        held_out.append((run.encoder.encode(row.messages, row.tools), length))
    tokenizer: Any = run.tokenizer
    lines = [(tokenizer(line)["input_ids"], len(line.encode())) for line in text[:_DOCUMENTS]]
    plain = [(Encoded(ids, [IGNORED, *ids[1:]]), length) for ids, length in lines]
    fitting = {
        kind: [(row, length) for row, length in found if length and row.supervised and len(row.input_ids) <= room]
        for kind, found in ((HELD_OUT, held_out), (TEXT, plain))
    }
    return Documents(
        {kind: [row for row, _ in found] for kind, found in fitting.items()},
        {kind: np.array([length for _, length in found]) for kind, found in fitting.items()},
    )


def bits_of(run: RestoredRun, model: Any, asked: Documents) -> Bits:
    """Return the bits that a model needs for each document."""
    of_model = replace(run, model=model)
    return {kind: np.array(row_losses(of_model, rows, _BATCH)) / math.log(2) for kind, rows in asked.rows.items()}


@torch.no_grad()
def seconds_per_token(model: Any, prompt: Sequence[int]) -> float:
    """Return the median time of a step that adds one token to a prompt."""
    found = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=True)
    times = []
    for _ in range(_STEPS):
        likeliest = found.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        found = model(input_ids=likeliest, past_key_values=found.past_key_values, use_cache=True)
        float(found.logits[0, -1, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    return median(times)


def compared(one: Bits, other: Bits, asked: Documents) -> dict[str, BitsPerByte]:
    """Return what one model loses to another for each kind of which there are enough documents."""
    return {
        kind: bits_per_byte_difference(one[kind], other[kind], sizes)
        for kind, sizes in asked.sizes.items()
        if len(sizes) >= FEWEST_TEXTS
    }


def moved(one: Bits, other: Bits, asked: Documents) -> float:
    """Return the mean absolute difference of a document, in bits per byte, over all kinds."""
    total = sum(float(np.abs(one[kind] - other[kind]).sum()) for kind in one)
    return total / max(1, sum(int(sizes.sum()) for sizes in asked.sizes.values()))


def choose(sixteen: Bits, dequantized: Bits, asked: Documents) -> tuple[str, str]:
    """Return the better of two merged models and why, in words.

    Held-out answers decide; where their 95 % interval includes zero, the text does, and where neither can, the
    dequantized weights are taken: those that were trained on, and that the run's scores are of.
    """
    for kind, found in compared(sixteen, dequantized, asked).items():
        low, high = found.interval_95
        if not low <= 0 <= high:
            better = SIXTEEN_BIT if high < 0 else DEQUANTIZED
            return better, (
                f"merged into the {WEIGHTS[better]}, it needs {abs(found.difference):.4f} bits per byte less on "
                f"{found.n} documents ({kind}; 95 % interval of 16 bits less dequantized {_interval(found)})"
            )
    return DEQUANTIZED, (
        "no difference between the two is shown; these are the weights that were trained on and that the run's "
        "scores are of"
    )


def in_words(loss: Mapping[str, BitsPerByte]) -> str:
    """Say whether what is lost by merging matters; `loss` is that of the merged model beside the run as trained."""
    return "; ".join(_said(kind, found) for kind, found in loss.items()) or "too few documents to say what is lost"


def _said(kind: str, found: BitsPerByte) -> str:
    margin = MARGIN * found.b
    (low, high), (low_95, high_95) = found.interval, found.interval_95
    if -margin < low and high < margin:
        verdict = f"does not matter (within {MARGIN:.0%})"
    elif low_95 > 0:
        verdict = "matters: keep the adapter beside the base where you can"
    elif high_95 < 0:
        verdict = "is a gain"
    else:
        verdict = "may or may not matter: too few documents to tell"
    figures = f"{found.b:.4f} bits per byte as trained, {found.a:.4f} merged, 95 % interval {_interval(found)}"
    return f"on {kind} the difference {verdict} ({figures}, {found.n} documents)"


def _interval(found: BitsPerByte) -> str:
    low, high = found.interval_95
    return f"{low:+.4f} to {high:+.4f}"
