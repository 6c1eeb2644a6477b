"""Leave a run as it was found: random state, gradients and modes are put back after a probe."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch
from torch import nn


@contextlib.contextmanager
def preserving_state(model: nn.Module | None) -> Iterator[None]:
    """Let a probe draw numbers, run passes and change modes, such that the training after it is what it would be."""
    modes = {module: module.training for module in model.modules()} if model is not None else {}
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():  # every device's generators
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        for module, training in modes.items():
            module.training = training
        if model is not None:
            model.zero_grad(set_to_none=True)
