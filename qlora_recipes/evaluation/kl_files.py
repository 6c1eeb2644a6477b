"""Where measured divergences and quantization errors lie in a run folder. Files only; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.run.files import write_json
from qlora_recipes.run.folder import RunFolder

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


def read_divergence(reference: RunFolder, other: RunFolder) -> Divergence | None:
    """Return a run's distance from the reference; None where it was not measured, or on other weights."""
    content = _read(_divergence_file(reference, other))
    return Divergence(**content["divergence"]) if content.get("of") == _identity(reference, other) else None


def write_divergence(reference: RunFolder, other: RunFolder, found: Divergence) -> None:
    """Write a run's distance from the reference."""
    file = _divergence_file(reference, other)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"of": _identity(reference, other), "divergence": asdict(found)})


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
    """Return the error of each quantized layer of a run's base, in the model's order; empty where not measured."""
    content = _read(_error_file(folder))
    same = content.get("base_sha256") == folder.receipt().base.sha256
    return [LayerError(**layer) for layer in content["layers"]] if same else []


def write_quantization_error(folder: RunFolder, base_sha256: str, layers: Sequence[LayerError]) -> None:
    """Write the error of each quantized layer of a run's base."""
    file = _error_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"base_sha256": base_sha256, "layers": [asdict(layer) for layer in layers]})


def _error_file(folder: RunFolder) -> Path:
    return folder.evaluation / "divergence" / "quantization_error.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
