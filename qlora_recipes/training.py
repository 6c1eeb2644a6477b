"""Train one run: prepare, load, verify, hand it to SFTTrainer, verify what came out, write the run folder."""

from __future__ import annotations

import pickle
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from qlora_recipes import environment, preflight, repairs
from qlora_recipes.accounting import (
    describe_adapter,
    describe_memory,
    describe_training,
    saved_bytes,
    write_model_card,
)
from qlora_recipes.adapters import adapter_sha256, adapter_tensors, attach
from qlora_recipes.checkpoints import Checkpoint
from qlora_recipes.data import Conversation, PreparedData, prepare
from qlora_recipes.encoding import ConversationEncoder
from qlora_recipes.errors import RunFolderError, UsageError
from qlora_recipes.faults import OutOfMemoryFault, batch_of, machine_faults, with_half_the_batch
from qlora_recipes.loading import load_base, load_tokenizer
from qlora_recipes.preflight import LoadedRun, ReadRun, ReadyRun, TrainedRun
from qlora_recipes.progress import MetricsFile, ProgressDisplay, plot_loss, print_resume
from qlora_recipes.resuming import Journal, find_checkpoint, of_run
from qlora_recipes.runs import AdapterReceipt, Check, Receipt, RunFolder, TrainingReceipt, write_json
from qlora_recipes.settings import Settings, public
from qlora_recipes.stopping import Stopped, StopSignals
from qlora_recipes.trainer import RunTrainer


def prepare_run(
    settings: Settings, *, skip_checks: Sequence[str] = (), console: Console | None = None
) -> tuple[ReadyRun, list[Check]]:
    """Do everything that comes before the first step, print what was checked of it, and write nothing.

    Raises:
        RecipesError: for anything that would make the run fail or mean something else than it says.
    """
    preflight.check_names(skip_checks, preflight.names(settings.recipe))
    read = read_run(settings)
    checks = preflight.run_checks(preflight.BEFORE_LOADING, read, skip_checks)
    _refuse_failed(checks, "Before loading the base", console)  # which takes minutes
    loaded = load_run(read)
    run = ReadyRun(**vars(loaded), trainer=build_trainer(loaded, RunFolder(settings.output_dir)))
    own = [*preflight.BEFORE_TRAINING, *settings.recipe.checks]
    checks += preflight.run_checks(own, run, skip_checks)
    _show(checks, "Before training", console)
    preflight.refuse_failed(checks)
    return run, checks


def read_run(settings: Settings) -> ReadRun:
    """Return a run with its rows read and encoded.

    Raises:
        RecipesError: when the tokenizer or the rows cannot be had, or no row can be used.
    """
    environment.share_threads(PartialState().num_processes)
    tokenizer = load_tokenizer(settings.spec, settings.model, settings.revision)
    encoder = ConversationEncoder(tokenizer, settings.spec.chat_template)
    return ReadRun(settings, tokenizer, encoder, prepare(settings, encoder))


def load_run(run: ReadRun) -> LoadedRun:
    """Return a run with its base loaded and counted, and a new adapter on it.

    Raises:
        RecipesError: when the base cannot be had, or is not stored as the precision says.
    """
    settings, device = run.settings, PartialState().device
    base, receipt, made = load_base(
        settings.model, settings.revision, settings.precision, settings.dtype, device=device
    )
    base_bytes = environment.peak_bytes(device.type)
    model = attach(base, settings.lora, settings.seed)
    made = [*run.tokenizer.repairs, *made]
    return LoadedRun(**vars(run), base=receipt, model=model, repairs=made, base_bytes=base_bytes)


def _refuse_failed(checks: Sequence[Check], title: str, console: Console | None) -> None:
    """Show the checks when one of them failed, and raise."""
    if any(check.verdict == "fail" for check in checks):
        _show(checks, title, console)
    preflight.refuse_failed(checks)


def _show(checks: Sequence[Check], title: str, console: Console | None) -> None:
    if PartialState().is_main_process:
        preflight.print_checks(checks, title, console or Console())


