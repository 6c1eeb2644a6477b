"""What a run was started as, and every time it was resumed: `--resume` continues that run and no other.

Knows nothing of tensors.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

from accelerate import PartialState

from qlora_recipes import environment
from qlora_recipes.errors import RunFolderError, UsageError
from qlora_recipes.fields import fields_of
from qlora_recipes.recipe import config_of
from qlora_recipes.run.checkpoints import Checkpoint, newest_intact
from qlora_recipes.run.differences import MISSING, differences, shortened
from qlora_recipes.run.files import read_record, write_json
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Resume, Started
from qlora_recipes.settings import AUTO_FIELDS, Settings, public
from qlora_recipes.stages import Run

_FIX = (
    "Without it nothing shows that this is the run to resume: give --output_dir another folder, or --overwrite to "
    "start again in this one"
)
_ROWS, _ACCUMULATED = "per_device_train_batch_size", "gradient_accumulation_steps"
# Settings that decide what is kept and shown of a run, but not its weights.
_FREE = ("save_", "logging_", "log_", "report_to", "run_name", "hub_", "push_to_hub", "dataloader_", "disable_tqdm")


def settings_identity(settings: Settings) -> dict[str, Any]:
    """Return what must be equal for a run to be resumed, as far as it is known before anything is loaded."""
    training = {name: value for name, value in public(settings.training).items() if not name.startswith(_FREE)}
    identity = {
        "recipe": settings.name,
        "model": settings.model,
        "revision": settings.revision,
        "dataset": settings.dataset_name,
        "precision": settings.precision.name,
        "dtype": settings.dtype,
        "lora": public(settings.lora),
        "training": training,
        "from run": settings.start and settings.start.receipt.adapter.final_sha256,
        "processes": PartialState().num_processes,
    }
    return cast(dict[str, Any], json.loads(json.dumps(identity, default=str)))  # as the file gives it back


def run_identity(asked: Settings, run: Run, initial_sha256: str) -> dict[str, Any]:
    """Return all that must be equal: the settings, and what they made of the data, the base and the adapter."""
    return {
        **settings_identity(asked),
        "rows": run.data.receipt.fingerprint,
        "template": run.data.template.sha256,
        "base weights": run.base.sha256,
        "first adapter": initial_sha256,
    }


def restore_batch(settings: Settings, folder: RunFolder) -> Settings:
    """Return settings with their auto fields as they were when the run in a folder started, on whatever machine.

    With another number of processes than then, gradients are accumulated as often as keeps the global batch.

    Raises:
        RunFolderError: when `started.json` is damaged, naming the key.
        UsageError: when that number of processes does not divide the global batch.
    """
    run = Journal(folder).read().run
    was = run["training"]
    names = {name for group in settings.auto_fields for name in AUTO_FIELDS[group]} & was.keys()
    try:
        restored = {name: fields_of(config_of(settings.recipe))[name].check(was[name]) for name in names}
    except UsageError as error:
        raise RunFolderError(f"{folder.started}, key run.training.{error}. {_FIX}") from error
    restored = {**settings.training, **restored}
    if run.get("processes", now := PartialState().num_processes) != now:
        restored = _divide_batch(restored, run, folder)
    return replace(settings, training=restored, auto_fields=frozenset())


def _divide_batch(training: Mapping[str, Any], run: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Return settings with the global batch of a run that another number of processes started."""
    was, processes, rows = _batch(run), PartialState().num_processes, training.get(_ROWS, 8)
    for name, value in zip((f"training.{_ROWS}", f"training.{_ACCUMULATED}", "processes"), was, strict=True):
        if not isinstance(value, int) or value < 1:
            raise RunFolderError(f"{folder.started}, key run.{name}: got {value!r:.60}, expected 1 or more. {_FIX}")
    batch = math.prod(was)
    if batch % (rows * processes):
        per_process = f"--{_ROWS} {math.gcd(rows, batch // processes)}" if batch % processes == 0 else ""
        fix = per_process or f"a number of processes that divides {batch}"
        raise UsageError(
            f"--resume: {folder.path} has {batch} rows a step, and {processes} processes of {rows} rows each do not "
            f"divide them; expected {fix}"
        )
    if training.get(_ACCUMULATED, 1) != was[1]:
        return dict(training)  # the user's, which is compared with the run's as a whole
    return {**training, _ACCUMULATED: batch // (rows * processes)}


def _batch(run: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return the rows, accumulation and processes of a run, whose product is its global batch."""
    return run["training"].get(_ROWS, 8), run["training"].get(_ACCUMULATED, 1), run["processes"]


def _undivided(identity: Mapping[str, Any], was: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an identity as it is with another number of processes, where the global batch is the same."""
    batches = [_batch(identity), _batch(was)]
    if not all(isinstance(part, int) for batch in batches for part in batch) or len(set(map(math.prod, batches))) > 1:
        return identity
    divided = {name: was["training"][name] for name in (_ROWS, _ACCUMULATED) if name in was["training"]}
    return {**identity, "processes": was["processes"], "training": {**identity["training"], **divided}}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Journal:
    """The file `started.json` of a run folder; reading one that is missing, damaged or edited is a RunFolderError."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Record what a new run is."""
        write_json(self.folder.started, asdict(Started(_now(), dict(identity), environment.versions())))

    def refuse_another(self, identity: Mapping[str, Any]) -> None:
        """Raise when the folder holds a run that differs in what `identity` names.

        Raises:
            RunFolderError: naming every difference.
        """
        was = self.read().run
        if was.get("processes", identity["processes"]) != identity["processes"]:
            identity = _undivided(identity, was)
        pairs = differences({key: was.get(key, MISSING) for key in identity}, identity)
        found = [(key, *(MISSING if value is None else value for value in values)) for key, *values in pairs]
        lines = [f"  {key}: was {shortened(a)}, now {shortened(b)}" for key, a, b in sorted(found) if a != b]
        if lines:
            raise RunFolderError(
                f"{self.folder.path} holds another run, and --resume continues the same one only. They differ in\n"
                + "\n".join(lines)
                + "\nGive the flags that it was started with, or another --output_dir"
            )

    def note(self, checkpoint: Checkpoint | None, passed_over: Mapping[str, str], reason: str) -> Resume:
        """Record that the run is resumed from a checkpoint, or from its beginning, and return what was recorded."""
        content, now = self.read(), environment.versions()
        changed = {name: f"{was} -> {now.get(name)}" for name, was in content.versions.items() if was != now.get(name)}
        saved_by, resumed_by = len(checkpoint.progress) if checkpoint else 0, PartialState().num_processes
        spread = f"{saved_by} -> {resumed_by}" if saved_by not in (0, resumed_by) else ""
        step = checkpoint.step if checkpoint else 0
        resume = Resume(_now(), step, reason, dict(passed_over), changed, spread)
        write_json(self.folder.started, asdict(replace(content, resumes=[*content.resumes, resume])))
        return resume

    def read(self) -> Started:
        """Return what the run is, when it took its folder, and every time that it was resumed."""
        file = self.folder.started
        try:
            content = read_record(file, Started, fix=_FIX)
        except FileNotFoundError as error:
            raise RunFolderError(f"{file} is missing. {_FIX}") from error
        for key in ("lora", "training"):
            if not isinstance(got := content.run.get(key), dict):
                raise RunFolderError(f"{file}, key run.{key}: got {got!r:.60}, expected an object. {_FIX}")
        return content


def find_checkpoint(folder: RunFolder, settings: Settings) -> tuple[Checkpoint | None, dict[str, str]]:
    """Return the newest intact checkpoint of a run and the faults of the newer ones; None to start at step 1.

    Raises:
        RunFolderError: for a folder that holds a finished run, another run, or only damaged checkpoints.
    """
    if folder.finished:
        raise RunFolderError(f"{folder.path} holds a finished run; nothing is left to resume. Leave --resume out")
    if not folder.started.exists():
        folder.check_free()  # a run that ended before its first step left nothing
        return None, {}
    Journal(folder).refuse_another(settings_identity(settings))
    found, passed_over = newest_intact(folder.checkpoints)
    if found is None and passed_over:
        faults = "\n".join(f"  {name}: {fault}" for name, fault in passed_over.items())
        raise RunFolderError(
            f"no checkpoint in {folder.checkpoints} is intact:\n{faults}\n"
            "Give --overwrite to start again in this folder, or --output_dir another one"
        )
    return found, passed_over
