"""The folder of one run on disk: the only contract between training, evaluation and comparison."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_recipes.errors import RunFolderError
from qlora_recipes.precision import DTYPES, PRECISIONS
from qlora_recipes.run.files import read_lines, read_record, write_json
from qlora_recipes.run.receipt import LoggedStep, Receipt

RECEIPT = "run.json"
STARTED = "started.json"
_FIX = "Train again with this version, or restore the file from a copy"
_OWN = {
    RECEIPT, STARTED, "adapter", "checkpoints", "metrics.jsonl", "loss.png", "held_out.json", "answers.json",
    "evaluation",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and where its files are."""

    path: Path

    @property
    def adapter(self) -> Path:
        """Adapter weights, tokenizer, chat template and model card."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Resumable states."""
        return self.path / "checkpoints"

    @property
    def started(self) -> Path:
        """What the run was started as, and every time it was resumed."""
        return self.path / STARTED

    @property
    def metrics(self) -> Path:
        """One JSON line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def held_out(self) -> Path:
        """The conversations kept from training."""
        return self.path / "held_out.json"

    @property
    def answers(self) -> Path:
        """Greedy answers to a few held-out questions, written right after training."""
        return self.path / "answers.json"

    @property
    def evaluation(self) -> Path:
        """lm-eval's results and per-document scores."""
        return self.path / "evaluation"

    @property
    def finished(self) -> bool:
        """Whether the run has its receipt, which is written last."""
        return (self.path / RECEIPT).exists()

    def receipt(self) -> Receipt:
        """Return the receipt.

        Raises:
            RunFolderError: when it is missing, damaged, edited or of another schema, naming the key.
        """
        file = self.path / RECEIPT
        try:
            receipt = read_record(file, Receipt, fix=_FIX)
        except FileNotFoundError:
            raise RunFolderError(
                f"{self.path} holds no finished run: {RECEIPT} is missing. Expected a folder that training wrote, "
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
        write_json(self.path / RECEIPT, asdict(receipt))

    def check_free(self, *, overwrite: bool = False) -> None:
        """Refuse a folder that is not empty, unless it holds a run and `overwrite` is set.

        Raises:
            RunFolderError: naming what is there.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            is_run = self.path.is_dir() and {_owner(entry.name) for entry in self.path.iterdir()} <= _OWN
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


def _owner(name: str) -> str:
    """Return the file that a name belongs to: `.run.json.123` is what a killed `write_text` left of `run.json`."""
    return name[1:].rpartition(".")[0] if name.startswith(".") else name
