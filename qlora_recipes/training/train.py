"""Train one run: prepare, check, train with SFTTrainer, check what came out, write the run folder. Knows no flag."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from trl import SFTTrainer

from qlora_recipes import environment, preflight
from qlora_recipes.base.adapters import WEIGHTS, adapter_sha256, tensor_hashes
from qlora_recipes.base.device import check_gpu, is_out_of_memory
from qlora_recipes.errors import CheckError, RunFolderError, UsageError
from qlora_recipes.kernels import blocked
from qlora_recipes.memory.fitting import USABLE, Machine, describe, fit_to_memory
from qlora_recipes.preflight import ranks
from qlora_recipes.report.card import model_card
from qlora_recipes.run.checkpoints import Checkpoint
from qlora_recipes.run.display import say
from qlora_recipes.run.files import write_json, write_text
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Check, Receipt, SettingsReceipt, SpreadReceipt, Started, TrainingReceipt
from qlora_recipes.run.signals import Stopped, StopSignals
from qlora_recipes.settings import Settings, public
from qlora_recipes.stages import Run, Trained
from qlora_recipes.training import accounting
from qlora_recipes.training.build import build_trainer, has_own_attention, load_model, prepare_rows
from qlora_recipes.training.configuration import check_settings, refusals
from qlora_recipes.training.faults import MemoryExhaustedError, batch_of, halve_batch, machine_faults
from qlora_recipes.training.journal import Journal, find_checkpoint, restore_batch, run_identity, settings_identity
from qlora_recipes.training.progress import MetricsFile, ProgressDisplay, plot_loss, print_resume
from qlora_recipes.training.spread import describe_spread
from qlora_recipes.training.trackers import add_run_figures
from qlora_recipes.training.trainer import ExactResume


def train(
    settings: Settings,
    *,
    command: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    skip_checks: Sequence[str] = (),
    all_checks: bool = False,
    console: Console | None = None,
) -> RunFolder:
    """Train one run and return its folder, which has a receipt only if every check passed or was skipped.

    With `overwrite` a run that is in the folder stays until the new one is finished, and is then replaced by it.
    `skip_checks` names checks to leave out; the receipt says which. With `all_checks` each is shown on a line of its
    own. Where memory runs out and `auto_find_batch_size` is set, the run is tried again with half the batch.

    Raises:
        RecipesError: for anything that would make the run fail, or be something other than it claims. A check that
            fails before training leaves nothing behind; one that fails afterwards leaves a folder without a receipt,
            with what was trained in `unproven`.
    """
    console = console or Console()
    with machine_faults(settings):
        environment.check_sharding()  # also of a script, which no command has looked at
        _meet(settings, resume=resume, overwrite=overwrite, skip_checks=list(skip_checks))
        settings = finalize_settings(settings, resume=resume, console=console)
    launch = _Launch(settings, settings, command, overwrite, resume, skip_checks, all_checks, console)
    while True:
        try:
            with StopSignals() as signals, machine_faults(launch.settings):
                return _train(launch, signals)
        except MemoryExhaustedError:
            smaller = halve_batch(launch.settings)
            if smaller is None or not signals.loop_runs:  # with no step begun, the base alone is too large
                raise
        reason = f"out of memory with {batch_of(launch.settings)}, now {batch_of(smaller)}"
        launch = replace(launch, settings=smaller, overwrite=False, resume=True, reason=reason)


def _meet(settings: Settings, **flags: Any) -> None:
    """Wait for the other processes of the run, if there are any, and make sure that all were started alike."""
    if not ranks.several():
        return
    timeout = settings.training.get("ddp_timeout", 1800)
    file = getattr(sys.modules.get(settings.recipe.__module__), "__file__", None)  # none in a notebook
    facts = {
        **settings_identity(settings),
        "training": public(settings.training),
        "recipe file": file and hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12],
        "versions": environment.versions(),
        **flags,
    }
    ranks.meet(facts, timeout)
    PartialState(timeout=timedelta(seconds=timeout))  # the first one made decides for all
    ranks.prove_shared(settings.output_dir)


def finalize_settings(settings: Settings, *, resume: bool = False, console: Console | None = None) -> Settings:
    """Return the settings with every automatic field set: as the run to resume has it, or fitted to this machine.

    Raises:
        UsageError: for what a library would refuse once the base is loaded.
        SetupError: for a GPU that PyTorch cannot use, unless the CPU was asked for.
    """
    check_gpu()
    check_settings(settings)
    folder = RunFolder(settings.output_dir).to_resume
    if resume and folder.started.exists():
        settings = restore_batch(settings, folder)
    here = machine()
    if settings.storage == "blocked" and not (here.blocks and settings.dtype == "bfloat16"):
        raise UsageError(
            f"--storage blocked: got {settings.dtype} on {here.device}, expected bfloat16 on a CPU that multiplies in "
            "it (avx512_bf16 or AMX). Leave it out"
        )
    found = fit_to_memory(settings, here)
    if settings.auto_fields and PartialState().is_main_process and (figures := describe(found, here)):
        (console or Console()).print(Text(f"fitted to this machine: {figures}"))
    return found


def machine() -> Machine:
    """Return what one process of a run can use of this machine."""
    state = PartialState()
    return Machine(
        device=state.device.type,
        bytes=int(USABLE * environment.usable_bytes(state.device.type, environment.local_processes())),
        processes=state.num_processes,
        sharded=environment.sharding_asked() is not None,
        blocks=state.device.type == "cpu" and blocked.is_available(),
    )


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
    all_checks: bool
    console: Console
    reason: str = ""
    """Why this is not the first attempt."""


def _train(launch: _Launch, signals: StopSignals) -> RunFolder:
    """Make one attempt at a run, from its settings to its receipt."""
    final = RunFolder(launch.settings.output_dir)
    if PartialState().is_main_process:
        final.replacement.put_in_place()  # a kill may have come before
    PartialState().wait_for_everyone()
    if launch.resume:
        folder = final.to_resume
        checkpoint, passed_over = find_checkpoint(folder, launch.asked)
    else:
        folder = final.check_free(overwrite=launch.overwrite)
        checkpoint, passed_over = None, {}
    launch = replace(launch, settings=replace(launch.settings, output_dir=folder.path))
    run, checks = prepare_run(
        launch.settings, skip_checks=launch.skip_checks, all_checks=launch.all_checks, console=launch.console
    )

    # DoRA's first magnitudes follow from how the base is stored, but not those that another run has trained
    initial = adapter_sha256(run.model, without=None if launch.settings.start else "lora_magnitude_vector")
    before = tensor_hashes(run.model)
    journal = _open_journal(launch, folder, run_identity(launch.asked, run, initial), checkpoint, passed_over)

    held = accounting.non_weight_bytes(run.model)
    environment.reset_peak(PartialState().device.type)
    training = _run_steps(launch, run, folder, signals, checkpoint)
    memory = accounting.describe_memory(run, held)
    spread = describe_spread(run.trainer, memory.peak_bytes)
    run = replace(run, trained=Trained(accounting.describe_adapter(run, initial, before), folder, memory))

    checks += _prove(run, launch)
    if PartialState().is_main_process:
        _write_results(launch, run, journal.read(), training, spread, checks)
        folder.put_in_place()
    PartialState().wait_for_everyone()
    return final


def prepare_run(
    settings: Settings,
    *,
    skip_checks: Sequence[str] = (),
    all_checks: bool = False,
    console: Console | None = None,
) -> tuple[Run, list[Check]]:
    """Do everything that comes before the first step, print what was checked of it, and write nothing.

    Raises:
        RecipesError: for anything that would make the run fail, or be something other than it claims.
    """
    preflight.check_names(skip_checks, preflight.names(settings.recipe))
    console = console or Console()
    main = Console(quiet=True) if not PartialState().is_main_process else console
    say(f"reading and encoding {settings.dataset_name}", main)
    run = prepare_rows(settings, main)
    fitted = {"training": public(settings.training), "storage": settings.storage}  # to the memory of each node
    ranks.agree({"rows": run.data.receipt.fingerprint, "template": run.data.template.sha256, **fitted})
    say("checking the rows", main)
    checks = preflight.run_checks(preflight.BEFORE_LOADING, run, skip_checks)
    _refuse_failed(checks, "Before loading the base", main, all_checks, last=False)  # which takes minutes

    say(f"loading {settings.model} in {settings.precision.name}", main)
    with refusals(settings):
        run = load_model(run)
        say("checking what the first step needs", main)
        run = replace(run, built=build_trainer(run, RunFolder(settings.output_dir)))
    mixes = has_own_attention(run) and not settings.of_preferences and not settings.packing_asked
    if mixes and not cast(SFTTrainer, run.trainer).padding_free:
        say("each conversation gets a row, because this model would mix those that share one", main)
    checks += preflight.run_checks(preflight.before_training(settings.recipe), run, skip_checks)
    _refuse_failed(checks, "Before training", main, all_checks)
    return run, checks


def _refuse_failed(
    checks: Sequence[Check], title: str, console: Console, all_checks: bool, *, last: bool = True
) -> None:
    """Raise when one of the checks failed; print them then, and when they are the last of their table."""
    failed = any(check.verdict == "fail" for check in checks)
    if last or failed:
        if all_checks:
            preflight.print_checks(checks, title, console)
        else:
            preflight.print_groups(checks, title, console, preflight.GROUPS)
    preflight.refuse_failed(checks)


def _open_journal(
    launch: _Launch,
    folder: RunFolder,
    identity: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    passed_over: Mapping[str, str],
) -> Journal:
    """Claim the folder for a new run, or make sure that it holds this run and record that it is resumed."""
    journal, main = Journal(folder), PartialState().is_main_process
    if launch.resume and folder.started.exists():
        journal.refuse_another(identity)
        if main:
            resume = journal.note(checkpoint, passed_over, launch.reason)
            print_resume(resume, launch.console)
    elif main:
        folder.claim()
        journal.begin(identity)
        if folder.replaces:
            launch.console.print(Text(f"{folder.path}: replaces the run in {folder.replaces.path} when it is finished"))
        if launch.resume:
            launch.console.print(Text(f"no checkpoint to resume in {folder.path}; starting from step 1"))
    PartialState().wait_for_everyone()
    return journal


def _run_steps(
    launch: _Launch, run: Run, folder: RunFolder, signals: StopSignals, checkpoint: Checkpoint | None
) -> TrainingReceipt:
    """Train to the last step, and return what was done."""
    trainer, main = cast(ExactResume, run.trainer), PartialState().is_main_process
    display = ProgressDisplay(launch.console)
    trainer.signals = signals
    add_run_figures(run)
    if main:
        trainer.add_callback(display)
        trainer.add_callback(MetricsFile(folder.metrics))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except Stopped as stopped:
        if main and stopped.step is not None:
            where = f"{folder.path} has the checkpoint of step {stopped.step}"
            how = "resume with the same command and --resume" + " in place of --overwrite" * launch.overwrite
            print(f"stopped by {stopped.signal.name}: {where}; {how}", file=sys.stderr)
        raise
    except pickle.UnpicklingError as error:
        raise RunFolderError(
            f"{checkpoint.path if checkpoint else folder.path} holds more than tensors and numbers, and none of it was "
            "run: it is not a checkpoint of this package. Remove it to resume from the one before it"
        ) from error
    except Exception as error:
        again = is_out_of_memory(error) and halve_batch(launch.settings)
        if main and not again:
            folder.release()  # the command with another value finds it free
        raise
    finally:
        display.progress.stop()
    # before anything is proven of it; gathers a sharded adapter, and writes tokenizer and template too
    trainer.save_model(str(folder.unproven))
    PartialState().wait_for_everyone()
    return accounting.describe_training(trainer)


def _prove(run: Run, launch: _Launch) -> list[Check]:
    """Check what was trained and saved, and make it the run's adapter; where a check fails it stays where it is."""
    main = Console(quiet=True) if not PartialState().is_main_process else launch.console
    say("checking and saving what was trained", main)
    try:
        checks = preflight.run_checks(preflight.after_training(run.settings.recipe), run, launch.skip_checks)
        _refuse_failed(checks, "After training", main, launch.all_checks, last=False)
        checks += preflight.run_checks(preflight.AFTER_SAVING, run, launch.skip_checks)
        _refuse_failed(checks, "After training", main, launch.all_checks)
    except CheckError as error:
        raise CheckError(f"{error}\nWhat was trained is in {run.folder.unproven}, without a receipt") from error
    if PartialState().is_main_process:
        shutil.rmtree(run.folder.adapter, ignore_errors=True)  # of a session that was killed before its receipt
        run.folder.unproven.rename(run.folder.adapter)
    return checks


