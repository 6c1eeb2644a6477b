"""How much memory a run needs, by part, from the dimensions of the model alone. Arithmetic: imports no torch.

A training step has a few moments at which memory can peak; each is added up and the largest is the plan. Every
formula names what it was read from: the installed sources of PyTorch 2.13, Transformers 5.23, TRL 1.16, PEFT 0.21 and
bitsandbytes 0.50. The CPU's were held against the allocations of real steps; the GPU's are read, not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qlora_recipes.errors import ModelError, UsageError
from qlora_recipes.models import Sizes
from qlora_recipes.precision import Precision
from qlora_recipes.settings import Settings, model_location

GIB = 2**30

CUDA_CONTEXT = 512 * 2**20
"""Bytes that a CUDA process takes beside its tensors: about 300 MB of driver and kernels since CUDA 11.7 loads them as
needed (pytorch/pytorch issue 107667), and room for the kernels of training and for cuBLAS."""

HEAD_TOKENS, HEAD_WORDS = 4096, 32768
"""Tile of TRL's output layer: `TOKEN_CHUNK_SIZE` in `trl/kernels/chunked_logprob.py`, `_CHUNKED_LOGPROB_CHUNK_SIZE` in
`trl/trainer/utils.py`. The buffer is that wide even where the vocabulary is smaller."""

ADAMW_BYTES = 8.0
OPTIMIZER_BYTES = {
    # Eight bits: one byte a moment, and a float32 scale for each block of 256 (`bitsandbytes/optim/optimizer.py`).
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
"""Optimiser to bytes of state for each trainable weight; any other counts as AdamW with two float32 moments. A
`paged_` one takes as much: its state moves to the host only when the GPU is full (arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Workload:
    """What one process runs through the model at a time, and what it trains."""

    rows: int
    """Micro-batch: rows of one forward and backward pass."""
    length: int
    """Longest row, in tokens."""
    rank: int
    targets: Sequence[str]
    """Names of the linear layers that carry an adapter."""
    packing: bool = True
    """Rows are laid end to end in one row of `rows` x `length` tokens, without padding (TRL's `bfd`)."""
    checkpoint_every: int = 1
    """Every n-th layer keeps its input alone and is computed again; 0 keeps all activations of every layer."""
    accumulation: int = 1
    """Micro-batches to a step; from two on, the gradients of the one before are there throughout."""
    dropout: bool = False
    optim: str = "adamw_torch_fused"
    processes: int = 1
    device: str = "cuda"
    """`cuda` or `cpu`: the libraries take other ways on each."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, padding included."""
        return self.rows * self.length

    @property
    def attention_pairs(self) -> int:
        """Entries of an attention mask: packed rows are one row, and its mask grows with the square of all tokens."""
        return self.tokens**2 if self.packing else self.rows * self.length**2


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment when memory peaks."""

    moment: str
    """When that is."""
    base: int = 0
    """The frozen model as stored, quantisation constants included."""
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
    """Dequantised weights and intermediate results of the layer at work."""
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


def sizes_for(settings: Settings) -> Sizes:
    """Return the dimensions of the model that a run loads: its folder's where it is one, else the recipe's.

    Raises:
        ModelError: for a hub model other than the recipe's, whose `config.json` cannot be had.
    """
    location = model_location(settings.model)
    if Path(location).is_dir():
        return sizes_of(Path(location))
    if location == settings.spec.hub_id:
        return settings.spec.sizes
    return sizes_of(_downloaded_config(location, settings.revision).parent)


def _downloaded_config(hub_id: str, revision: str | None) -> Path:
    """Fetch a hub model's `config.json`, or find the one that was fetched before."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"the dimensions of {hub_id} are not known: its config.json cannot be had "
            f"({str(error).splitlines()[0]}). Wanted a hub id that can be reached, or a folder (--model)"
        ) from error


