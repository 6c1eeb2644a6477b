"""What a run was started as, and every time it was resumed: `--resume` continues that run and no other."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import PartialState

from qlora_recipes import environment
from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.checkpoints import Checkpoint, newest_intact
from qlora_recipes.run.files import read_record, write_json
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Resume
from qlora_recipes.settings import AUTO_FIELDS, Settings, public
from qlora_recipes.stages import Run

# Settings that decide what is saved and shown of a run, and change none of its weights.
_FREE = ("save_", "logging_", "log_", "report_to", "run_name", "hub_", "push_to_hub", "dataloader_", "disable_tqdm")


def settings_identity(settings: Settings) -> dict[str, Any]:
    """Return what must be equal for a run to be resumed, as far as it is known before anything is loaded."""
    training = {name: value for name, value in public(settings.training).items() if not name.startswith(_FREE)}
    return _plain(
        {
            "recipe": settings.name,
            "model": settings.model,
            "revision": settings.revision,
            "dataset": settings.dataset_name,
            "precision": settings.precision.name,
            "dtype": settings.dtype,
            "lora": dict(settings.lora),
            "training": training,
        }
    )


def run_identity(asked: Settings, run: Run, initial_sha256: str) -> dict[str, Any]:
    """Return all that must be equal: the settings, and what they made of the data, the base and the adapter."""
    return {
        **settings_identity(asked),
        "rows": run.data.receipt.fingerprint,
        "template": run.data.template.sha256,
        "base weights": run.base.sha256,
        "first adapter": initial_sha256,
        "processes": PartialState().num_processes,
    }


def restore_batch(settings: Settings, folder: RunFolder) -> Settings:
    """Return settings whose automatic fields are those that the run in a folder was started with, on any machine."""
    was = Journal(folder).identity.get("training", {})
    names = {name for group in settings.auto_fields for name in AUTO_FIELDS[group]} & was.keys()
    return replace(
        settings,
        training={**settings.training, **{name: was[name] for name in names}},
        auto_fields=frozenset(),
    )


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content as it is when read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return plain


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class _Started:
    """What `started.json` holds."""

    started: str
    """UTC, ISO 8601."""
    run: dict[str, Any]
    """What the run is: see `run_identity`."""
    versions: dict[str, str]
    resumes: list[Resume]


class Journal:
    """The file `started.json` of a run folder; reading one that is missing, damaged or edited is a RunFolderError."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Record what a new run is."""
        self._write(_Started(_now(), dict(identity), environment.versions(), []))

    def refuse_another(self, identity: Mapping[str, Any]) -> None:
        """Raise when the folder holds a run that differs in what `identity` names.

        Raises:
            RunFolderError: naming every difference.
        """
        found = list(_differences(self.identity, identity))
        if found:
            lines = "\n".join(f"  {name}: was {_short(was)}, now {_short(now)}" for name, was, now in found)
            raise RunFolderError(
                f"{self.folder.path} holds another run, and --resume continues only the same one. They differ in\n"
                f"{lines}\nGive the flags that it was started with, or another --output_dir"
            )

    def note(self, step: int, passed_over: Mapping[str, str], reason: str) -> Resume:
        """Record that the run is resumed from a step, and return what was recorded."""
        content, now = self._read(), environment.versions()
        changed = {name: f"{was} -> {now.get(name)}" for name, was in content.versions.items() if was != now.get(name)}
        resume = Resume(_now(), step, reason, dict(passed_over), changed)
        self._write(replace(content, resumes=[*content.resumes, resume]))
        return resume

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is."""
        return self._read().run

    @property
    def started(self) -> str:
        """When the run took its folder, UTC in ISO 8601."""
        return self._read().started

    @property
    def resumes(self) -> list[Resume]:
        """Every time that the run was resumed."""
        return self._read().resumes

    def _read(self) -> _Started:
        fix = "It is unknown which run to resume: give --output_dir another folder, or --overwrite to start again here"
        try:
            return read_record(self.folder.started, _Started, fix=fix)
        except FileNotFoundError:
            raise RunFolderError(f"{self.folder.started} is missing. {fix}") from None

    def _write(self, content: _Started) -> None:
        write_json(self.folder.started, asdict(content))


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each dotted name in `now` whose value differs from that in `was`."""
    if isinstance(was, dict) and isinstance(now, dict) and name in ("", "lora", "training"):
        for key in now if not name else sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def find_checkpoint(folder: RunFolder, settings: Settings) -> tuple[Checkpoint | None, dict[str, str]]:
    """Return the newest intact checkpoint of a run and the faults of the newer ones; None to start at step 1.

    Raises:
        RunFolderError: for a folder that holds a finished run, another run, or only damaged checkpoints.
    """
    if folder.finished:
        raise RunFolderError(f"{folder.path} holds a finished run; there is nothing to resume. Leave --resume out")
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
