"""The hash of an adapter's weights: the same for the model in memory and for its file, which needs no torch to read.

Knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, deserialize

from qlora_recipes.errors import RunFolderError

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' and PyTorch's


def weights_sha256(tensors: Iterable[tuple[str, Iterable[int], str, bytes | memoryview]]) -> str:
    """Return the SHA-256 over names, shapes, dtypes (such as `float32`) and bytes of tensors, in the order given."""
    digest = hashlib.sha256()
    for name, shape, dtype, content in tensors:
        digest.update(f"{name}{tuple(shape)}torch.{dtype}".encode())
        digest.update(content)
    return digest.hexdigest()


def adapter_file_sha256(file: Path) -> str:
    """Return the hash of the LoRA weights in a safetensors file, which is that of the model they were saved from.

    Raises:
        RunFolderError: when it cannot be read or is no safetensors file.
    """
    try:
        stored = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]  # safetensors annotates nothing
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}. Train again, or restore it from a copy") from error
    return weights_sha256(
        (name, tensor["shape"], _DTYPES.get(tensor["dtype"], tensor["dtype"]), tensor["data"])
        for name, tensor in sorted((_name_in_model(name), tensor) for name, tensor in stored if "lora_" in name)
    )


def _name_in_model(name: str) -> str:
    """Put back the adapter's name, `default`, which PEFT leaves out of the file."""
    if name.endswith("lora_magnitude_vector"):  # DoRA's, which PEFT saves without its last part
        name += ".weight"
    return f"{name.removesuffix('.weight')}.default.weight" if name.endswith(".weight") else f"{name}.default"
