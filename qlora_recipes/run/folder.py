"""The folder of one run on disk: the only contract between training, evaluation and comparison.

Knows nothing of models.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path

from qlora_recipes.errors import RunFolderError
from qlora_recipes.precision import DTYPES, PRECISIONS
from qlora_recipes.run.files import read_lines, read_record, write_json
from qlora_recipes.run.receipt import LoggedStep, Receipt

_FIX = "Train again with this version, or restore the file from a copy"


class RunFolder:
    """The folder of one run, and where its files are."""

    def __init__(self, path: Path) -> None:
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
        self.held_out = path / "held_out.json"
        """The conversations kept from training."""
        self.answers = path / "answers.json"
        """Greedy answers to a few held-out questions, written right after training."""
        self.evaluation = path / "evaluation"
        """lm-eval's results and per-document scores."""
        self._receipt = path / "run.json"
        self._own = {file.name for file in vars(self).values() if file != path}

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
            re.compile(receipt.template.role_markers)
        except (re.error, RecursionError, OverflowError) as error:
            raise RunFolderError(
                f"{file}, key template.role_markers: got no regular expression ({error}), expected the one of the "
                f"chat template. {_FIX}"
            ) from error
        return receipt

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

    def check_free(self, *, overwrite: bool = False) -> None:
        """Refuse a folder that is not empty, unless it holds a run and `overwrite` is set.

        Raises:
            RunFolderError: naming what is there.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            # `.run.json.123` is what a killed `write_text` left of `run.json`
            is_run = self.path.is_dir() and self._own.issuperset(
                re.sub(r"^\.(.+)\.\d+$", r"\1", entry.name) for entry in self.path.iterdir()
            )
            if not (overwrite and is_run):
                what = "a finished run" if self.finished else "an unfinished run" if is_run else "other files"
                hint = "or --overwrite to replace it" if is_run else "so that nothing in this one is lost"
                raise RunFolderError(f"{self.path} holds {what}. Give --output_dir another folder, {hint}")

    def claim(self, *, overwrite: bool = False) -> None:
        """Make the folder for a new run, replacing an old one when `overwrite` is set."""
        self.check_free(overwrite=overwrite)
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