def sizes_of(folder: Path) -> Sizes:
    """Return the dimensions of a model in a folder, from its `config.json`.

    Raises:
        ModelError: when the file is missing, damaged, or of an architecture other than Llama's or Falcon's.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return _falcon_sizes(config) if config["model_type"] == "falcon" else _llama_sizes(config)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read: {error.strerror}. Wanted a folder with config.json"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is no configuration of a Llama or a Falcon: {error!r}") from error


def _llama_sizes(config: Mapping[str, Any]) -> Sizes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if (config.get("head_dim") or hidden // heads) * heads != hidden:
        raise ValueError(f"its {heads} heads of {config['head_dim']} do not make up {hidden}")
    return Sizes(
        hidden_size=hidden,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        gated_mlp=True,
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def _falcon_sizes(config: Mapping[str, Any]) -> Sizes:
    """Falcon's key/value heads follow from three flags; `num_kv_heads` is read by the second generation alone."""
    heads = config["num_attention_heads"]
    if config.get("new_decoder_architecture"):
        key_value_heads = config.get("num_kv_heads") or heads
    else:
        key_value_heads = 1 if config.get("multi_query", True) else heads
    return Sizes(
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        vocab_size=config["vocab_size"],
        gated_mlp=False,
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def workload_of(settings: Settings, device: str = "cuda", processes: int = 1) -> Workload:
    """Return what a process of this run does at a time, by its LoraConfig and SFTConfig fields and TRL's defaults."""
    lora, training = settings.lora, settings.training
    checkpointing = training.get(
        "gradient_checkpointing", True
    )  # TRL's default, `trl/trainer/base_config.py`
    every = (training.get("gradient_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    return Workload(
        rows=training.get("per_device_train_batch_size", 8),
        length=training["max_length"],
        rank=lora.get("r", 8),
        targets=_targets(lora.get("target_modules"), sizes_for(settings)),
        packing=bool(training.get("packing") or training.get("padding_free")),
        checkpoint_every=every if checkpointing else 0,
        accumulation=training.get("gradient_accumulation_steps", 1),
        dropout=lora.get("lora_dropout", 0.0) > 0,
        optim=training.get("optim", "adamw_torch_fused"),
        processes=processes,
        device=device,
    )


def _targets(named: Any, sizes: Sizes) -> tuple[str, ...]:
    """PEFT matches the end of a module's name; a pattern or `all-linear` counts as every linear layer."""
    linears = linear_shapes(sizes)
    if named is None or isinstance(named, str):
        return tuple(linears)
    return tuple(name for name in linears if any(str(target).rsplit(".")[-1] == name for target in named))


def linear_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return name to (inputs, outputs) of the linear layers of one decoder block."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    key_value = sizes.num_key_value_heads * hidden // sizes.num_attention_heads
    if sizes.gated_mlp:
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
    return {
        "query_key_value": (hidden, hidden + 2 * key_value),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (hidden, inner),
        "dense_4h_to_h": (inner, hidden),
    }


def parameter_count(sizes: Sizes) -> int:
    """Return the number of weights of the base; an embedding that is the output layer too counts once."""
    linears = sum(inputs * outputs for inputs, outputs in linear_shapes(sizes).values())
    return sizes.num_hidden_layers * linears + _unquantized_parameters(sizes)


def _unquantized_parameters(sizes: Sizes) -> int:
    """Embedding, output layer and norms: two RMS norms a Llama layer, one LayerNorm with a bias a Falcon-7b layer."""
    embeddings = sizes.vocab_size * sizes.hidden_size * (1 if sizes.tied_embeddings else 2)
    norms = 2 * sizes.num_hidden_layers + (1 if sizes.gated_mlp else 2)
    return embeddings + norms * sizes.hidden_size


def adapter_parameters(sizes: Sizes, rank: int, targets: Iterable[str]) -> int:
    """Return the number of LoRA weights: A of rank x inputs and B of outputs x rank (arXiv 2106.09685, section 4)."""
    shapes = linear_shapes(sizes)
    return sizes.num_hidden_layers * sum(rank * sum(shapes[target]) for target in targets)


def base_bytes(sizes: Sizes, precision: Precision) -> int:
    """Return the bytes of the frozen base: linear layers as stored, all else in 16 bits.

    For Llama-2-7B in NF4 3,866 MB. QLoRA's figure 6 (arXiv 2305.14314) shows 5,048 MB for its 7B base without saying
    what it holds; an embedding and an output layer in float32 would account for 524 MB of the difference.
    """
    linears = sum(_stored_bytes(shape, precision) for shape in linear_shapes(sizes).values())
    return sizes.num_hidden_layers * linears + 2 * _unquantized_parameters(sizes)


def _stored_bytes(shape: tuple[int, int], precision: Precision) -> int:
    """Bytes of one linear layer; `QuantState` in `bitsandbytes/functional.py` holds the constants and their tables."""
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


def optimizer_bytes(optim: str, parameters: int) -> int:
    """Return the bytes of an optimiser's state, by its `optim` name."""
    return round(OPTIMIZER_BYTES.get(optim.removeprefix("paged_"), ADAMW_BYTES) * parameters)


def training_memory(sizes: Sizes, precision: Precision, work: Workload) -> Memory:
    """Return the memory of the moment of a training step that needs the most."""
    trained = adapter_parameters(sizes, work.rank, work.targets)
    throughout = Memory(
        moment="",
        base=base_bytes(sizes, precision),
        adapter=4 * trained,
        optimizer=optimizer_bytes(work.optim, trained),
        context=CUDA_CONTEXT if work.device == "cuda" else 0,
    )
    # A second copy in the buckets that DistributedDataParallel sends: `gradient_as_bucket_view` is off.
    gradients = 4 * trained * (2 if work.processes > 1 else 1)
    moments = _moments(sizes, precision, work, trained, gradients)
    return max((replace(throughout, **moment) for moment in moments), key=lambda memory: memory.total)


def _moments(
    sizes: Sizes, precision: Precision, work: Workload, trained: int, gradients: int
) -> Iterable[dict[str, Any]]:
    """The moments at which a step can peak, each with the parts that come and go."""
    layers, every = sizes.num_hidden_layers, work.checkpoint_every
    full, boundary = _layer_kept(sizes, precision, work), _layer_boundary(sizes, precision, work)
    checkpointed = len(range(0, layers, every)) if every else 0  # Transformers counts from layer 0
    kept = checkpointed * boundary + (layers - checkpointed) * full + _shared_kept(sizes, work)
    last = full if every and (layers - 1) % every == 0 else 0
    held = gradients if work.accumulation > 1 else 0
    layer_work = _layer_workspace(sizes, precision, work)
    copies = 2 * trained if every else 0  # autocast keeps its 16-bit weights till the forward pass ends
    forward, backward = _head_workspace(sizes, work)
    yield dict(moment="output layer, forward", gradients=held, activations=kept + copies, logits=forward)
    yield dict(moment="output layer, backward", gradients=held, activations=kept, logits=backward)
    yield dict(moment="last decoder layer", gradients=held, activations=kept + last, workspace=layer_work)
    # Its own gradients come last; with one micro-batch a step, the others' have come one by one.
    before = max(held, gradients - gradients // layers)
    yield dict(
        moment="first decoder layer", gradients=before, activations=full + boundary, workspace=layer_work
    )


def _shared_kept(sizes: Sizes, work: Workload) -> int:
    """Bytes kept once for all layers: the packing mask, one byte an entry, and the rotary tables in 16 bits."""
    return work.attention_pairs + 4 * work.tokens * sizes.hidden_size // sizes.num_attention_heads


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

    In the manner of arXiv 2205.05198, section 4.1, for these layers: the base is frozen, so that its linear layers
    keep nothing, and LoRA's A keeps its input instead.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    norms = (
        2 * (4 * hidden + 4) if sizes.gated_mlp else 2 * hidden + 4
    )  # RMSNorm keeps float32, LayerNorm its input
    mlp = 3 * 2 * inner if sizes.gated_mlp else 2 * inner  # gate, its SiLU, and up; or the input of GELU
    ranks = 2 * work.rank * len(work.targets)
    per_token = norms + mlp + ranks + _adapter_inputs(sizes, precision, work)
    if precision.name == "int8" and not _shares_inputs(precision, work):
        per_token += 2 * ((2 if sizes.gated_mlp else 1) * hidden + inner)
    cast_weights = 2 * adapter_parameters(sizes, work.rank, work.targets) // sizes.num_hidden_layers
    return work.tokens * per_token + _attention_kept(sizes, work) + cast_weights


def _shares_inputs(precision: Precision, work: Workload) -> bool:
    """Whether adapters of one input keep it once.

    PEFT casts the input of an adapter to float32, and autocast back to 16 bits, a copy for each adapter. Its quantised
    layers leave the cast out when `torch.is_autocast_enabled()` (`peft/tuners/lora/bnb.py`), which asks for CUDA's.
    """
    return precision.quantized and work.device == "cuda" and not work.dropout


def _adapter_inputs(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes a token that the adapters keep of their inputs; dropout keeps its mask, on a CPU in float32."""
    shapes = linear_shapes(sizes)
    if not _shares_inputs(precision, work):
        mask = (1 if work.device == "cuda" else 4) if work.dropout else 0
        return sum((2 + mask) * shapes[target][0] for target in work.targets)
    return sum(2 * shapes[min(group)][0] for group in _inputs_read(sizes, work.targets))


def _inputs_read(sizes: Sizes, targets: Iterable[str]) -> Iterable[set[str]]:
    """Yield the targets by what they read; what attention puts out is kept by attention already, if it is fused."""
    groups = (
        ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
        if sizes.gated_mlp
        else ({"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"})
    )
    return (group & set(targets) for group in groups if group & set(targets))


def _attention_is_fused(sizes: Sizes) -> bool:
    """Falcon hands PyTorch fewer key than query heads, which no fused kernel takes: scores are made in float32."""
    return sizes.gated_mlp or sizes.num_key_value_heads == sizes.num_attention_heads


def _attention_kept(sizes: Sizes, work: Workload) -> int:
    """Bytes that attention keeps: query, key, value and output in 16 bits, and the mask as a 16-bit bias.

    Where it is not fused (`_scaled_dot_product_attention_math` in PyTorch): float32 queries, keys and values, and the
    softmax of every head.
    """
    heads, hidden = sizes.num_attention_heads, sizes.hidden_size
    if _attention_is_fused(sizes):
        return work.tokens * (4 * 2 * hidden + 4 * heads) + 2 * work.attention_pairs
    key_value = sizes.num_key_value_heads * hidden // heads
    return work.tokens * 4 * (hidden + 2 * key_value) + _scores(sizes, work)


def _scores(sizes: Sizes, work: Workload) -> int:
    return 4 * sizes.num_attention_heads * work.attention_pairs


def _layer_workspace(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes of intermediate results while one layer is computed again and differentiated.

    The largest of three moments: the MLP, whose widest tensor is there in 16 bits and in float32; a dequantised
    weight, with its constants where these are quantised too; the gradient of attention scores, if they are made.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    mlp = work.tokens * (6 * inner + 10 * hidden)
    dequantized = (
        _dequantized(sizes, precision, work) + work.tokens * 8 * hidden if precision.quantized else 0
    )
    if _attention_is_fused(sizes):
        return max(mlp, dequantized)
    scores = 2 * _scores(sizes, work) - work.tokens * (
        4 * inner - 2 * hidden
    )  # the MLP has been done by then
    return max(mlp, dequantized, scores)


def _dequantized(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Bytes of the largest linear layer in 16 bits (`dequantize_4bit`), or of int8's copy to be scaled."""
    weights = max(inputs * outputs for inputs, outputs in linear_shapes(sizes).values())
    if precision.quant_type is None:
        return weights * (2 if work.device == "cuda" else 10)  # a CPU multiplies by the scales in float32
    return 2 * weights + (2 * 4 * weights // 64 if precision.double_quant else 0)


def _head_workspace(sizes: Sizes, work: Workload) -> tuple[int, int]:
    """Bytes of the output layer and the loss, forward and backward.

    `ChunkedLogProbFunction` in `trl/kernels/chunked_logprob.py` computes tiles of 4,096 tokens x 32,768 words in one
    16-bit buffer. Triton folds a tile in place. On a CPU it is done in torch: three copies in float32 forward and seven
    backward, with a mask. The hidden states' gradient is in float32.
    """
    tokens, words = min(work.tokens, HEAD_TOKENS), min(sizes.vocab_size, HEAD_WORDS)
    states = work.tokens * sizes.hidden_size
    kept = states * (
        2 + (4 if sizes.gated_mlp else 2)
    )  # the labelled ones in a row, and the last norm's input
    buffer, tile = 2 * tokens * HEAD_WORDS, tokens * words
    if work.device == "cuda":
        return kept + buffer, kept + buffer + (4 + 2) * states
    product = 4 * (tile + words * sizes.hidden_size)
    return kept + buffer + (3 * 4 + 1) * tile, kept + buffer + 4 * states + max((7 * 4 + 1) * tile, product)


def evaluation_memory(sizes: Sizes, precision: Precision, work: Workload, rows: int = 1) -> Memory:
    """Return the memory of scoring or answering rows of full length, whichever needs more.

    Scoring makes all logits in 16 bits and their log-softmax in float32 (lm-eval, `models/huggingface.py`), answering
    keeps keys and values of every layer in 16 bits and needs the logits of one position.
    """
    tokens = rows * work.length
    one = replace(work, rows=rows, packing=False)
    throughout = Memory(
        moment="scoring",
        base=base_bytes(sizes, precision),
        adapter=4 * adapter_parameters(sizes, work.rank, work.targets),
        workspace=_layer_workspace(sizes, precision, one),
        context=CUDA_CONTEXT if work.device == "cuda" else 0,
    )
    key_value = sizes.num_key_value_heads * sizes.hidden_size // sizes.num_attention_heads
    scoring = replace(throughout, logits=(2 + 4) * tokens * sizes.vocab_size)
    answering = replace(
        throughout,
        moment="answering",
        cache=2 * 2 * tokens * key_value * sizes.num_hidden_layers,
        logits=(2 + 4) * rows * sizes.vocab_size,
    )
    return max(scoring, answering, key=lambda memory: memory.total)


def largest_micro_batch(sizes: Sizes, precision: Precision, work: Workload, gpu_gib: float) -> int:
    """Return how many rows of full length fit a GPU of that many GiB in one micro-batch; 0 if not even one does.

    Raises:
        UsageError: for a size that is no GPU's.
    """
    if not 0 < gpu_gib < math.inf:
        raise UsageError(f"--gpu {gpu_gib:g}: wanted the memory of a GPU in GiB, such as 24")

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
