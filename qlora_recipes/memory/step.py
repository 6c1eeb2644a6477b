"""What one training step, or one scored row, takes in memory: the terms that `estimate.py` adds up. Imports no torch.

Every formula names its source: PyTorch 2.13, Transformers 5.23, TRL 1.16, PEFT 0.21 and bitsandbytes 0.50. Those for
the CPU were compared with every allocation of real steps, those for the GPU with every storage of steps on tensors
without memory (tests/test_step_memory.py), and not with a GPU yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_recipes.families.family import LAYER_NORM, Sizes, Weight
from qlora_recipes.memory.sizes import adapter_parameters, linear_parameters, unquantized_parameters
from qlora_recipes.memory.workload import Workload
from qlora_recipes.precision import Precision

HEAD_TOKENS, HEAD_VOCAB = 4096, 32768
"""Tile of TRL's output layer: `TOKEN_CHUNK_SIZE` in `trl/kernels/chunked_logprob.py`, and
`_CHUNKED_LOGPROB_CHUNK_SIZE` in `trl/trainer/utils.py`. The buffer is that wide for smaller vocabularies too."""

TILE_TOKENS, TILE_CACHED = 256, 32
"""`TOKENS` and `CACHED` in `output_layer.py`, the tiles of the output layer on a CPU. A test keeps them equal."""

SHORT, KEPT, BLOCK = 512, 1024, 128
"""As in `attention.py`: packed rows of more tokens have no mask, longer conversations keep no probabilities, queries of
a product. A test keeps them equal."""


def base_bytes(sizes: Sizes, precision: Precision) -> int:
    """Return the bytes of the frozen base: linear layers and experts as stored, everything else in 16 bits.

    For Llama-2-7B in NF4 3,866 MB. QLoRA (arXiv 2305.14314, figure 6) shows 5,048 MB for its 7B base without saying
    what that includes; an embedding and an output layer in float32 would account for 524 MB of the difference.
    """
    stored = sum(each.count * _stored_bytes(each, precision) for each in sizes.weights)
    return stored + 2 * unquantized_parameters(sizes)


def _stored_bytes(weight: Weight, precision: Precision) -> int:
    """Return the bytes of a matrix, constants and tables included (bitsandbytes' `QuantState`)."""
    weights = weight.numel
    if not precision.quantized or (weight.experts and precision.quant_type is None):
        return 2 * weights  # LLM.int8 has no product for experts
    if precision.quant_type is None:
        return weights + 4 * weight.outputs  # a float32 scale for each row
    blocks, table = math.ceil(weights / 64), 16 * 4
    if not precision.double_quant:
        return weights // 2 + 4 * blocks + table
    return weights // 2 + blocks + 4 * math.ceil(blocks / 256) + table + 256 * 4 + 4


@dataclass(frozen=True)
class Step:
    """A model, how it is stored, and what is run through it; every property is a number of bytes unless it says so."""

    sizes: Sizes
    precision: Precision
    work: Workload

    @property
    def trained(self) -> int:
        """Weights of the adapter (a count)."""
        return adapter_parameters(self.sizes, self.work.rank, self.work.targets, self.work.experts)

    @property
    def expanded(self) -> int:
        """The 16-bit weights kept next to the stored ones (`dequantize.expand`, `blocked.lay_out`)."""
        if self.work.storage == "blocked" and self.precision.name != "int8":
            of_layers = sum(each.count * each.numel for each in self.sizes.linears)
            return 2 * 2 * (of_layers + self.sizes.vocab_size * self.sizes.hidden_size)
        kept = self.work.storage == "expanded" and self.precision.quant_type is not None
        return 2 * linear_parameters(self.sizes) if kept else 0

    @property
    def fused(self) -> bool:
        """Whether adapters are computed together with their layers (`lora_linear.py`), not by PEFT (a truth value)."""
        return self.precision.name != "int8" and not self.work.dropout

    @property
    def shares_inputs(self) -> bool:
        """Whether adapters that read the same keep it once (a truth value).

        PEFT, where it computes them, casts the input of an adapter to float32, and autocast casts it back to 16 bits:
        a copy for each adapter. Its quantized layers skip that if `torch.is_autocast_enabled()`
        (`peft/tuners/lora/bnb.py`), which asks about CUDA only.
        """
        on_gpu = self.precision.quantized and self.work.device == "cuda" and not self.work.dropout
        return self.fused or on_gpu

    @property
    def shared_kept(self) -> int:
        """Kept once for all layers: the rotary tables in 16 bits, and the mask, if any, a byte per entry."""
        mask = 0 if self.work.packing and self.work.tokens > SHORT else self.work.attention_pairs
        return mask + 4 * self.work.tokens * self.sizes.head_size

    @property
    def layer_boundary(self) -> int:
        """Kept by a checkpointed layer: its input, in 16 bits (arXiv 2205.05198, section 5).

        bitsandbytes' int8 product holds on to its input by an attribute, which checkpointing does not see
        (`MatMul8bitLt` and `MatMul8bitFp` in `bitsandbytes/autograd/_functions.py`), so those inputs stay as well.
        """
        held = self.sizes.inputs_read(self.sizes.linear_layers) if self.precision.name == "int8" else 0
        return 2 * self.work.tokens * (self.sizes.hidden_size + held)

    @property
    def layer_again(self) -> int:
        """Kept by a checkpointed layer that is computed again, whose first norm may keep the boundary as it is."""
        return self.layer_kept - (2 * self.work.tokens * self.sizes.hidden_size if self._norm_kept == 2 else 0)

    @property
    def layer_kept(self) -> int:
        """Kept by a layer for its backward pass, without checkpointing.

        By the method of arXiv 2205.05198, section 4.1: the base is frozen, so its linear layers keep nothing, and
        LoRA's A keeps its input instead.
        """
        family, hidden, inner = self.sizes.family, self.sizes.hidden_size, self.sizes.intermediate_size
        norms = family.norms * (self._norm_kept * hidden + 4)
        ranks = 2 * self.work.rank * sum(each.count for each in self._targeted) // self.sizes.num_hidden_layers
        per_token = norms + 2 * family.mlp_kept * inner + ranks + self._adapter_inputs
        if self.precision.name == "int8" and not self.shares_inputs:
            per_token += 2 * (family.norms * hidden + inner)
        cast_weights = 0 if self.fused else 2 * self.trained // self.sizes.num_hidden_layers
        return self.work.tokens * per_token + self._attention_kept + cast_weights

    @property
    def _float32_norms(self) -> bool:
        """Whether norms return float32 (a truth value): autocast has LayerNorm do so on a GPU, and not on a CPU.

        Each layer that reads one then makes a 16-bit copy of its own.
        """
        return self.work.device == "cuda" and self.sizes.family.norm is LAYER_NORM

    @property
    def _norm_kept(self) -> int:
        return 4 if self._float32_norms else self.sizes.family.norm.bytes_kept

    @property
    def _adapter_inputs(self) -> int:
        """Kept per token by the adapters of their inputs; dropout keeps its mask, on a CPU in float32."""
        if self.shares_inputs:
            of_norms = [each.name for each in self._targeted if "norm" in each.reads] if self._float32_norms else []
            own = sum(self.sizes.inputs_read([name]) for name in of_norms) - self.sizes.inputs_read(of_norms)
            return 2 * (self.sizes.inputs_read(self.work.targets) + own)
        mask = (1 if self.work.device == "cuda" else 4) if self.work.dropout else 0
        widths = sum(each.count * each.inputs for each in self._targeted)
        return (2 + mask) * widths // self.sizes.num_hidden_layers

    @property
    def _targeted(self) -> list[Weight]:
        return [each for each in self.sizes.linears if each.name in self.work.targets]

    @property
    def _attention_kept(self) -> int:
        """Kept by attention in 16 bits (`attention.py`): query, key and value, and the output or probabilities.

        A value that is a part of a fused product keeps all of the product in memory on a CPU. Where a mask tells rows
        apart, PyTorch's own attention keeps it as a 16-bit bias.
        """
        sizes, work = self.sizes, self.work
        heads, query, key_value = sizes.num_attention_heads, sizes.query_size, sizes.key_value_size
        if work.device == "cuda":
            reads_output = any(each.reads == "attention" for each in self._targeted)
            output = 0 if reads_output else 2 * query  # or the adapter after it keeps it
            mask = 0 if work.packing else 2 * work.attention_pairs
            if work.older_gpu:  # keys and values for every query head, and what each conversation returns by itself
                key_value, output = query, output + 2 * query
            return work.tokens * (2 * query + 2 * 2 * key_value + output + 4 * heads) + mask
        own = 2 * (query + 2 * key_value) + (2 * (query + key_value) if sizes.family.fused_qkv else 0)
        if work.packing and work.tokens > SHORT:
            longest = min(work.length, KEPT)  # whose queries see half of it and of a block, on the average
            return work.tokens * (own + heads * (longest + min(longest, BLOCK)))
        return work.tokens * (own + 4 * heads) + 2 * work.attention_pairs

    @property
    def layer_workspace(self) -> int:
        """Intermediate results while one layer is computed again and differentiated.

        The larger of two moments: the MLP, whose widest tensor exists several times; a dequantized weight, with its
        constants if they are quantized too. The factors were fitted to real steps on a CPU.
        """
        hidden, inner = self.sizes.hidden_size, self.sizes.intermediate_size
        per_inner, per_hidden = self.sizes.family.mlp_workspace if self.fused else (6, 10)
        mlp = self.work.tokens * (per_inner * inner + per_hidden * hidden)
        weight = self._dequantized
        beside = 8 + (4 if self._float32_norms else 0)  # a gradient in float32
        return max(mlp, weight + self.work.tokens * beside * hidden if weight else 0)

    @property
    def forward_workspace(self) -> int:
        """Intermediate results of a forward pass alone, up to a wide layer and its adapter; fitted on a CPU."""
        wide = 2 * self.sizes.family.mlp_forward * self.sizes.intermediate_size
        mlp = self.work.tokens * (wide + 18 * self.sizes.hidden_size)
        return max(mlp, self._dequantized + self.work.tokens * 8 * self.sizes.hidden_size)

    @property
    def _dequantized(self) -> int:
        """The largest linear layer, or all experts of one, in 16 bits (`dequantize_4bit`); int8's copy to be scaled."""
        if not self.precision.quantized or self.work.storage != "packed":
            return 0
        stored = self.sizes.weights if self.precision.quant_type else self.sizes.linears
        weights = max(each.numel for each in stored)
        if self.precision.quant_type is None:
            return weights * (2 if self.work.device == "cuda" else 10)  # a CPU multiplies by the scales in float32
        return 2 * weights + (2 * 4 * weights // 64 if self.precision.double_quant else 0)

    @property
    def head_workspace(self) -> tuple[int, int]:
        """The output layer and the loss, forward and backward; every token is taken to be in the loss.

        On a GPU TRL's `ChunkedLogProbFunction` (`trl/kernels/chunked_logprob.py`): tiles of 4,096 tokens x 32,768
        entries of the vocabulary in one 16-bit buffer that Triton folds in place, and a gradient of the hidden states
        in float32. On a CPU `output_layer.py`: tiles of 256 tokens x the vocabulary in 16 bits, three parts of them in
        float32, and the gradient of the hidden states in 16 bits.
        """
        states = self.work.tokens * self.sizes.hidden_size
        kept = ((4 if self._float32_norms else 2) + self._norm_kept) * states  # once flattened, and by the last norm
        if self.work.device == "cuda":
            buffer = 2 * min(self.work.tokens, HEAD_TOKENS) * HEAD_VOCAB
            return kept + buffer, kept + buffer + (4 + 2) * states
        tile = (2 * min(self.work.tokens, TILE_TOKENS) + 3 * 4 * TILE_CACHED) * self.sizes.vocab_size
        return kept + tile + 2 * states, kept + 3 * 2 * states

    def heap(self, activations: int) -> int:
        """Return what a process on a CPU holds next to its tensors; a GPU's allocator is asked about tensors only.

        Fitted to the resident memory of real steps with glibc: 128 to 2,048 tokens a row, 2 to 8 layers of Llama's
        shape, 4 of Falcon's.
        """
        if self.work.device == "cuda":
            return 0
        kept, passing = self.sizes.family.heap
        return round(kept * activations + passing * self.layer_workspace)
