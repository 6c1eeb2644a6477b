"""Imports the slow libraries in less time. Knows no command."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def quick_imports() -> Iterator[None]:
    """While the context lasts, import the slow libraries in less time, with the same result.

    Two of them ask for the list of all installed packages. bitsandbytes has `torch.compile` load the compiler for a
    few functions that are rarely called (bitsandbytes 0.50, `backends/default/ops.py`): it is loaded when one is.
    Transformers has SciPy's optimizers loaded for the losses of object detection, which go without them.

    The millions of objects that imports make stay: none of them is garbage, then or later.
    """
    vars(importlib.metadata)["packages_distributions"] = functools.cache(importlib.metadata.packages_distributions)
    gc.disable()
    try:
        import torch

        with mock.patch.object(torch, "compile", _compiled_when_called):
            import bitsandbytes  # noqa: F401
        with mock.patch("transformers.utils.is_scipy_available", return_value=False):
            import transformers.loss.loss_utils  # noqa: F401
        yield
    finally:
        gc.freeze()
        gc.enable()


def _compiled_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Stand in for `torch.compile`, as a decorator with or without options."""
    if function is None:
        return functools.partial(_compiled_when_called, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function, **options)

    return lambda *arguments, **others: compiled()(*arguments, **others)
