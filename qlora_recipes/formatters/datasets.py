"""Where a recipe's rows come from and which formatter reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_recipes.formatters.detection import FORMATTERS
from qlora_recipes.formatters.text import is_visible
from qlora_recipes.formatters.turns import Formatted

DATASETS = 'a file or a hub id, such as "my_rows.jsonl", a DatasetSpec, or a list of them'
"""What a recipe's dataset may be."""


@dataclass(frozen=True)
class DatasetSpec:
    """Where the rows come from and how a row becomes a conversation."""

    source: str
    """Hub id, or path of a JSON, JSONL, CSV or Parquet file."""

    format_row: Callable[[Mapping[str, Any]], Formatted] | None = None
    """Formatter from row to messages, or to `{"messages": ..., "tools": ...}`; None picks one by the columns."""

    split: str = "train"
    """Split of a hub dataset to read."""

    revision: str | None = None
    """Commit of a hub dataset; None takes the newest."""

    held_out: float = 0.05
    """Share of the rows held out for evaluation. A larger share gives more precise scores and less to train on."""

    demo: str | None = None
    """Name of the bundled rows of the same shape, which `--demo` reads where `source` is no file that is here."""

    system: str | None = None
    """A system prompt for the rows that have none of their own, nor a developer's. Chat and tasks do not add it."""

    share: float = 1.0
    """Share of the rows that is used, drawn by their places in the source: the same rows for every arm and seed."""


def dataset_faults(declared: object) -> Iterable[str]:
    """Yield one sentence for each fault of a recipe's dataset, or of its list of datasets."""
    specs: list[Any] = list(declared) if isinstance(declared, list | tuple) else [declared]
    if not specs or not all(isinstance(spec, DatasetSpec) for spec in specs):
        yield f"dataset: got {declared!r}, expected {DATASETS}"
        return
    seen: set[tuple[str, str]] = set()
    for i, spec in enumerate(specs):
        name = f"dataset[{i}]" if len(specs) > 1 else "dataset"
        if not _is_share(spec.held_out) or not 0 <= spec.held_out < 1:
            yield f"{name}.held_out: got {spec.held_out!r}, expected a share from 0 up to 1"
        if not _is_share(spec.share) or not 0 < spec.share <= 1:
            yield f"{name}.share: got {spec.share!r}, expected the share of its rows to use, above 0 and at most 1"
        if spec.system is not None and not (isinstance(spec.system, str) and is_visible(spec.system)):
            yield f"{name}.system: got {spec.system!r}, expected the words of a system prompt"
        if (spec.source, spec.split) in seen:
            yield f"{name}: {spec.source} (split {spec.split}) is in the list twice; its rows would count twice"
        seen.add((spec.source, spec.split))
        yield from function_faults(f"{name}.format_row", spec.format_row)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def function_faults(name: str, function: object) -> Iterable[str]:
    """Yield a sentence where what should format rows is no function."""
    if function is not None and not callable(function):
        known = f"qlora_recipes.formatters.{next(iter(FORMATTERS))}"
        yield f"{name}: got {function!r}, expected a function from row to messages, such as {known}"
