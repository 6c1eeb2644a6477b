"""Pairing the documents of two runs: by task and by the hashes of document, prompt and target, never by place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_recipes.errors import ComparisonError

IDENTITY = ("task", "doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True)
class Aligned:
    """The documents of two runs, paired, in the order of run a."""

    a: tuple[Any, ...]
    """Records of run a, as given."""
    b: tuple[Any, ...]
    """The record of run b for each."""
    tasks: tuple[str, ...]
    scores_a: np.ndarray
    scores_b: np.ndarray


def align(docs_a: Sequence[Any], docs_b: Sequence[Any]) -> Aligned:
    """Pair the documents of two runs by task and by the hashes of document, prompt and target.

    A record is a mapping or an object with `task`, `doc_hash`, `prompt_hash`, `target_hash` and `score`.
    Records alike in all four are paired in the order of `doc_id`, or as given where there is none.
    """
    keyed_a, keyed_b = _keyed(docs_a, "a"), _keyed(docs_b, "b")
    if keyed_a.keys() != keyed_b.keys() or not keyed_a:
        raise ComparisonError(_mismatch(keyed_a.keys() - keyed_b.keys(), keyed_b.keys() - keyed_a.keys()))
    a, b = tuple(keyed_a.values()), tuple(keyed_b[key] for key in keyed_a)
    scores = [np.array([float(_field(record, "score")) for record in records]) for records in (a, b)]
    return Aligned(a, b, tuple(key[0] for key in keyed_a), *scores)


def _keyed(docs: Sequence[Any], run: str) -> dict[tuple, Any]:
    seen: Counter[tuple] = Counter()
    keys: dict[int, tuple] = {}
    for position in sorted(range(len(docs)), key=lambda i: _field(docs[i], "doc_id", 0)):
        identity = tuple(_field(docs[position], name) for name in IDENTITY)
        if not math.isfinite(_field(docs[position], "score")):
            name = _field(docs[position], "doc_id", identity[1])
            raise ComparisonError(
                f"got the score {_field(docs[position], 'score')} for document {name} of task {identity[0]} "
                f"in run {run}, expected a finite number; look for NaN in the adapter and evaluate again"
            )
        keys[position] = (*identity, seen[identity])
        seen[identity] += 1
    return {keys[position]: docs[position] for position in range(len(docs))}


def _field(record: Any, name: str, default: Any = None) -> Any:
    value = record.get(name, default) if isinstance(record, Mapping) else getattr(record, name, default)
    if value is None:
        raise ComparisonError(f"got a record without {name}, expected {IDENTITY} and a score: {record!r:.200}")
    return value


def _mismatch(only_a: set[tuple], only_b: set[tuple]) -> str:
    if not only_a | only_b:
        return "got no documents, expected the same ones in both runs; evaluate both first"
    tasks = [dict(Counter(key[0] for key in keys)) for keys in (only_a, only_b)]
    parts = [f"got {len(only_a)} documents only in run a {tasks[0]}, {len(only_b)} only in run b {tasks[1]}"]
    for i, name in enumerate(IDENTITY):
        without_a, without_b = ({key[:i] + key[i + 1 :] for key in keys} for keys in (only_a, only_b))
        if alike := len(without_a & without_b):
            parts.append(f"{alike} of them differ in {name} alone")
    fix = "expected the same in both; evaluate both with the same tasks, shots, chat template and limit"
    return "; ".join([*parts, fix])
