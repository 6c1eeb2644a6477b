"""Where measured divergences and quantization errors lie in a run folder. Files only; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.run.files import read_record, write_json
from qlora_recipes.run.folder import RunFolder

_FIX = "Remove the file and measure again: qlora-recipes compare RUN RUN --divergence"
TOKENS = 2048
"""Held-out tokens that are read; with 32,000 words their log-probabilities take 262 MB on disk."""


@dataclass(frozen=True)
class Divergence:
    """How far an arm's next-token distributions are from the baseline's, on the held-out answers."""

    tokens: int
    mean_kl: float
    """KL(baseline || arm) in nats per token."""
    median_kl: float
    p99_kl: float
    """99th percentile over tokens."""
    same_top_1: float
    """Points: share of tokens whose likeliest successor is the same."""


@dataclass(frozen=True)
class LayerError:
    """What quantization did to one linear layer."""

    layer: str
    relative_error: float
    """Frobenius norm of (stored - original) over that of the original."""


@dataclass(frozen=True)
class _DivergenceFile:
    of: dict[str, Any]
    """What the figure depends on, see `_identity`."""
    divergence: Divergence


@dataclass(frozen=True)
class _ErrorFile:
    base_sha256: str
    layers: list[LayerError]


def read_divergence(reference: RunFolder, other: RunFolder) -> Divergence | None:
    """Return a run's distance from the reference; None where it was not measured, or on other weights.

    Raises:
        RunFolderError: when the file is damaged.
    """
    try:
        found = read_record(_divergence_file(reference, other), _DivergenceFile, fix=_FIX)
    except FileNotFoundError:
        return None
    return found.divergence if found.of == _identity(reference, other) else None


def write_divergence(reference: RunFolder, other: RunFolder, found: Divergence) -> None:
    """Write a run's distance from the reference."""
    file = _divergence_file(reference, other)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(_DivergenceFile(_identity(reference, other), found)))


def _divergence_file(reference: RunFolder, other: RunFolder) -> Path:
    return other.evaluation / "divergence" / f"from-{reference.receipt().adapter.final_sha256[:16]}.json"


def _identity(reference: RunFolder, other: RunFolder) -> dict[str, Any]:
    """What the figure depends on; anything else there is another measurement's."""
    one, two = reference.receipt(), other.receipt()
    return {
        "reference": [one.adapter.final_sha256, one.base.sha256],
        "run": [two.adapter.final_sha256, two.base.sha256],
        "data": two.data.fingerprint,
        "tokens": TOKENS,
    }


def read_quantization_error(folder: RunFolder) -> list[LayerError]:
    """Return the error of each quantized layer of a run's base, in the model's order; empty where not measured.

    Raises:
        RunFolderError: when the file is damaged.
    """
    try:
        found = read_record(_error_file(folder), _ErrorFile, fix=_FIX)
    except FileNotFoundError:
        return []
    return found.layers if found.base_sha256 == folder.receipt().base.sha256 else []


def write_quantization_error(folder: RunFolder, base_sha256: str, layers: Sequence[LayerError]) -> None:
    """Write the error of each quantized layer of a run's base."""
    file = _error_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(_ErrorFile(base_sha256, list(layers))))


def _error_file(folder: RunFolder) -> Path:
    return folder.evaluation / "divergence" / "quantization_error.json"
