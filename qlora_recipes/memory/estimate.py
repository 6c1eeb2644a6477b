"""How much memory a run needs, by part, from the dimensions of the model alone. Arithmetic: imports no torch.

A training step has a few moments at which memory can peak; each is added up and the largest is the plan.
Every formula names what it was read from: PyTorch 2.13, Transformers 5.23, TRL 1.16, PEFT 0.21 and
bitsandbytes 0.50. The CPU's were held against every allocation of real steps; the GPU's are read, and not
measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from qlora_recipes.errors import UsageError
from qlora_recipes.memory.sizes import adapter_parameters, linear_shapes, sizes_for, unquantized_parameters
from qlora_recipes.memory.workload import Workload, workload_of
from qlora_recipes.models import Sizes
from qlora_recipes.precision import Precision
from qlora_recipes.settings import Settings

GIB = 2**30

CUDA_CONTEXT = 512 * 2**20
"""Bytes that a CUDA process takes beside its tensors: about 300 MB of driver and kernels since CUDA 11.7
loads them as needed (pytorch/pytorch issue 107667), and room for the kernels of training and for cuBLAS."""

HEAD_TOKENS, HEAD_WORDS = 4096, 32768
"""Tile of TRL's output layer: `TOKEN_CHUNK_SIZE` in `trl/kernels/chunked_logprob.py`, and
`_CHUNKED_LOGPROB_CHUNK_SIZE` in `trl/trainer/utils.py`. The buffer is that wide for smaller vocabularies
too."""

TILE_TOKENS, TILE_CACHED = 512, 32
"""`TOKENS` and `CACHED` in `output_layer.py`: the output layer's tiles on a CPU. A test holds them together."""

SHORT = 512
"""As in `attention.py`: packed rows of more tokens have no mask. A test holds the two together."""

ADAMW_BYTES = 8.0
OPTIMIZER_BYTES = {
    # Eight bits: a byte a moment, and a float32 scale for a block of 256 (`bitsandbytes/optim/optimizer.py`).
    "adamw_bnb_8bit": 2 + 2 * 4 / 256,
    "adamw_8bit": 2 + 2 * 4 / 256,
    "adamw_torch_8bit": 2 + 2 * 4 / 256,
    "adamw_torch_4bit": 1 + 2 * 4 / 128,
    "lion_32bit": 4,
    "lion_8bit": 1 + 4 / 256,
    "rmsprop": 4,
    "rmsprop_bnb": 4,
    "rmsprop_bnb_32bit": 4,
    "rmsprop_bnb_8bit": 1 + 4 / 256,
    "adagrad": 4,
    "ademamix": 12,
    "ademamix_32bit": 12,
    "ademamix_8bit": 3 + 3 * 4 / 256,
    "sgd": 0,
}
"""Optimizer to bytes of state for each trainable weight; any other counts as AdamW with two float32 moments.
A `paged_` one takes as much: its state leaves for the host only when the GPU is full (arXiv 2305.14314,
section 3)."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment when memory peaks."""

    moment: str
    """When that is."""
    base: int = 0
    """The frozen model as stored, quantization constants included."""
    expanded: int = 0
    """4-bit weights once more in 16 bits."""
    adapter: int = 0
    """LoRA weights, float32 in every arm."""
    gradients: int = 0
    """Of the adapter, float32; with several processes the buffers that are sent as well."""
    optimizer: int = 0
    activations: int = 0
    """What the forward pass keeps for the backward pass."""
    cache: int = 0
    """Keys and values of a generation."""
    logits: int = 0
    """The output layer and the loss."""
    workspace: int = 0
    """Dequantized weights and intermediate results of the layer at work."""
    heap: int = 0
    """On a CPU, what the C library holds beside tensors: holes between them, and memory freed but not given back."""
    context: int = 0
    """The CUDA context, which `torch.cuda.max_memory_allocated` does not see."""

    @property
    def parts(self) -> dict[str, int]:
        """Name of each part to its bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Without the context: what PyTorch's allocator reports as its peak."""
        return self.total - self.context


@dataclass(frozen=True)
class MemoryPlan:
    """What one process of a run needs, for training and for evaluation."""

    precision: Precision
    training: Memory
    evaluation: Memory
    """Scoring or answering one row of full length, with the adapter unmerged."""


def plan(
    settings: Settings, precision: Precision | None = None, *, device: str = "cuda", processes: int = 1
) -> MemoryPlan:
    """Return the memory of one process of a run, in the run's own precision or another.

    Raises:
        ModelError: when the model's dimensions cannot be had.
    """
    sizes, storage = sizes_for(settings), precision or settings.precision
    work = workload_of(settings, device, processes)
    return MemoryPlan(storage, training_memory(sizes, storage, work), evaluation_memory(sizes, storage, work))


