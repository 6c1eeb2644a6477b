"""What one decoder architecture looks like to a memory plan and to the code that loads it. Plain data and arithmetic.

A new architecture is one file with one `Family` in it, listed in `families/__init__.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a decoder, under the names the Transformers configurations give them."""

    family: Family
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    """Whether the output layer is the embedding matrix."""

    @property
    def key_value_size(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.num_key_value_heads * self.hidden_size // self.num_attention_heads

    @property
    def query_key_value_size(self) -> int:
        """Width of queries, keys and values side by side."""
        return self.hidden_size + 2 * self.key_value_size


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder block."""

    name: str
    reads: str
    """What it reads. Adapters that read the same keep it once; `attention` is what attention returns."""
    inputs: str = "hidden_size"
    """Attribute of `Sizes` with its input width."""
    outputs: str = "hidden_size"
    """Attribute of `Sizes` with its output width."""

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        """Return its input and output width."""
        return getattr(sizes, self.inputs), getattr(sizes, self.outputs)


@dataclass(frozen=True)
class Norm:
    """A normalization layer."""

    weights: int
    """Vectors of the hidden size that it holds."""
    bytes_kept: int
    """Bytes that it keeps of each number it reads; four more a token for its statistics."""


RMS_NORM = Norm(weights=1, bytes_kept=4)  # computed in float32
LAYER_NORM = Norm(weights=2, bytes_kept=2)  # weight and bias


@dataclass(frozen=True, eq=False)
class Family:
    """One decoder architecture."""

    model_types: tuple[str, ...]
    """Values of `model_type` in `config.json`; the first is its own."""
    linears: tuple[Linear, ...]
    """Every linear layer of a decoder block."""
    norm: Norm
    """Kind of its normalization layers."""
    norms: int
    """Normalization layers in a block; one more follows the last block."""
    sizes_from_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Fields of `config.json` -> what of `Sizes` is not under the same name in every architecture.

    Raises ValueError, TypeError or KeyError for a configuration that cannot be read.
    """
    config_from_sizes: Callable[[Sizes], dict[str, Any]]
    """The way back: fields of the configuration beyond those that every architecture has, as in its 7B model."""
    fused_qkv: bool
    """Whether queries, keys and values are one product, all of which stays in memory with the values."""
    mlp_kept: int
    """Tensors of the MLP's width that the activation function keeps for the backward pass."""
    mlp_forward: int
    """Tensors of the MLP's width that are alive at once in a forward pass, adapters included."""
    mlp_workspace: tuple[int, int]
    """Bytes a token for each number of the MLP's width and of the hidden size while a block is differentiated."""
    heap: tuple[float, float]
    """On a CPU, share of the activations and of the workspace that the C library holds beside them."""
    repairs: tuple[str, ...] = ()
    """Functions of `base/repairs.py` to call before a model is loaded; they go into the receipt."""
    attention_repair: str | None = None
    """Function of `base/repairs.py` that has its layers call the attention function of a name."""

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of all linear layers, the default LoRA targets."""
        return tuple(linear.name for linear in self.linears)

    def inputs_read(self, sizes: Sizes, targets: Iterable[str]) -> list[int]:
        """Return the width of each distinct input that the named layers read."""
        named = set(targets)
        return list({each.reads: each.shape(sizes)[0] for each in self.linears if each.name in named}.values())

    def sizes_of(self, config: Mapping[str, Any]) -> Sizes:
        """Return the dimensions that a `config.json` states; raises as `sizes_from_config` does."""
        shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        return Sizes(family=self, **{name: config[name] for name in shared}, **self.sizes_from_config(config))
