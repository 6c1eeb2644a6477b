"""A run at each stage: rows prepared, model loaded, trainer built, adapter trained. All that a check may look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.prepare import PreparedData
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import AdapterReceipt, BaseReceipt, MemoryReceipt
from qlora_recipes.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.sft_trainer import SFTTrainer


@dataclass(frozen=True)
class Run:
    """Settings, and the rows as read, encoded and split with them; reading what a later stage adds is refused."""

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    encoder: ConversationEncoder
    data: PreparedData

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            for stage, part in (LoadedRun, "loaded model"), (BuiltRun, "trainer"), (TrainedRun, "trained adapter"):
                if name in stage.__annotations__:
                    raise AttributeError(f"the run has no {part} yet: that part of it is made later")
            raise AttributeError(f"{type(self).__name__} has no {name}")


@dataclass(frozen=True)
class LoadedRun(Run):
    """With the frozen base and a new adapter on it."""

    base: BaseReceipt
    model: PeftModel
    repairs: list[str]
    """Upstream defects found and fixed so far."""
    base_bytes: int
    """Peak memory when the base was loaded."""


@dataclass(frozen=True)
class BuiltRun(LoadedRun):
    """With everything that the first step needs."""

    trainer: SFTTrainer


@dataclass(frozen=True)
class TrainedRun(BuiltRun):
    """With the adapter after the last step."""

    adapter: AdapterReceipt
    folder: RunFolder
    memory: MemoryReceipt
