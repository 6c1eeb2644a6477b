"""The folder of one run on disk: the only contract between training, evaluation and comparison."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.receipt import SCHEMA_VERSION, Receipt

RECEIPT = "run.json"
STARTED = "started.json"
_OWN = {
    RECEIPT, STARTED, "adapter", "checkpoints", "metrics.jsonl", "loss.png", "held_out.json", "answers.json",
    "evaluation",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and what lies where in it."""

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
        """What the run was started as, and when it was gone on with."""
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
        """Greedy answers to a few held-out questions, right after training."""
        return self.path / "answers.json"

    @property
    def evaluation(self) -> Path:
        """lm-eval's results and per-document scores."""
        return self.path / "evaluation"

    @property
    def finished(self) -> bool:
        """Whether the run has its receipt, which is written last."""
        return (self.path / RECEIPT).is_file()

    def receipt(self) -> dict[str, Any]:
        """Return the receipt as parsed JSON.

        Raises:
            RunFolderError: when it is missing, damaged or of another schema.
        """
        file = self.path / RECEIPT
        try:
            receipt = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunFolderError(
                f"{self.path} holds no finished run: {RECEIPT} is missing. Expected a folder that training wrote, "
                "such as runs/llama2_guanaco-demo/nf4-seed0"
            ) from None
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file} cannot be read: {error}. Train again into another folder") from error
        if not isinstance(receipt, dict) or receipt.get("schema_version") != SCHEMA_VERSION:
            raise RunFolderError(f"{file} is not a receipt of schema {SCHEMA_VERSION}. Train again with this version")
        return receipt

    def write_receipt(self, receipt: Receipt) -> None:
        """Write `run.json`, whole or not at all."""
        write_json(self.path / RECEIPT, asdict(receipt))

    def check_free(self, *, overwrite: bool = False) -> None:
        """Refuse a folder that holds something already, unless that is a run and `overwrite` is set.

        Raises:
            RunFolderError: naming what is there.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            is_run = self.path.is_dir() and {_owner(entry.name) for entry in self.path.iterdir()} <= _OWN
            if not (overwrite and is_run):
                what = "a finished run" if self.finished else "an unfinished run" if is_run else "other files"
                hint = "or --overwrite to replace it" if is_run else "since nothing of it may be lost"
                raise RunFolderError(f"{self.path} holds {what}. Give --output_dir another folder, {hint}")

    def claim(self, *, overwrite: bool = False) -> None:
        """Make the folder for a new run, in the place of an old one when `overwrite` is set."""
        self.check_free(overwrite=overwrite)
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)


def _owner(name: str) -> str:
    """Return the file that a name belongs to: `.run.json.123` is what a killed `write_text` left of `run.json`."""
    return name[1:].rpartition(".")[0] if name.startswith(".") else name


def write_json(file: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file aside, sync it, and rename it into place, so that a reader never sees half of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
