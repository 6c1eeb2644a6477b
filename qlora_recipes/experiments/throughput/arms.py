"""Train one arm for a few steps, in its own process, and write down how fast it was. Knows nothing of the other arms.

python -m qlora_recipes.experiments.throughput.arms ARM SPECIFICATION.json RESULT.json

The arms see the same rows, token for token and label for label, in the same batches, with an adapter of the same shape,
the same schedule and seed. The arms of TRL are `SCRIPTS`; `recipe` is this package.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from qlora_recipes import DatasetSpec, Recipe, environment
from qlora_recipes.commands.entry import run_command
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.kernels import attention
from qlora_recipes.kernels.blocked import blocked_bytes
from qlora_recipes.kernels.dequantize import EXPANDED, is_4bit
from qlora_recipes.memory import estimate
from qlora_recipes.memory.fitting import fit_to_memory
from qlora_recipes.models import MODELS, ModelSpec
from qlora_recipes.precision import precision_named
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import Settings, resolve
from qlora_recipes.stages import Run
from qlora_recipes.training import build
from qlora_recipes.training.accounting import non_weight_bytes
from qlora_recipes.training.build import build_trainer, load_model, prepare_rows
from qlora_recipes.training.token_count import TokenCount
from qlora_recipes.training.train import machine

SPECS = {spec.family: spec for spec in MODELS.values()}


@dataclass(frozen=True)
class Script:
    """How a script that uses TRL without this package sets what decides its speed."""

    sixteen_bits: bool
    """Whether it loads and computes in 16 bits; BitsAndBytesConfig and SFTTrainer otherwise do both in float32."""
    rows_at_a_time: int
    """A step has `BATCH`; several at a time are padded to the longest."""
    dequantized_once: bool
    """Whether it makes 4-bit weights 16-bit ones before the first step, and casts the adapter as TRL does on 4 bits."""
    checkpointing: bool


BATCH = 8
"""Rows of a step: TRL's default."""
SCRIPTS = {
    "trl_defaults": Script(False, BATCH, False, True),
    "trl_notebook": Script(True, 1, False, True),
    "trl_by_hand": Script(True, 1, True, False),
}
"""TRL's defaults, as its documentation's first example has them; what its notebook for QLoRA sets
(`sft_trl_lora_qlora.ipynb`); and the fastest on a CPU that its options allow."""
ARMS = (*SCRIPTS, "recipe")
_PIECES = "attention output_layer lora_linear storage packing fitting threads".split()
WITHOUT = tuple(f"without_{piece}" for piece in _PIECES)
"""The recipe's arm with one piece left out, which shows what the piece contributes."""


@dataclass(frozen=True)
class Specification:
    """What every arm of one comparison shares."""

    family: str
    """Of the recipe's model; where it is none of `SPECS`, what the package finds in the folder."""
    model: str
    rows: str
    precision: str
    dtype: str
    max_length: int
    steps: int
    r: int
    storage: str


def base_config(family: str, hidden_size: int, num_hidden_layers: int, vocab_size: int) -> PreTrainedConfig:
    """Return the configuration of a decoder of a family; everything else is in proportion to the 7B model.

    Raises:
        UsageError: for a width that is no multiple of the size of the family's attention heads.
    """
    whole = SPECS[family].sizes
    assert whole is not None
    head = whole.hidden_size // whole.num_attention_heads
    if hidden_size % head or hidden_size <= 0:
        raise UsageError(f"--hidden_size {hidden_size}: expected a multiple of {head}, the size of {family}'s heads")
    heads = hidden_size // head
    sizes = replace(
        whole,
        hidden_size=hidden_size,
        num_key_value_heads=heads if whole.num_key_value_heads == whole.num_attention_heads else 1,
        intermediate_size=whole.intermediate_size * hidden_size // whole.hidden_size,
    )
    return AutoConfig.for_model(
        whole.family.model_types[0],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        **whole.family.config_from_sizes(sizes),
    )


