"""A run made of parts: rows prepared, model loaded, trainer built, adapter trained. All that a check may look at.

Knows nothing of how they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.prepare import PreparedData
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import AdapterReceipt, BaseReceipt, MemoryReceipt
from qlora_recipes.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Prepared:
    """Settings, and the rows as read, encoded and split with them."""

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    encoder: ConversationEncoder
    data: PreparedData


@dataclass(frozen=True)
class Loaded:
    """The frozen base with a new adapter on it."""

    base: BaseReceipt
    model: PeftModel
    repairs: list[str]
    """Upstream defects found and fixed so far."""
    base_bytes: int
    """Peak memory when the base was loaded."""


@dataclass(frozen=True)
class Trained:
    """The adapter after the last step."""

    adapter: AdapterReceipt
    folder: RunFolder
    memory: MemoryReceipt


@dataclass(frozen=True)
class Run:
    """A run as far as it has come; reading a part that is not there yet is an AttributeError."""

    prepared: Prepared
    loaded: Loaded | None = None
    built: Trainer | None = None
    trained: Trained | None = None

    @property
    def settings(self) -> Settings:
        return self.prepared.settings

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.prepared.tokenizer

    @property
    def encoder(self) -> ConversationEncoder:
        return self.prepared.encoder

    @property
    def data(self) -> PreparedData:
        return self.prepared.data

    @property
    def base(self) -> BaseReceipt:
        return self._loaded.base

    @property
    def model(self) -> PeftModel:
        return self._loaded.model

    @property
    def repairs(self) -> list[str]:
        return self._loaded.repairs

    @property
    def base_bytes(self) -> int:
        return self._loaded.base_bytes

    @property
    def trainer(self) -> Trainer:
        return _reached(self.built, "trainer")

    @property
    def adapter(self) -> AdapterReceipt:
        return self._trained.adapter

    @property
    def folder(self) -> RunFolder:
        return self._trained.folder

    @property
    def memory(self) -> MemoryReceipt:
        return self._trained.memory

    @property
    def _loaded(self) -> Loaded:
        return _reached(self.loaded, "loaded model")

    @property
    def _trained(self) -> Trained:
        return _reached(self.trained, "trained adapter")


def _reached(part: _Part | None, name: str) -> _Part:
    if part is None:
        raise AttributeError(f"the run has no {name} yet: that part of it is made later")
    return part
