"""Bases with random weights that take no disk and no time: the file has holes, and what is read from it is drawn.

A 7B base in 16 bits has 13.5 GB, and a measurement would take longer to read it than to train it.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, modeling_utils

_STANDARD_DEVIATION = 0.02
"""Of the weights of a new Llama (`initializer_range`)."""


def write_base(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Write a base of 16-bit weights that are all holes, and return how many bytes its files seem to have."""
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, weight in outline.named_parameters():
        header[name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [size, size := size + weight.nbytes],
        }
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + size)
    outline.config.architectures = [type(outline).__name__]
    outline.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return size


@contextlib.contextmanager
def drawn_weights() -> Iterator[None]:
    """Have Transformers read random weights, the same for a name each time, drawn where that is quick."""
    with mock.patch.object(modeling_utils, "safe_open", _File):
        yield


class _File:
    """What `safe_open` returns, as far as Transformers asks it when a model is loaded."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        self._file: Any = safe_open(*arguments, **others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(name, self._file.get_slice(name))


class _Slice:
    def __init__(self, name: str, stored: Any) -> None:
        self._name, self._stored = name, stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, place: Any) -> torch.Tensor:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weight = torch.empty(self._stored.get_shape(), dtype=torch.bfloat16, device=device)
        if weight.ndim == 1:  # of a norm
            return weight.fill_(0.0 if self._name.endswith("bias") else 1.0)[place]
        draw = torch.Generator(device).manual_seed(zlib.crc32(self._name.encode()))
        return weight.normal_(0.0, _STANDARD_DEVIATION, generator=draw)[place]