def make_base(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a base with random weights and the tokenizer into a folder; no speed depends on the weights' values."""
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings_of(spec: Specification) -> Settings:
    """Return the settings of the recipe's arm, with everything open that a recipe may leave open."""
    declared = {
        "model": _model(spec),
        "dataset": DatasetSpec(spec.rows, held_out=0.0),
        "lora": dict(r=spec.r, lora_alpha=spec.r),
        "training": {**_shared(spec), "max_length": spec.max_length, "packing": False, "save_strategy": "no"},
        "__module__": __name__,
    }
    recipe = type("Throughput", (Recipe,), declared)
    dtype = None if precision_named(spec.precision).dtype else spec.dtype
    settings = resolve(recipe, precision=spec.precision, dtype=dtype, storage=spec.storage)
    batch = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    return replace(settings, training={**settings.training, **batch}, auto_fields=frozenset(("batch", "checkpointing")))


def _model(spec: Specification) -> ModelSpec | str:
    """Return the family's specification with the base in its place, or the folder alone."""
    known = SPECS.get(spec.family)
    return replace(known, hub_id=spec.model, revision=None, sizes=None) if known else spec.model


def leave_out(arm: str, read: Run) -> Run:
    """Return a run fitted to the machine, with one piece of the fast path undone in this process."""
    settings = read.settings
    if arm == "without_fitting":
        settings = replace(settings, storage="packed", auto_fields=frozenset())
    settings = fit_to_memory(settings, machine())
    if arm == "without_storage":
        settings = replace(settings, storage="packed")
    if arm in ("without_packing", "without_attention"):
        settings = replace(settings, training={**settings.training, "padding_free": arm == "without_attention"})
    if arm == "without_attention":
        attention.NAME = "sdpa"
    if arm == "without_output_layer":
        vars(build)["score_supervised_tokens"] = lambda: None
    if arm == "without_lora_linear":
        vars(build)["fuse_lora_layers"] = lambda model: 0
    if arm == "without_threads":
        torch.set_num_threads(1)  # as `accelerate launch` leaves a CPU run
    return replace(read, prepared=replace(read.prepared, settings=settings))


def _shared(spec: Specification) -> dict[str, Any]:
    """SFTConfig fields that decide the loss; the same in every arm."""
    return dict(
        max_steps=spec.steps,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        seed=0,
        logging_steps=1,
        report_to="none",
        train_sampling_strategy="sequential",
    )


def trainer_of(arm: str, spec: Specification, read: Run, folder: str) -> Trainer:
    """Return the trainer of an arm, for rows that were read with its settings."""
    if arm in SCRIPTS:
        return script_trainer(SCRIPTS[arm], spec, read, folder)
    return build_trainer(load_model(leave_out(arm, read)), RunFolder(Path(folder)))


def script_trainer(script: Script, spec: Specification, read: Run, folder: str) -> Trainer:
    """Return the trainer of a script that uses TRL alone."""
    rows = [row.encoded for row in read.data.train]
    dataset = Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
    stored, given = precision_named(spec.precision), dict[str, Any]()
    if stored.quant_type:
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=stored.quant_type,
            bnb_4bit_use_double_quant=stored.double_quant,
            **({"bnb_4bit_compute_dtype": getattr(torch, spec.dtype)} if script.sixteen_bits else {}),
        )
    model: Any = spec.model
    others: dict[str, Any] = {"fp16": True, "bf16": False} if spec.dtype == "float16" else {}
    if script.dequantized_once and given:
        model = AutoModelForCausalLM.from_pretrained(model, dtype=spec.dtype, device_map="auto", **given)
        if any(is_4bit(module) for module in model.modules()):
            model = model.dequantize(dtype=getattr(torch, spec.dtype))
        given = {}
    elif script.sixteen_bits:
        others["model_init_kwargs"] = {"dtype": spec.dtype}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=script.rows_at_a_time,
            gradient_accumulation_steps=BATCH // script.rows_at_a_time,
            gradient_checkpointing=script.checkpointing,
            max_length=spec.max_length,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            **others,
            **_shared(spec),
        ),
        train_dataset=dataset,
        processing_class=read.tokenizer,
        peft_config=LoraConfig(
            r=spec.r,
            lora_alpha=spec.r,
            target_modules=list(read.settings.lora["target_modules"]),
            task_type="CAUSAL_LM",
        ),
        **given,
    )
    # TRL casts the adapter of a 4-bit base to bfloat16, which a gradient scaler cannot handle.
    cast_to = torch.float32 if spec.dtype == "float16" else torch.bfloat16 if script.dequantized_once else None
    if cast_to:
        for weight in cast(torch.nn.Module, trainer.model).parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(cast_to)
    return trainer


