"""How the frozen base is stored, and in which 16-bit dtype every arm loads and computes. Knows nothing of models.

Names and arithmetic only; `quantization_config` is the one function that imports Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_recipes.errors import UsageError, nearest

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Precision:
    """One way to store the linear layers of the base."""

    name: str
    bits_per_weight: float
    """Bits of storage per weight of a linear layer, quantization constants included."""
    quant_type: str | None = None
    """`nf4` or `fp4` in bitsandbytes' 4-bit layers; None elsewhere."""
    double_quant: bool = False
    """Whether the quantization constants are quantized in turn."""
    dtype: str | None = None
    """The dtype that a 16-bit precision is; None where the storage is narrower and `--dtype` decides."""

    @property
    def quantized(self) -> bool:
        """Whether the linear layers are stored in fewer than 16 bits."""
        return self.dtype is None


# 4 bits, and one float32 absmax for each block of 64 weights (0.5 bit), or, double-quantized, one int8 for each
# block and one float32 for each 256 of those (0.127 bit): QLoRA, arXiv 2305.14314, section 3.
# int8 keeps a float32 scale per row, below 0.01 bit for rows of 4,096.
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("nf4", 4 + 8 / 64 + 32 / (64 * 256), quant_type="nf4", double_quant=True),
        Precision("nf4-single", 4 + 32 / 64, quant_type="nf4"),
        Precision("fp4", 4 + 8 / 64 + 32 / (64 * 256), quant_type="fp4", double_quant=True),
        Precision("int8", 8),
        Precision("bf16", 16, dtype="bfloat16"),
        Precision("fp16", 16, dtype="float16"),
    )
}


def precision_named(name: str) -> Precision:
    """Return the precision of that name.

    Raises:
        UsageError: naming the nearest valid one.
    """
    if name not in PRECISIONS:
        raise UsageError(
            f"unknown precision {name!r}, expected one of {', '.join(PRECISIONS)}.{nearest(name, PRECISIONS)}"
        )
    return PRECISIONS[name]


def resolve_dtype(precision: Precision, dtype: str | None) -> str:
    """Return the 16-bit dtype to load and compute in: what was asked for, or what the precision is.

    Raises:
        UsageError: for an unknown dtype, or one that contradicts a 16-bit precision.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {dtype!r}, expected bfloat16 or float16.{nearest(dtype, DTYPES)}")
    if precision.dtype and dtype and dtype != precision.dtype:
        raise UsageError(
            f"--precision {precision.name} stores the base in {precision.dtype}, which contradicts --dtype {dtype}; "
            "leave --dtype out"
        )
    return precision.dtype or dtype or "bfloat16"


def quantization_config(precision: Precision, dtype: str, *, divided: bool = False) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' configuration for a precision, or None for a 16-bit base.

    The 4-bit layers dequantize to `dtype` and multiply in it: with the library's default they would compute in
    float32, another arithmetic than the 16-bit baseline's. Where FSDP divides the base, their bytes are stored as that
    dtype: it divides no weights of whole numbers.
    """
    if not precision.quantized:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if precision.quant_type is None:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision.quant_type,
        bnb_4bit_use_double_quant=precision.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        bnb_4bit_quant_storage=getattr(torch, dtype) if divided else torch.uint8,
    )
