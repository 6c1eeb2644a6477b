"""The run folder and its receipt `run.json`: the only contract between training, evaluation and comparison."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_recipes.errors import RunFolderError

SCHEMA_VERSION = 1
RECEIPT = "run.json"
STARTED = "started.json"
_OWN = {
    RECEIPT, STARTED, "adapter", "checkpoints", "metrics.jsonl", "loss.png", "held_out.json", "answers.json",
    "evaluation",
}  # fmt: skip


@dataclass
class DataReceipt:
    """What was read, what was used, and what the loss covers."""

    source: str
    """Hub id or file name."""
    fingerprint: str
    """SHA-256 over every conversation used, in order."""
    rows_in: int
    """Rows read."""
    rows_used: int
    """Rows trained on."""
    rows_held_out: int
    """Rows kept for evaluation."""
    rows_dropped: dict[str, int]
    """Reason to number of rows."""
    tokens: int
    """Tokens of the rows trained on, after cutting to max_length."""
    supervised_tokens: int
    """Those of them that are in the loss."""
    rows_truncated: int
    """Rows longer than max_length."""
    answers_truncated: int
    """Rows that lost supervised tokens by it."""
    supervised_tokens_lost: int
    """Supervised tokens cut away."""
    max_length: int
    """Longest row allowed, in tokens."""


@dataclass
class TemplateReceipt:
    """The chat template that training rendered, and what evaluation and chat must render."""

    name: str
    sha256: str
    role_markers: str
    """Regular expression for the strings of the template that a message's text may not hold."""
    bos_per_row: list[int]
    """Smallest and largest number of BOS tokens in a row: one a turn pair with Llama-2, none where BOS is EOS."""
    end_token: str
    """The token that ends an answer."""
    end_token_trained: bool
    """Whether it is in the loss in every answer that was not cut."""


@dataclass
class QuantizedReceipt:
    """Linear layers that should be stored in fewer bits, and those that are."""

    expected: int
    found: int


@dataclass
class BaseReceipt:
    """The frozen base as it lies in memory."""

    model: str
    revision: str | None
    """Commit that was loaded; None for a local folder."""
    dtype: str
    """16-bit dtype of loading and computing."""
    linears: dict[str, int]
    """Class name to number of linear layers, the output layer left out."""
    quantized: QuantizedReceipt
    parameters: int
    """Number of weights, counted before quantisation."""
    bytes: int
    """Memory of weights, buffers and quantisation constants."""
    bytes_by_storage: dict[str, int]
    """Storage dtype to bytes."""
    sha256: str
    """Hash over the stored bytes of the base."""
    storage: str = "packed"
    """Whether 4-bit weights were dequantised for every product (`packed`), or once and kept beside (`expanded`)."""


@dataclass
class AdapterReceipt:
    """The trained adapter, before and after."""

    targets: list[str]
    """Suffixes of the modules that carry it."""
    modules: int
    """Number of such modules."""
    parameters: int
    """Trainable weights."""
    dtype: str
    initial_sha256: str
    """Hash of the weights before the first step; equal for all precisions of one seed."""
    final_sha256: str
    all_finite: bool
    unchanged: list[str]
    """Tensors that are what they were before the first step."""
    bytes: int
    """Size of the saved file."""


@dataclass
class TrainingReceipt:
    """How far the training went and how fast."""

    steps: int
    micro_batches: int
    """Forward and backward passes of one process."""
    epochs: float
    first_loss: float
    final_loss: float
    """Mean of the last tenth of the logged losses, since single steps are noisy."""
    tokens: int
    """Real tokens processed, padding left out, over all processes."""
    supervised_tokens: int
    padding_share: float
    """Share of the processed positions that were padding."""
    tokens_per_second: float
    seconds: float
    """Wall time of the training loop."""
    packed: bool
    processes: int
    device: str
    attention: str


@dataclass
class MemoryReceipt:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""

    peak_bytes: int
    base_bytes: int
    """Peak before the first step, with the base loaded."""
    training_bytes: int
    """The peak without what was held beside the weights right before the first step: Python, libraries, rows."""
    planned_bytes: int | None
    """What the plan said of that; None where the run has no plan."""


@dataclass
class Check:
    """One thing that was verified."""

    name: str
    verdict: str
    """pass, warn, fail or off."""
    figure: str
    advice: str = ""
    """What to do when it is not a pass."""


@dataclass
class Resume:
    """One time that the run was gone on with after it had been interrupted."""

    at: str
    """UTC, ISO 8601."""
    from_step: int
    """The step of the checkpoint; 0 where there was none yet."""
    reason: str = ""
    """Why, where this package went on by itself."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Newer checkpoints that were damaged, and how."""
    versions_changed: dict[str, str] = field(default_factory=dict)
    """Packages of another version than the run was started with; the same bits cannot be promised then."""


@dataclass
class Receipt:
    """Everything a run can prove about itself."""

    recipe: str
    """Name of the recipe."""
    precision: str
    dtype: str
    seed: int
    demo: bool
    settings: dict[str, Any]
    """LoraConfig and SFTConfig fields as resolved, under `lora` and `training`, and the recipe's `eval_tasks`."""
    command: list[str]
    versions: dict[str, str]
    """Package to version."""
    git: dict[str, Any] | None
    """Commit and whether the work tree was clean; None outside a repository."""
    started: str
    """UTC, ISO 8601."""
    data: DataReceipt
    template: TemplateReceipt
    base: BaseReceipt
    adapter: AdapterReceipt
    training: TrainingReceipt
    memory: MemoryReceipt
    repairs: list[str]
    """Upstream defects found and mended in this run."""
    checks: list[Check] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)
    """Every time that the run was gone on with."""
    schema_version: int = SCHEMA_VERSION


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
                f"{self.path} holds no finished run: {RECEIPT} is missing. Wanted a folder that training wrote, "
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
