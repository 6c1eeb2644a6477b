"""The parts of a run before its first step: rows prepared, base loaded, trainer built. Writes nothing.

Knows nothing of checks.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from qlora_recipes import environment
from qlora_recipes.base import repairs
from qlora_recipes.base.adapters import WEIGHTS, attach, set_weights
from qlora_recipes.base.loading import load_base
from qlora_recipes.base.sharding import divides, shard
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.data.arrow_rows import Conversation, Rows
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.prepare import prepare
from qlora_recipes.errors import CheckError, UsageError
from qlora_recipes.kernels import attention
from qlora_recipes.kernels.blocked import lay_out
from qlora_recipes.kernels.dequantize import expand
from qlora_recipes.kernels.elementwise import fuse_norms_and_gates
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.kernels.output_layer import score_supervised_tokens
from qlora_recipes.memory.sizes import described, sizes_for
from qlora_recipes.preflight import ranks
from qlora_recipes.preflight.probes import keeps_apart
from qlora_recipes.run.display import progress_bar
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import StartReceipt
from qlora_recipes.run.weights import adapter_file_sha256
from qlora_recipes.settings import Settings
from qlora_recipes.stages import Loaded, Prepared, Run
from qlora_recipes.training.configuration import evaluates_held_out, make_sft_config
from qlora_recipes.training.trainer import ExactResume, PreferenceTrainer, RunTrainer


def prepare_rows(settings: Settings, console: Console | None = None) -> Run:
    """Return a run with its rows read and encoded; a console that is a terminal shows how many.

    Raises:
        RecipesError: when the tokenizer or the rows cannot be loaded, or no row can be used.
    """
    environment.share_threads()
    trusted = settings.trust_remote_code
    tokenizer = load_tokenizer(settings.spec, settings.model, settings.revision, trust_remote_code=trusted)
    encoder = ConversationEncoder(tokenizer, tokenizer.template)
    if settings.start:
        _check_start(settings.start, encoder)
    with progress_bar("rows", console or Console(quiet=True)) as bar:
        row = bar.add_task("rows", total=None)
        data = ranks.once_per_node(lambda: prepare(settings, encoder, lambda rows: bar.advance(row, rows)))
    return Run(Prepared(settings, tokenizer, encoder, data))


def _check_start(start: StartReceipt, encoder: ConversationEncoder) -> None:
    """Refuse to go on with an adapter that is not its run's, or that was trained on other prompts."""
    file, was = RunFolder(Path(start.run)).adapter / WEIGHTS, start.receipt
    if (got := adapter_file_sha256(file)) != was.adapter.final_sha256:
        raise CheckError(
            f"--from_run {start.run}: its adapter has the hash {got[:12]}, and the receipt has "
            f"{was.adapter.final_sha256[:12]}. The weights in adapter/ are another run's or damaged: train it again"
        )
    template = encoder.template
    if (template.sha256, encoder.end_token) != (was.template.sha256, was.template.end_token):
        raise UsageError(
            f"--from_run {start.run}: got the chat template {template.name} ({template.sha256[:12]}), expected the one "
            f"that its adapter was trained with, {was.template.name} ({was.template.sha256[:12]}). Set the same "
            "chat_template in the recipe's ModelSpec"
        )


def load_model(run: Run) -> Run:
    """Return the run with its base loaded and counted, and on it a new adapter, or that of the run to start from.

    Raises:
        RecipesError: when the base cannot be loaded, or is not stored as the precision says.
    """
    settings, device = run.settings, PartialState().device
    if settings.training.get("full_determinism"):  # PyTorch looks at it before a GPU's first product, and never again
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    base, receipt, made = load_base(
        settings.model,
        settings.revision,
        settings.precision,
        settings.dtype,
        device=device,
        divide=divides(),
        trust_remote_code=settings.trust_remote_code,
    )
    receipt.architecture = described(sizes_for(settings))
    if settings.storage == "blocked":
        lay_out(base)
    elif settings.storage == "expanded":
        expand(base, getattr(torch, settings.dtype))
    receipt.storage = settings.storage
    base_bytes = environment.peak_bytes(device.type)  # without the adapter
    model = attach(base, settings.lora, settings.seed, receipt.revision)
    if settings.start:
        set_weights(model, RunFolder(Path(settings.start.run)).adapter)
    if settings.lora.get("use_dora"):
        made.append("float32_dora_norm")
    if divides():
        shard(model)
    return replace(run, loaded=Loaded(receipt, model, [*run.tokenizer.repairs, *made], base_bytes))


def build_trainer(run: Run, folder: RunFolder) -> ExactResume:
    """Return the trainer of a run, with float32 adapter weights whatever the base is stored as.

    Raises:
        UsageError: when SFTConfig refuses the settings, they need held-out rows and none were kept, or they pack rows
            for a model that would mix them.
    """
    evaluates, patience = evaluates_held_out(run.settings), run.settings.training.get("early_stopping_patience")
    if evaluates and not run.data.held_out:
        raise UsageError("--eval_strategy needs held-out rows, and none were kept; set DatasetSpec.held_out above 0")
    score_supervised_tokens()
    if run.model.device.type == "cpu":
        environment.keep_freed_memory()
    settings, padding_free = run.settings, has_own_attention(run)
    given = settings.training
    asked = settings.packing_asked and (given.get("packing") or given.get("padding_free"))
    with run.model.disable_adapter():
        if not settings.of_preferences and not keeps_apart(run.model):
            if asked or given.get("eval_packing"):
                raise UsageError(
                    f"--packing: {type(run.model.get_base_model()).__name__} does not keep conversations apart that "
                    "share a row; expected --packing false, and no padding_free or eval_packing: then each gets a row"
                )
            settings, padding_free = replace(settings, training={**given, "packing": False}), False
    with (
        repairs.float32_adapter(cast(PreTrainedModel, run.model)) as repaired,
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as aside,  # the Trainer makes its output folder at once; nothing is written yet
    ):
        # Raised for every model that TRL did not load itself; the loss mask is ours and is counted.
        warnings.filterwarnings("ignore", message=".*You passed `model_init_kwargs`.*")
        kind: type[ExactResume] = PreferenceTrainer if run.settings.of_preferences else RunTrainer
        trainer = kind(
            model=run.model,
            args=make_sft_config(settings, aside, padding_free=padding_free),
            train_dataset=_dataset(run, run.data.train),
            eval_dataset=_dataset(run, run.data.held_out) if evaluates else None,
            processing_class=run.tokenizer,
            callbacks=None if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)],
            rows=run.data.train,
            loraplus_lr_ratio=run.settings.training.get("loraplus_lr_ratio"),
        )
    trainer.args.output_dir = str(folder.checkpoints)
    if trainer.is_fsdp_enabled:
        # The autocast of every other run, in whose place accelerate has a policy of its own.
        trainer.accelerator.prepare_model(run.model, device_placement=False, evaluation_mode=True)
        # Checkpoints hold an adapter whole. Accelerate keeps the options of the type that was set before.
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("FULL_STATE_DICT")
    fuse_lora_layers(run.model)
    fuse_norms_and_gates(run.model)
    if repaired:
        run.repairs.append("float32_adapter")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _dataset(run: Run, rows: Sequence[Conversation]) -> Dataset:
    stored = cast(Rows, rows)
    return stored.pairs() if run.settings.of_preferences else stored.dataset()


def has_own_attention(run: Run) -> bool:
    """Whether the base computes attention with the function of this package, which needs no padding."""
    return bool(run.model.config._attn_implementation == attention.NAME)
