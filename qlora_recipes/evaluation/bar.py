"""What a person sees while runs are scored: one bar, in place of lm-eval's four and its log. It keeps the time, too.

Knows nothing of scores.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from qlora_recipes.evaluation.ranks import processes
from qlora_recipes.run.display import progress_bar

_DRAWING = ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface")


class Bar:
    """How far a task is; nothing is drawn but on a terminal."""

    def __init__(self, name: str, console: Console) -> None:
        self.progress = progress_bar(name, console)
        """What draws it, while entered."""
        self.started = self.moved = time.monotonic()
        """When the model was first asked and when it last answered."""
        self._row = self.progress.add_task(name, total=None)

    def start(self, total: int) -> None:
        """Set how many requests there are, once that is known."""
        self.started = time.monotonic()
        self.progress.reset(self._row, total=math.ceil(total / processes()))  # each has about its share

    def advance(self, requests: int) -> None:
        """Count so many more requests as done."""
        self.moved = time.monotonic()
        self.progress.advance(self._row, requests)


@contextmanager
def silence_lm_eval() -> Iterator[None]:
    """Silence lm-eval's bars and its log below errors; what matters of them is counted and recorded."""
    log = logging.getLogger("lm_eval")
    level = log.level
    modules: list[Any] = [sys.modules[name] for name in _DRAWING if hasattr(sys.modules.get(name), "tqdm")]
    bars = {module: module.tqdm for module in modules}
    log.setLevel(logging.ERROR)
    for module, bar in bars.items():
        module.tqdm = functools.partial(_undrawn, bar)
    try:
        yield
    finally:
        log.setLevel(level)
        for module, bar in bars.items():
            module.tqdm = bar


def _undrawn(bar: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **{**kwargs, "disable": True})