def base_bytes(sizes: Sizes, precision: Precision) -> int:
    """Return the bytes of the frozen base: linear layers as stored, all else in 16 bits.

    For Llama-2-7B in NF4 3,866 MB. QLoRA (arXiv 2305.14314, figure 6) shows 5,048 MB for its 7B base and does
    not say what that holds; an embedding and an output layer in float32 would account for 524 MB of the
    difference.
    """
    linears = sum(_stored_bytes(shape, precision) for shape in linear_shapes(sizes).values())
    return sizes.num_hidden_layers * linears + 2 * unquantized_parameters(sizes)


def _stored_bytes(shape: tuple[int, int], precision: Precision) -> int:
    """Bytes of a linear layer, with constants and tables (`QuantState` in `bitsandbytes/functional.py`)."""
    inputs, outputs = shape
    weights = inputs * outputs
    if not precision.quantized:
        return 2 * weights
    if precision.quant_type is None:
        return weights + 4 * outputs  # a float32 scale for each row
    blocks, table = math.ceil(weights / 64), 16 * 4
    if not precision.double_quant:
        return weights // 2 + 4 * blocks + table
    return weights // 2 + blocks + 4 * math.ceil(blocks / 256) + table + 256 * 4 + 4


def expanded_bytes(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Return the bytes of the 16-bit weights that lie beside the packed ones (`storage.expand`)."""
    if work.storage != "expanded" or precision.quant_type is None:
        return 0
    return sizes.num_hidden_layers * sum(2 * inputs * outputs for inputs, outputs in linear_shapes(sizes).values())


def optimizer_bytes(optim: str, parameters: int) -> int:
    """Return the bytes of an optimizer's state, by its `optim` name."""
    return round(OPTIMIZER_BYTES.get(optim.removeprefix("paged_"), ADAMW_BYTES) * parameters)


def training_memory(sizes: Sizes, precision: Precision, work: Workload) -> Memory:
    """Return the memory of the moment of a training step that needs the most."""
    trained = adapter_parameters(sizes, work.rank, work.targets)
    throughout = Memory(
        moment="",
        base=base_bytes(sizes, precision),
        expanded=expanded_bytes(sizes, precision, work),
        adapter=4 * trained,
        optimizer=optimizer_bytes(work.optim, trained),
        context=CUDA_CONTEXT if work.device == "cuda" else 0,
    )
    # A second copy in the buckets that DistributedDataParallel sends: `gradient_as_bucket_view` is off.
    gradients = 4 * trained * (2 if work.processes > 1 else 1)
    moments = _moments(sizes, precision, work, trained, gradients)
    peak = max((replace(throughout, **moment) for moment in moments), key=lambda memory: memory.total)
    return replace(peak, heap=_heap(sizes, precision, work, peak.activations))


def _heap(sizes: Sizes, precision: Precision, work: Workload, activations: int) -> int:
    """Bytes that a process on a CPU holds beside its tensors; a GPU's allocator is asked for its tensors alone.

    Fitted to the resident memory of real steps with glibc: 128 to 2,048 tokens a row, 2 to 8 layers of Llama's shape,
    4 of Falcon's.
    """
    if work.device == "cuda":
        return 0
    kept, passing = (0.4, 2.25) if sizes.gated_mlp else (0.25, 1.0)
    return round(kept * activations + passing * _layer_workspace(sizes, precision, work))


def _moments(
    sizes: Sizes, precision: Precision, work: Workload, trained: int, gradients: int
) -> Iterable[dict[str, Any]]:
    """The moments at which a step can peak, each with the parts that come and go."""
    layers, every = sizes.num_hidden_layers, work.checkpoint_every
    full, boundary = _layer_kept(sizes, precision, work), _layer_boundary(sizes, precision, work)
    checkpointed = len(range(0, layers, every)) if every else 0  # Transformers counts from layer 0
    shared = _shared_kept(sizes, work)
    kept = checkpointed * boundary + (layers - checkpointed) * full + shared
    last = full if every and (layers - 1) % every == 0 else 0
    held = gradients if work.accumulation > 1 else 0
    work_space = _layer_workspace(sizes, precision, work)
    # Autocast keeps its 16-bit copies of PEFT's weights till the forward pass ends.
    copies = 2 * trained if every and not _joined(precision, work) else 0
    forward, backward = _head_workspace(sizes, work)
    # With one micro-batch a step the gradients come one by one, those of the first layer last.
    before_first = max(held, gradients - gradients // layers)
    yield {
        "moment": "output layer, forward",
        "gradients": held,
        "activations": kept + copies,
        "logits": forward,
    }
    yield {"moment": "output layer, backward", "gradients": held, "activations": kept, "logits": backward}
    yield {"moment": "last layer", "gradients": held, "activations": kept + last, "workspace": work_space}
    yield {
        "moment": "first layer",
        "gradients": before_first,
        "activations": full + boundary + shared,
        "workspace": work_space,
    }


def _shared_kept(sizes: Sizes, work: Workload) -> int:
    """Bytes kept once for all layers: the rotary tables in 16 bits, and the mask, if any, a byte an entry."""
    mask = 0 if work.packing and work.tokens > SHORT else work.attention_pairs
    return mask + 4 * work.tokens * sizes.hidden_size // sizes.num_attention_heads


def _layer_boundary(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes that a checkpointed layer keeps: its input, in 16 bits (arXiv 2205.05198, section 5).

    bitsandbytes' int8 product holds on to its input by an attribute, which checkpointing does not see
    (`MatMul8bitLt` and `MatMul8bitFp` in `bitsandbytes/autograd/_functions.py`): those inputs stay as well.
    """
    norms = 2 if sizes.gated_mlp else 1  # Falcon's attention and MLP read the same input
    held = (norms + 1) * sizes.hidden_size + sizes.intermediate_size if precision.name == "int8" else 0
    return 2 * work.tokens * (sizes.hidden_size + held)


def _layer_kept(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes that a layer keeps for its backward pass without checkpointing.

    In the manner of arXiv 2205.05198, section 4.1, for these layers: the base is frozen, so that its linear
    layers keep nothing, and LoRA's A keeps its input instead.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    norms = 2 * (4 * hidden + 4) if sizes.gated_mlp else 2 * hidden + 4  # RMSNorm's are in float32
    mlp = 3 * 2 * inner if sizes.gated_mlp else 2 * inner  # gate, its SiLU, and up; or the input of GELU
    ranks = 2 * work.rank * len(work.targets)
    per_token = norms + mlp + ranks + _adapter_inputs(sizes, precision, work)
    if precision.name == "int8" and not _shares_inputs(precision, work):
        per_token += 2 * ((2 if sizes.gated_mlp else 1) * hidden + inner)
    cast_weights = 2 * adapter_parameters(sizes, work.rank, work.targets) // sizes.num_hidden_layers
    cast_weights = 0 if _joined(precision, work) else cast_weights
    return work.tokens * per_token + _attention_kept(sizes, work) + cast_weights


def _joined(precision: Precision, work: Workload) -> bool:
    """Whether adapters are computed with their layers (`lora_linear.py`), and not by PEFT."""
    return precision.name != "int8" and not work.dropout


def _shares_inputs(precision: Precision, work: Workload) -> bool:
    """Whether adapters of one input keep it once.

    PEFT, where it computes them, casts the input of an adapter to float32, and autocast casts it back to 16 bits: a
    copy for each adapter. Its quantized layers leave that out if `torch.is_autocast_enabled()`
    (`peft/tuners/lora/bnb.py`), which asks for CUDA's alone.
    """
    return _joined(precision, work) or (precision.quantized and work.device == "cuda" and not work.dropout)


def _adapter_inputs(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes a token that the adapters keep of their inputs; dropout keeps its mask, on a CPU in float32."""
    shapes = linear_shapes(sizes)
    if not _shares_inputs(precision, work):
        mask = (1 if work.device == "cuda" else 4) if work.dropout else 0
        return sum((2 + mask) * shapes[target][0] for target in work.targets)
    return sum(2 * shapes[min(group)][0] for group in _inputs_read(sizes, work.targets))


def _inputs_read(sizes: Sizes, targets: Iterable[str]) -> Iterable[set[str]]:
    """Yield the targets by what they read."""
    groups = (
        ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
        if sizes.gated_mlp
        else ({"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"})
    )
    return (group & set(targets) for group in groups if group & set(targets))


def _attention_kept(sizes: Sizes, work: Workload) -> int:
    """Bytes that attention keeps in 16 bits (`attention.py`): query, key and value; on a GPU its output as well.

    Falcon's value is a part of the fused product, all of which stays with it on a CPU.
    Where a mask tells rows apart, PyTorch's own keeps it as a 16-bit bias.
    """
    heads, hidden = sizes.num_attention_heads, sizes.hidden_size
    key_value = sizes.num_key_value_heads * hidden // heads
    if work.device == "cuda":
        output = 0 if {"o_proj", "dense"} & set(work.targets) else 2 * hidden  # the projection keeps it then
        mask = 0 if work.packing else 2 * work.attention_pairs
        return work.tokens * (2 * hidden + 2 * 2 * key_value + output + 4 * heads) + mask
    own = 2 * (hidden + 2 * key_value) + (0 if sizes.gated_mlp else 2 * (hidden + key_value))
    masked = 0 if work.packing and work.tokens > SHORT else work.tokens * 4 * heads + 2 * work.attention_pairs
    return work.tokens * own + masked


def _layer_workspace(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes of intermediate results while one layer is computed again and differentiated.

    The larger of two moments: the MLP, whose widest tensor is there several times; a dequantized weight, with its
    constants if they are quantized too. The factors were fitted to real steps on a CPU.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    factors = (6, 10) if not _joined(precision, work) else (4, 6) if sizes.gated_mlp else (2, 4)
    mlp = work.tokens * (factors[0] * inner + factors[1] * hidden)
    weight = _dequantized(sizes, precision, work)
    return max(mlp, weight + work.tokens * 8 * hidden if weight else 0)


def _dequantized(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes of the largest linear layer in 16 bits (`dequantize_4bit`), or of int8's copy to be scaled."""
    if not precision.quantized or work.storage == "expanded":
        return 0
    weights = max(inputs * outputs for inputs, outputs in linear_shapes(sizes).values())
    if precision.quant_type is None:
        return weights * (2 if work.device == "cuda" else 10)  # a CPU multiplies by the scales in float32
    return 2 * weights + (2 * 4 * weights // 64 if precision.double_quant else 0)


def _head_workspace(sizes: Sizes, work: Workload) -> tuple[int, int]:
    """Bytes of the output layer and the loss, forward and backward; every token is taken to be in the loss.

    On a GPU TRL's `ChunkedLogProbFunction` (`trl/kernels/chunked_logprob.py`): tiles of 4,096 tokens x 32,768 words in
    one 16-bit buffer that Triton folds in place, and a gradient of the hidden states in float32. On a CPU
    `output_layer.py`: tiles of 512 tokens x all words in 16 bits, three parts of them in float32, and the gradient of
    the hidden states in 16 bits.
    """
    states = work.tokens * sizes.hidden_size
    kept = (6 if sizes.gated_mlp else 4) * states  # once flattened, and what the last norm keeps
    if work.device == "cuda":
        buffer = 2 * min(work.tokens, HEAD_TOKENS) * HEAD_WORDS
        return kept + buffer, kept + buffer + (4 + 2) * states
    tile = (2 * min(work.tokens, TILE_TOKENS) + 3 * 4 * TILE_CACHED) * sizes.vocab_size
    return kept + tile + 2 * states, kept + 3 * 2 * states


def evaluation_memory(sizes: Sizes, precision: Precision, work: Workload, rows: int = 1) -> Memory:
    """Return the memory of scoring or answering rows of full length, whichever needs more.

    Scoring makes all logits in 16 bits and their log-softmax in float32 (lm-eval, `models/huggingface.py`),
    which a CPU casts first; answering keeps keys and values of every layer in 16 bits, and needs the logits
    of one position.
    """
    one = replace(work, rows=rows, packing=False)
    throughout = Memory(
        moment="",
        base=base_bytes(sizes, precision),
        adapter=4 * adapter_parameters(sizes, work.rank, work.targets),
        context=CUDA_CONTEXT if work.device == "cuda" else 0,
    )
    logits = (2 + (4 if work.device == "cuda" else 4 + 4)) * rows * sizes.vocab_size
    key_value = sizes.num_key_value_heads * sizes.hidden_size // sizes.num_attention_heads
    scoring = replace(throughout, moment="scoring", logits=logits * work.length)
    answering = replace(
        throughout,
        moment="answering",
        cache=2 * 2 * one.tokens * key_value * sizes.num_hidden_layers,
        logits=logits,
        workspace=_forward_workspace(sizes, precision, one),
    )
    return max(scoring, answering, key=lambda memory: memory.total)


def _forward_workspace(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes of intermediate results of one layer when nothing is kept for a backward pass.

    Up to the sum of a wide layer and its adapter: five tensors of the MLP's width in Llama, four in Falcon. Fitted to
    a forward pass on a CPU.
    """
    wide = 2 * (5 if sizes.gated_mlp else 4) * sizes.intermediate_size
    mlp = work.tokens * (wide + 18 * sizes.hidden_size)
    return max(mlp, _dequantized(sizes, precision, work) + work.tokens * 8 * sizes.hidden_size)


def largest_micro_batch(sizes: Sizes, precision: Precision, work: Workload, gpu_gib: float) -> int:
    """Return how many rows of full length fit a GPU of that many GiB in one micro-batch; 0 if not one does.

    What the allocator loses to fragments is not counted; leave a tenth of the GPU free for it.

    Raises:
        UsageError: for a size that is no GPU's.
    """
    if not 0 < gpu_gib < math.inf:
        raise UsageError(f"--gpu {gpu_gib:g}: expected the memory of a GPU in GiB, such as 24")

    def fits(rows: int) -> bool:
        return training_memory(sizes, precision, replace(work, rows=rows)).total <= gpu_gib * GIB

    most = 1
    while fits(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