def train(
    settings: Settings,
    *,
    command: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    skip_checks: Sequence[str] = (),
    console: Console | None = None,
) -> RunFolder:
    """Train one run and return its folder, which has a receipt when and only when everything in it is proven.

    `skip_checks` names checks to go without; the receipt says which.

    Raises:
        RecipesError: for anything that would make the run fail or mean something else than it says.
    """
    launch = _Launch(settings, settings, command, overwrite, resume, skip_checks, console or Console())
    while True:
        try:
            with StopSignals() as signals, machine_faults(launch.settings):
                return _train(launch, signals)
        except OutOfMemoryFault:
            smaller = with_half_the_batch(launch.settings)
            if smaller is None or not RunFolder(settings.output_dir).started.exists():
                raise
        reason = f"out of memory with {batch_of(launch.settings)}, now {batch_of(smaller)}"
        launch = replace(launch, settings=smaller, overwrite=False, resume=True, reason=reason)


@dataclass(frozen=True)
class _Launch:
    """What `train` was called with."""

    asked: Settings
    settings: Settings
    """Those asked for, or the same with a smaller batch where memory ran out."""
    command: Sequence[str]
    overwrite: bool
    resume: bool
    skip_checks: Sequence[str]
    console: Console
    reason: str = ""
    """Why this is not the first attempt."""


def _train(launch: _Launch, signals: StopSignals) -> RunFolder:
    folder = RunFolder(launch.settings.output_dir)
    checkpoint, passed_over = _where_to_start(launch, folder)
    run, checks = prepare_run(launch.settings, skip_checks=launch.skip_checks, console=launch.console)
    initial = adapter_sha256(run.model)
    before = {name: tensor.clone() for name, tensor in adapter_tensors(run.model)}
    journal = _open_journal(launch, folder, of_run(launch.asked, run, initial), checkpoint, passed_over)
    seconds = _run_steps(launch, run, folder, signals, checkpoint)
    adapter = describe_adapter(run, initial, before)
    training = describe_training(run.trainer, seconds)
    checks += _prove(TrainedRun(**vars(run), adapter=adapter, folder=folder), launch)
    if PartialState().is_main_process:
        adapter.bytes = saved_bytes(folder)
        _write_results(folder, run, _receipt(launch, run, journal, adapter, training, checks))
    PartialState().wait_for_everyone()
    return folder


def _where_to_start(launch: _Launch, folder: RunFolder) -> tuple[Checkpoint | None, dict[str, str]]:
    """Return the checkpoint to go on from, if any, and the damaged ones passed over; refuse a folder that is taken."""
    if launch.resume:
        return find_checkpoint(folder, launch.asked)
    folder.check_free(overwrite=launch.overwrite)
    return None, {}


def _open_journal(
    launch: _Launch,
    folder: RunFolder,
    identity: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    passed_over: Mapping[str, str],
) -> Journal:
    """Claim the folder for a new run, or make sure that it is this run's and write down that it is gone on with."""
    journal, main = Journal(folder), PartialState().is_main_process
    if launch.resume and folder.started.exists():
        journal.refuse_another(identity)
        if main:
            resume = journal.note(checkpoint.step if checkpoint else 0, passed_over, launch.reason)
            print_resume(resume, launch.console)
    elif main:
        folder.claim(overwrite=launch.overwrite)
        journal.begin(identity)
    PartialState().wait_for_everyone()
    return journal


def _run_steps(
    launch: _Launch, run: ReadyRun, folder: RunFolder, signals: StopSignals, checkpoint: Checkpoint | None
) -> float:
    """Train, and return the seconds that it took."""
    trainer, display = run.trainer, ProgressDisplay(launch.console)
    trainer.signals = signals
    if PartialState().is_main_process:
        trainer.add_callback(display)
        trainer.add_callback(MetricsFile(folder.metrics))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except Stopped as stopped:
        _say_how_to_go_on(stopped, folder)
        raise
    except pickle.UnpicklingError as error:
        raise RunFolderError(
            f"{checkpoint.path if checkpoint else folder.path} holds more than tensors and numbers, and none of it was "
            "run: it is not a checkpoint of this package. Remove it to go on from the one before it"
        ) from error
    finally:
        display.progress.stop()
    return trainer.seconds


def _say_how_to_go_on(stopped: Stopped, folder: RunFolder) -> None:
    if PartialState().is_main_process and stopped.step is not None:
        where = f"{folder.path} has the checkpoint of step {stopped.step}"
        print(f"stopped by {stopped.signal.name}: {where}; the same command with --resume goes on", file=sys.stderr)


