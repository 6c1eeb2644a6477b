"""What a check may look at: a run that grows from rows read, over a base loaded, to an adapter trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.prepare import PreparedData
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import AdapterReceipt, BaseReceipt
from qlora_recipes.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTTrainer


@dataclass
class ReadRun:
    """A run with its rows read, encoded and split."""

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    encoder: ConversationEncoder
    data: PreparedData


@dataclass
class LoadedRun(ReadRun):
    """A run with its base loaded and an adapter attached."""

    base: BaseReceipt
    model: PeftModel
    repairs: list[str]
    """Upstream defects found and mended so far."""
    base_bytes: int
    """Peak memory when the base was loaded."""


@dataclass
class ReadyRun(LoadedRun):
    """A run with everything that its first step needs."""

    trainer: SFTTrainer
    non_weight_bytes: int = field(default=0, kw_only=True)
    """Memory held right before the first step that is no weight: Python, libraries, rows."""


@dataclass
class TrainedRun(ReadyRun):
    """A run after its last step."""

    adapter: AdapterReceipt
    folder: RunFolder