class _Clock(TrainerCallback):
    """Measures the time of every step, and counts its tokens."""

    def __init__(self, trainer: Trainer) -> None:
        self.count, self.device = TokenCount(), trainer.args.device
        self.steps: list[dict[str, float]] = []
        step: Callable[..., torch.Tensor] = trainer.training_step

        def counted(model: torch.nn.Module, inputs: Mapping[str, Any], *arguments: Any) -> torch.Tensor:
            self.count.add(inputs)
            return step(model, inputs, *arguments)

        vars(trainer)["training_step"] = counted
        trainer.add_callback(self)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.count, self._start = TokenCount(), self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append({"seconds": self._now() - self._start, **vars(self.count.read())})

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def run(arm: str, spec: Specification) -> dict[str, Any]:
    """Train an arm and return what it did; the first step, which warms up, is not in the speed."""
    with tempfile.TemporaryDirectory() as folder:
        read = prepare_rows(settings_of(spec))
        trainer = trainer_of(arm, spec, read, folder)
        model, device = cast(torch.nn.Module, trainer.model), trainer.args.device.type
        clock, beside = _Clock(trainer), non_weight_bytes(model)
        environment.reset_peak(device)
        trainer.train()
    rows = [len(row.encoded.input_ids) for row in read.data.train]  # too few are read again
    for number, step in enumerate(clock.steps):
        expected = sum(rows[place % len(rows)] for place in range(number * BATCH, (number + 1) * BATCH))
        if step["real"] != expected:
            raise RecipesError(f"{arm}: got {step['real']:,} tokens in step {number + 1}, expected {expected:,}")
    counted = clock.steps[1:]
    total = {name: sum(step[name] for step in counted) for name in counted[0]}
    memory = {}
    if arm == "recipe":
        planned = estimate.plan(fit_to_memory(settings_of(spec), machine()), device=device).training.allocated
        memory = {"training_bytes": environment.peak_since_reset(device) - beside, "planned_bytes": planned}
    return {
        "tokens_per_second": total["real"] / total["seconds"],
        "supervised_tokens_per_second": total["supervised"] / total["seconds"],
        "peak_bytes": environment.peak_bytes(device),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "supervised_tokens": [step["supervised"] for step in clock.steps],
        "tokens": sum(step["real"] for step in clock.steps),
        "tokens_per_micro_batch": total["real"] / total["micro_batches"],
        "padding_share": 1 - total["real"] / total["positions"],
        "quantized_linears": sum(getattr(weight, "quant_state", None) is not None for weight in model.parameters()),
        "storage": _storage(model),
        "micro_batch": trainer.args.per_device_train_batch_size,
        "checkpointing": bool(trainer.args.gradient_checkpointing),
        **memory,
        "threads": torch.get_num_threads(),
    }


def _storage(model: torch.nn.Module) -> str:
    if blocked_bytes(model):
        return "blocked"
    return "expanded" if any(hasattr(module, EXPANDED) for module in model.modules()) else "packed"


def main(argv: Sequence[str]) -> None:
    arm, specification, result = argv
    spec = Specification(**json.loads(Path(specification).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(run(arm, spec)), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