def _write_results(
    launch: _Launch,
    run: Run,
    journal: Started,
    training: TrainingReceipt,
    spread: SpreadReceipt,
    checks: list[Check],
) -> None:
    """Write what a finished run has besides its adapter, and last its receipt."""
    settings, folder = launch.settings, run.folder
    run.adapter.bytes = (folder.adapter / WEIGHTS).stat().st_size
    receipt = Receipt(
        recipe=settings.name,
        precision=settings.precision.name,
        dtype=settings.dtype,
        seed=settings.seed,
        demo=settings.demo,
        settings=SettingsReceipt(
            lora=public(settings.lora),
            training=public(settings.training),
            eval_tasks=list(settings.recipe.eval_tasks),
            method=settings.recipe.method,
        ),
        command=list(launch.command),
        versions=environment.versions(),
        git=environment.git_state(),
        started=journal.started,
        data=run.data.receipt,
        template=run.data.template,
        base=run.base,
        adapter=run.adapter,
        training=training,
        memory=run.memory,
        repairs=run.repairs,
        checks=checks,
        resumes=journal.resumes,
        start=settings.start,
        spread=spread,
    )
    plot_loss(folder.metrics, folder.loss_plot, f"{receipt.recipe}, {receipt.precision}, seed {receipt.seed}")
    write_text(folder.adapter / "README.md", model_card(receipt))
    held_out = [
        {name: value for name in ("place", "messages", "tools", "rejected") if (value := getattr(row, name))}
        for row in run.data.held_out
    ]
    write_json(folder.held_out, held_out)
    folder.write_receipt(receipt)