def _receipt(
    launch: _Launch,
    run: ReadyRun,
    journal: Journal,
    adapter: AdapterReceipt,
    training: TrainingReceipt,
    checks: list[Check],
) -> Receipt:
    settings = launch.settings
    return Receipt(
        recipe=settings.name,
        precision=settings.precision.name,
        dtype=settings.dtype,
        seed=settings.seed,
        demo=settings.demo,
        settings={
            "lora": dict(settings.lora),
            "training": public(settings.training),
            "eval_tasks": list(settings.recipe.eval_tasks),
        },
        command=list(launch.command),
        versions=environment.versions(),
        git=environment.git_state(),
        started=journal.started,
        data=run.data.receipt,
        template=run.data.template,
        base=run.base,
        adapter=adapter,
        training=training,
        memory=describe_memory(run),
        repairs=run.repairs,
        checks=checks,
        resumes=journal.resumes,
    )


def _write_results(folder: RunFolder, run: ReadyRun, receipt: Receipt) -> None:
    """Write what a finished run has beside its adapter, and last its receipt."""
    title = f"{receipt.recipe}, {receipt.precision}, seed {receipt.seed}"
    plot_loss(folder.metrics, folder.loss_plot, title)
    write_model_card(folder, receipt)
    write_json(folder.held_out, [{"place": row.place, "messages": row.messages} for row in run.data.held_out])
    folder.write_receipt(receipt)


def build_trainer(run: LoadedRun, folder: RunFolder) -> RunTrainer:
    """Return the SFTTrainer of a run, with float32 adapter weights whatever the base."""
    held_out = _held_out(run)
    with (
        repairs.float32_adapter(run.model) as cast,
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as aside,  # the Trainer makes its output folder at once; nothing is written yet
    ):
        # Raised for every model that TRL did not load itself; the loss mask is ours and is counted.
        warnings.filterwarnings("ignore", message=".*You passed `model_init_kwargs`.*")
        trainer = RunTrainer(
            model=run.model,
            args=_sft_config(run.settings, aside),
            train_dataset=PreparedData.dataset(run.data.train),
            eval_dataset=PreparedData.dataset(held_out) if held_out else None,
            processing_class=run.tokenizer,
            callbacks=_early_stopping(run.settings),
            rows=run.data.train,
        )
    trainer.args.output_dir = str(folder.checkpoints)
    if cast:
        run.repairs.append("float32_adapter")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _held_out(run: LoadedRun) -> list[Conversation] | None:
    """Return the rows to evaluate on while training, where that is asked for."""
    if run.settings.training.get("eval_strategy", "no") == "no":
        return None
    if not run.data.held_out:
        raise UsageError("--eval_strategy needs held-out rows, and none were kept; set DatasetSpec.held_out above 0")
    return run.data.held_out


def _early_stopping(settings: Settings) -> list[TrainerCallback]:
    patience = settings.training.get("early_stopping_patience")
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def _sft_config(settings: Settings, folder: str) -> SFTConfig:
    """Return the recipe's SFTConfig fields, and those that follow from other choices."""
    training = dict(settings.training)
    training.pop("auto_find_batch_size", None)  # upstream's starts over with a half-trained adapter; ours does not
    if training.pop("early_stopping_patience", None) is not None:
        training = {"metric_for_best_model": "loss", "load_best_model_at_end": True, **training}
    try:
        return SFTConfig(
            **training,
            output_dir=folder,
            bf16=settings.dtype == "bfloat16",
            fp16=settings.dtype == "float16",
            use_cpu=PartialState().device.type == "cpu",
            disable_tqdm=True,  # the display is ours
            logging_nan_inf_filter=False,  # or a NaN is logged as a loss of 0.0
            restore_callback_states_from_checkpoint=True,  # early stopping's patience goes on where it was
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"SFTConfig refuses these settings: {error}") from error


def _prove(run: TrainedRun, launch: _Launch) -> list[Check]:
    """Check what was trained, save it, and check what was saved; raises where one fails, and no receipt is written."""
    checks = preflight.run_checks(preflight.AFTER_TRAINING, run, launch.skip_checks)
    _refuse_failed(checks, "After training", launch.console)
    _save_adapter(run.trainer, run.folder)
    PartialState().wait_for_everyone()
    checks += preflight.run_checks(preflight.AFTER_SAVING, run, launch.skip_checks)
    _show(checks, "After training", launch.console)
    preflight.refuse_failed(checks)
    return checks


def _save_adapter(trainer: RunTrainer, folder: RunFolder) -> None:
    trainer.save_model(str(folder.adapter))  # gathers a sharded adapter; writes the tokenizer and its template too
