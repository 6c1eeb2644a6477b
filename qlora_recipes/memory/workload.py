"""What one process runs through the model at a time, read from a run's settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_recipes.memory.sizes import linear_shapes, sizes_for
from qlora_recipes.settings import Settings


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
    experts: Sequence[str] = ()
    """Names of the parameters of experts that carry one (`target_parameters`)."""
    packing: bool = True
    """Rows are joined end to end into one row of `rows` x `length` tokens, without padding (TRL's `bfd`)."""
    checkpoint_every: int = 1
    """Every n-th layer keeps only its input and is computed again; 0 keeps everything of every layer."""
    accumulation: int = 1
    """Micro-batches per step; from two on, the gradients of earlier ones are in memory throughout."""
    dropout: bool = False
    optim: str = "adamw_torch_fused"
    processes: int = 1
    storage: str = "packed"
    """How frozen weights are kept: as stored (`packed`), 4-bit ones in 16 bits, too (`expanded`), or all of them twice
    more in 16 bits (`blocked`)."""
    device: str = "cuda"
    """`cuda` or `cpu`: the libraries compute differently on each."""
    older_gpu: bool = False
    """Whether the GPU has no FlashAttention, as those have none that compute in float16 for want of bfloat16."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, padding included."""
        return self.rows * self.length

    @property
    def attention_pairs(self) -> int:
        """Entries of the attention mask; packed rows are one row, whose mask grows with its square."""
        return self.tokens**2 if self.packing else self.rows * self.length**2


def workload_of(settings: Settings, device: str = "cuda", processes: int = 1) -> Workload:
    """Return what a process of this run does at a time, from its settings and TRL's defaults."""
    lora, training = settings.lora, settings.training
    checkpointing = training.get("gradient_checkpointing", True)  # as in `trl/trainer/base_config.py`
    linears, named = linear_shapes(sizes_for(settings)), lora.get("target_modules")
    # PEFT matches the end of a name; a pattern or `all-linear` counts as all layers.
    ends = linears if named is None or isinstance(named, str) else {str(each).rsplit(".")[-1] for each in named}
    every = (training.get("gradient_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    return Workload(
        rows=training.get("per_device_train_batch_size", 8) * (2 if settings.of_preferences else 1),
        length=training["max_length"],
        rank=lora.get("r", 8) * (2 if str(lora.get("init_lora_weights")).startswith(("pissa", "olora")) else 1),
        targets=tuple(name for name in linears if name in ends),
        experts=tuple(str(each).rsplit(".")[-1] for each in lora.get("target_parameters") or ()),
        packing=not settings.of_preferences and bool(training.get("packing") or training.get("padding_free", True)),
        checkpoint_every=every if checkpointing else 0,
        accumulation=training.get("gradient_accumulation_steps", 1),
        dropout=lora.get("lora_dropout", 0.0) > 0,
        optim=training.get("optim", "adamw_torch_fused"),
        processes=processes,
        storage="packed" if settings.storage == "auto" else settings.storage,
        device=device,
        older_gpu=device == "cuda" and settings.dtype == "float16",
    )


def left_out(settings: Settings) -> list[str]:
    """Return the settings that change the memory of a run and that no formula covers."""
    lora = ("modules_to_save", "rank_pattern", "layers_to_transform", "target_parameters", "use_dora", "bias")
    training = ("fsdp", "deepspeed", "activation_offloading", "torch_compile", "use_liger_kernel")
    found = [name for name in lora if settings.lora.get(name) not in (None, False, "none", [], {})]
    targets = settings.lora.get("target_modules") or "all-linear"
    if targets != "all-linear" and not set(targets) <= set(settings.spec.linear_layers or ()):
        found.append("target_modules")  # a pattern, or a layer outside the decoder blocks
    return found + [name for name in training if settings.training.get(name)]
