"""docs/tour.md names functions that exist, each called by the one it is indented beneath."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOUR = (Path(__file__).parent.parent / "docs" / "tour.md").read_text(encoding="utf-8")


def steps() -> Iterator[tuple[str, str | None]]:
    """Yield each function of the tour with the one that calls it."""
    above: dict[int, str] = {}
    for line in TOUR.splitlines():
        if found := re.match(r"    ( *)([\w.]+)(?: {2,}|$)", line):
            depth, name = len(found[1]), found[2]
            above = {d: other for d, other in above.items() if d < depth} | {depth: name}
            yield name, above.get(depth - 2)
        else:
            above = {}


def resolved(name: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module("qlora_recipes." + ".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize(("name", "caller"), list(steps()))
def test_a_step_of_the_tour_is_there_and_is_called(name: str, caller: str | None) -> None:
    assert callable(resolved(name))
    if caller:
        called = name.rsplit(".", 1)[-1]
        assert re.search(rf"\b{called}\b", inspect.getsource(resolved(caller))), f"{caller} does not call it"


def test_the_tour_is_one_screen() -> None:
    assert len(TOUR.splitlines()) <= 60
    assert len(list(steps())) >= 30
