"""What one decoder architecture looks like to a memory plan and to the code that loads it. Plain data and arithmetic.

An architecture with a word of its own is one file with one `Family` in it, listed in `families/__init__.py`; every
other one is counted (`outline.py`). Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Weight:
    """Weight matrices of one name and one shape, in the whole model."""

    name: str
    """The last part of their path, such as `q_proj`."""
    inputs: int
    outputs: int
    count: int
    """How many layers have one."""
    reads: str
    """What it reads. Adapters that read the same keep it once; `attention` is what attention returns."""
    experts: int = 0
    """Matrices that are side by side in one parameter, a mixture's experts; 0 for a linear layer."""
    is_target: bool = True
    """Whether it is a linear layer of a decoder block and no router, which LoRA targets by default."""

    @property
    def numel(self) -> int:
        """Weights of one of them; of all experts, where they are one parameter."""
        return self.inputs * self.outputs * max(self.experts, 1)


@dataclass(frozen=True)
class Counted:
    """What was counted on the outline of a model, where no arithmetic of a family says it."""

    weights: tuple[Weight, ...]
    """Every linear layer but the output layer, and every parameter of experts: what 4 bits can hold."""
    other_parameters: int
    """All weights besides: embeddings, output layer, norms, biases, routers, convolutions."""
    attention_layers: int
    """Layers that attend, and keep keys and values of a generation."""
    windowed_layers: int
    """Those of them that see a sliding window only."""
    num_experts: int = 0
    experts_per_token: int = 0


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
    head_dim: int | None = None
    """Width of an attention head; None where it is `hidden_size / num_attention_heads`."""
    sliding_window: int | None = None
    """Tokens that a layer with a window attends to."""
    counted: Counted | None = None
    """What was counted instead of computed."""

    @property
    def head_size(self) -> int:
        """Width of an attention head; 0 where there is none."""
        return self.head_dim or self.hidden_size // max(self.num_attention_heads, 1)

    @property
    def query_size(self) -> int:
        """Width of all query heads, which is that of what attention returns."""
        return self.num_attention_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.num_key_value_heads * self.head_size

    @property
    def query_key_value_size(self) -> int:
        """Width of queries, keys and values side by side."""
        return self.query_size + 2 * self.key_value_size

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Every matrix that 4 bits can hold."""
        if self.counted:
            return self.counted.weights
        layers = self.num_hidden_layers
        return tuple(Weight(each.name, *each.shape(self), layers, each.reads) for each in self.family.linears)

    @property
    def linears(self) -> tuple[Weight, ...]:
        """Every linear layer but the output layer."""
        return tuple(each for each in self.weights if not each.experts)

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the linear layers of a decoder block without routers, the default LoRA targets."""
        return tuple(dict.fromkeys(each.name for each in self.linears if each.is_target))

    def inputs_read(self, targets: Collection[str]) -> int:
        """Return the width of all distinct inputs that the named layers read, of a block on average."""
        read: dict[str, Counter[str]] = {}
        for each in self.linears:
            if each.name in targets:
                read.setdefault(each.reads, Counter())[each.name] += each.inputs * each.count
        return sum(max(widths.values()) for widths in read.values()) // self.num_hidden_layers

    def cached_positions(self, length: int) -> int:
        """Return for how many positions, over all layers, a generation of this length keeps keys and values."""
        layers = self.counted.attention_layers if self.counted else self.num_hidden_layers
        windowed = (self.counted.windowed_layers if self.counted else layers) if self.sliding_window else 0
        return (layers - windowed) * length + windowed * min(length, self.sliding_window or 0)


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder block."""

    name: str
    reads: str
    """As in `Weight`."""
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


RMS_NORM = Norm(weights=1, bytes_kept=2)  # as `elementwise.py` computes it
OTHER_RMS_NORM = Norm(weights=1, bytes_kept=4)  # what it reads, in float32
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
    attention_repair: str | None = None
    """Function of `base/repairs.py` that has its layers call the attention function of a name."""
    assumes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `config.json` that must be missing or have this value, or its arithmetic does not hold."""

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of all linear layers, the default LoRA targets."""
        return tuple(linear.name for linear in self.linears)

    def covers(self, config: Mapping[str, Any]) -> bool:
        """Whether the arithmetic of this family holds for a `config.json`."""
        return all(config.get(name, value) == value for name, value in self.assumes.items())

    def sizes_of(self, config: Mapping[str, Any]) -> Sizes:
        """Return the dimensions that a `config.json` states; raises as `sizes_from_config` does."""
        shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        return Sizes(family=self, **{name: config[name] for name in shared}, **self.sizes_from_config(config))
