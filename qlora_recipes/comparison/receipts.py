"""What the receipts of two runs must share so that a difference in score is one of precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from qlora_recipes.errors import ComparisonError
from qlora_recipes.run.receipt import Receipt

# Sections and keys that every arm shares. Left out on purpose: timings, paths, the command, git, how the base is
# stored and what was repaired for it, checks, and the adapter after training.
SHARED = (
    "recipe",
    "demo",
    "dtype",
    "settings",
    "data",
    "template",
    "versions",
    "base.model",
    "base.revision",
    "base.parameters",
    "adapter.targets",
    "adapter.modules",
    "adapter.parameters",
    "adapter.dtype",
    "training.steps",
    "training.micro_batches",
    "training.tokens",
    "training.supervised_tokens",
    "training.packed",
    "training.processes",
    "training.device",
    "training.attention",
)
# Those of them, and others, that follow from the seed.
SEEDED = ("seed", "adapter.initial_sha256")
_OF_SEED = {"settings.training.seed", "training.tokens", "training.supervised_tokens", "training.micro_batches"}
_MISSING = "nothing"


def check_same(a: Receipt, b: Receipt, names: tuple[str, str], *, same_seed: bool = True) -> None:
    """Refuse two receipts that differ in anything but precision (and, where said so, the seed).

    Raises:
        ComparisonError: naming every key that differs, with both values.
    """
    found = dict(differences(a, b, same_seed=same_seed))
    if found:
        lines = [f"  - {key}: {_short(left)} and {_short(right)}" for key, (left, right) in found.items()]
        raise ComparisonError(
            f"{names[0]} and {names[1]} differ in more than precision:\n" + "\n".join(lines) + "\n"
            "Expected equal values in both; train one of them again with the other's settings"
        )


def differences(a: Receipt, b: Receipt, *, same_seed: bool = True) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield every key, dotted, in which two receipts differ and should not, with both values."""
    one, other = asdict(a), asdict(b)
    for name in SHARED + (SEEDED if same_seed else ()):
        left, right = _flat(name, _at(one, name)), _flat(name, _at(other, name))
        for key in dict.fromkeys([*left, *right]):
            values = left.get(key, _MISSING), right.get(key, _MISSING)
            if values[0] != values[1] and (same_seed or key not in _OF_SEED):
                yield key, values


def _at(receipt: Any, name: str) -> Any:
    for part in name.split("."):
        receipt = receipt.get(part, _MISSING) if isinstance(receipt, Mapping) else _MISSING
    return receipt


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Return dotted key to value for every leaf, so that a difference is named exactly."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in _flat(f"{name}.{part}", inner).items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
