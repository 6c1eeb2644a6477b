"""The folder of one run on disk: the only contract between training, evaluation and comparison.

Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from qlora_recipes.errors import RunFolderError
from qlora_recipes.precision import DTYPES, PRECISIONS
from qlora_recipes.run.files import read_bytes, read_lines, read_record, write_json
from qlora_recipes.run.receipt import LoggedStep, Receipt, StartReceipt

_FIX = "Train again with this version, or restore the file from a copy"
_ELSEWHERE = "Give --output_dir another folder"
_REPLACEMENT = "replacement"
_WRITING = re.compile(r"^\.(.+)\.\d+$")  # `.run.json.123` is what a killed `write_text` left of `run.json`


class RunFolder:
    """The folder of one run, and where its files are."""

    def __init__(self, path: Path, *, replaces: RunFolder | None = None) -> None:
        self.path = path
        self.started = path / "started.json"
        """What the run was started as, and every time it was resumed."""
        self.checkpoints = path / "checkpoints"
        """Resumable states."""
        self.metrics = path / "metrics.jsonl"
        """One JSON line for each logged step."""
        self.loss_plot = path / "loss.png"
        self.adapter = path / "adapter"
        """Adapter weights, tokenizer, chat template and model card."""
        self.unproven = path / "unproven"
        """What was trained, until every check after training has passed; then it becomes `adapter`."""
        self.held_out = path / "held_out.json"
        """The conversations kept from training."""
        self.answers = path / "answers.json"
        """Greedy answers to a few held-out questions, written right after training."""
        self.evaluation = path / "evaluation"
        """lm-eval's results and per-document scores."""
        self.asked = path / "asked"
        """Answers of `qlora-recipes ask`, where it is given no other folder."""
        self.merged = path / "merged"
        """The adapter merged into 16-bit weights, where `qlora-recipes merge` is given no other folder."""
        self._receipt = path / "run.json"
        self._own = {file.name for file in vars(self).values() if file != path} | {_REPLACEMENT}
        self.replaces = replaces
        """The run that this one is to replace when it is finished."""

    @property
    def replacement(self) -> RunFolder:
        """The folder in this one in which the run that is to replace it is made."""
        return RunFolder(self.path / _REPLACEMENT, replaces=self)

    @property
    def to_resume(self) -> RunFolder:
        """The folder of the run that `--resume` continues: an unfinished replacement, or else this one."""
        return self.replacement if self.replacement.started.exists() else self

    @property
    def finished(self) -> bool:
        """Whether the run has its receipt, which is written last."""
        return self._receipt.exists()

    def receipt(self) -> Receipt:
        """Return the receipt.

        Raises:
            RunFolderError: when it is missing, damaged, edited or of another schema, naming the key.
        """
        file = self._receipt
        try:
            receipt = read_record(file, Receipt, fix=_FIX)
        except FileNotFoundError:
            raise RunFolderError(
                f"{self.path} holds no finished run: {file.name} is missing. Expected a folder that training wrote, "
                "such as runs/llama2_guanaco-demo/nf4-seed0"
            ) from None
        for key, got, known in (("precision", receipt.precision, PRECISIONS), ("dtype", receipt.dtype, DTYPES)):
            if got not in known:
                raise RunFolderError(f"{file}, key {key}: got {got!r}, expected one of {', '.join(known)}. {_FIX}")
        try:
            re.compile(receipt.template.role_markers or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise RunFolderError(
                f"{file}, key template.role_markers: got no regular expression ({error}), expected the one of the "
                f"chat template. {_FIX}"
            ) from error
        return receipt

    def as_start(self) -> StartReceipt:
        """Return what a run that begins with this one's adapter records of it; raises as `receipt` does."""
        receipt = self.receipt()
        return StartReceipt(str(self.path), hashlib.sha256(read_bytes(self._receipt, fix=_FIX)).hexdigest(), receipt)

    def logged_steps(self) -> list[LoggedStep]:
        """Return the logged steps of the training; none where there is no such file.

        Raises:
            RunFolderError: for a line that is damaged, naming it.
        """
        try:
            return read_lines(self.metrics, LoggedStep, fix=_FIX)
        except FileNotFoundError:
            return []

    def write_receipt(self, receipt: Receipt) -> None:
        """Write `run.json`, whole or not at all."""
        write_json(self._receipt, asdict(receipt))

    def check_free(self, *, overwrite: bool = False) -> RunFolder:
        """Return the folder to make a new run in: this one, or with `overwrite` and a run in it, its `replacement`.

        What a killed run left before it had written down what it is does not count.

        Raises:
            RunFolderError: naming what is there.
        """
        for above in () if self.replaces else Path(os.path.realpath(self.path)).parents:
            if any(os.path.lexists(above / file.name) for file in (self._receipt, self.started)):
                raise RunFolderError(f"{self.path} is inside a run, {above}, and would go with it. {_ELSEWHERE}")
        if not os.path.lexists(self.path):
            return self
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else ["it is no folder"]
        other = sorted(name for name in names if not self._is_own(name))
        if not other and all(map(_WRITING.match, names)):
            return self
        run = "a finished run" if self._receipt.is_file() else "an unfinished run" if self.started.is_file() else ""
        if run and not other:
            if overwrite:
                return self.replacement
            if self.replacement.started.is_file():
                run += " and the unfinished one that is to replace it, which --resume continues"
            raise RunFolderError(f"{self.path} holds {run}. {_ELSEWHERE}, or --overwrite to replace it")
        named = ", ".join(other[:3] or sorted(names)[:3])
        raise RunFolderError(
            f"{self.path} holds {f'{run} and ' if run else ''}other files than a run's ({named}). "
            f"{_ELSEWHERE}, so that nothing in this one is lost"
        )

    def claim(self) -> None:
        """Make the folder for a new run; what an earlier, unfinished replacement left in it is removed.

        Raises:
            RunFolderError: when another run has taken it.
        """
        if self.replaces:
            shutil.rmtree(self.path, ignore_errors=True)
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)

    def release(self) -> None:
        """Remove the beginning of a run that failed before it had logged a step or saved a checkpoint."""
        if any(self.checkpoints.glob("*checkpoint-*")) or (self.metrics.is_file() and self.metrics.stat().st_size):
            return
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for file in (self.metrics, self.started):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or the current folder
            self.path.rmdir()

    def put_in_place(self) -> RunFolder:
        """Move a finished replacement to where the run is that it replaces, remove that, and return its folder.

        A kill in it loses nothing: called again, it does what is left. Any other folder is returned as it is.
        """
        if not (final := self.replaces) or self.path.is_symlink():  # a link can lead to somebody's own files
            return self
        replaced = self.path / "replaced"
        if self.finished:
            if self.started.exists():  # it leaves first, and the receipt last
                replaced.mkdir(exist_ok=True)
                for entry in list(final.path.iterdir()):
                    if entry != self.path and self._is_own(entry.name):
                        entry.rename(replaced / entry.name)
            leaving = [entry for entry in self.path.iterdir() if entry != replaced]
            for entry in sorted(leaving, key=lambda entry: (entry != self.started, entry == self._receipt)):
                entry.rename(final.path / entry.name)
        if final.finished and replaced.is_dir() and not self.started.exists():
            shutil.rmtree(self.path)
        return final

    def _is_own(self, name: str) -> bool:
        """Return whether a run writes something of this name, or left it there when it was killed while writing."""
        return _WRITING.sub(r"\1", name) in self._own
