"""Loads a trained run from disk and proves that it is the one that its receipt describes. Knows nothing of tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from qlora_recipes.base.adapters import adapter_sha256, load_adapter
from qlora_recipes.base.device import torch_device
from qlora_recipes.base.loading import load_base
from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.errors import CheckError, ModelError, RunFolderError, UsageError
from qlora_recipes.evaluation.records import sha256
from qlora_recipes.formatters import Message, RowError, Tools, check_messages, check_tools
from qlora_recipes.precision import precision_named
from qlora_recipes.run.files import check_kind, read_record
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBES = 4  # conversations on which the adapter is switched on and off


@dataclass(frozen=True)
class BaseKey:
    """What identifies a loaded base: runs with equal keys share the model in memory."""

    model: str
    revision: str | None
    precision: str
    dtype: str
    trust_remote_code: bool = False
    """Whether it was trained with code of its repository; see `check_remote_code`."""

    @classmethod
    def of(cls, receipt: Receipt, precision: str | None = None) -> BaseKey:
        base, trusted = receipt.base, bool(receipt.settings.training.get("trust_remote_code"))
        return cls(base.model, base.revision, precision or receipt.precision, receipt.dtype, trusted)


def check_remote_code(receipt: Receipt, *, allowed: bool) -> None:
    """Reject a base that brings its own code, unless whoever evaluates allows it: a run folder can be anyone's.

    Raises:
        UsageError: naming the flag, or a revision that is not a commit and whose code may have changed since.
    """
    model, revision = receipt.base.model, receipt.base.revision
    if not BaseKey.of(receipt).trust_remote_code:
        return
    if not allowed:
        raise UsageError(
            f"the run was trained with code that {model} brings (revision {revision}), and that code would run here. "
            "Give --trust_remote_code when you have read it"
        )
    if not re.fullmatch("[0-9a-f]{40}", revision or "") and not Path(model).is_dir():
        raise UsageError(
            f"--trust_remote_code runs code of {model}, and the receipt has its revision as {revision!r}; expected a "
            "commit of 40 hexadecimal digits. Train again with --revision COMMIT"
        )


@dataclass(frozen=True)
class RestoredBase:
    """A base in memory, with the hash of its stored tensors."""

    model: PreTrainedModel
    sha256: str


@dataclass(frozen=True)
class RestoredRun:
    """A run in memory, with the proof that it is that run."""

    folder: RunFolder
    receipt: Receipt
    model: Any
    """The base with the adapter unmerged, or the base alone."""
    tokenizer: PreTrainedTokenizerBase
    encoder: ConversationEncoder
    held_out: list[HeldOutRow]
    """The conversations kept from training."""
    precision: str
    base_sha256: str
    adapter_sha256: str | None = None
    """As measured in the loaded model; None for the base alone, like the next."""
    adapter_on_off_difference: float | None = None
    """Largest change of a logit when the adapter is switched off."""


def restore_base(key: BaseKey) -> RestoredBase:
    """Load the base of one or more runs."""
    device = torch_device()
    precision, trusted = precision_named(key.precision), key.trust_remote_code
    model, receipt, _ = load_base(
        key.model, key.revision, precision, key.dtype, device=device, trust_remote_code=trusted
    )
    return RestoredBase(model.eval(), receipt.sha256)


@contextmanager
def restore_run(
    folder: RunFolder, base: RestoredBase, key: BaseKey, *, adapter: bool = True, other_template: bool = False
) -> Iterator[RestoredRun]:
    """Attach a run's adapter to its base while the context lasts, and check both against the receipt.

    `other_template` accepts a chat template that was edited on purpose.

    Raises:
        CheckError: when tokenizer, base or adapter are not what the receipt says, or the adapter does nothing.
        ModelError: when there is no tokenizer or adapter, or one for another base.
        RunFolderError: when a file is damaged, naming the key or the row.
    """
    receipt, held_out = folder.receipt(), read_held_out(folder)
    tokenizer = _tokenizer(folder, receipt, other_template)
    recorded = receipt.template
    template = ChatTemplate(str(tokenizer.chat_template), recorded.name, recorded.role_markers, recorded.origin)
    encoder = ConversationEncoder(tokenizer, template)
    if key.precision == receipt.precision:
        advice = (
            "It has changed since training, or was quantized on another kind of device; evaluate where it was trained"
        )
        _check_same("base", base.sha256, receipt.base.sha256, advice)
    run = RestoredRun(folder, receipt, base.model, tokenizer, encoder, held_out, key.precision, base.sha256)
    if not adapter:
        yield run
        return
    model = load_adapter(base.model, folder.adapter).eval()
    try:
        loaded = adapter_sha256(model)
        advice = "The weights in adapter/ are another run's or damaged: train again"
        _check_same("adapter", loaded, receipt.adapter.final_sha256, advice)
        difference = _on_off_difference(model, encoder, held_out)
        yield replace(run, model=model, adapter_sha256=loaded, adapter_on_off_difference=difference)
    finally:
        model.unload()  # gives the base back as it was, for the next adapter


@dataclass(frozen=True)
class HeldOutRow:
    """One conversation of `held_out.json`, and where it was in the data, for people."""

    place: str
    messages: list[Message]
    tools: Tools | None = None
    rejected: str | None = None
    """The answer that is worse than the last of the messages, in a row of preferences."""


def _tokenizer(folder: RunFolder, receipt: Receipt, other_template: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the run saved; `other_template` accepts a chat template edited after training."""
    try:
        for file in folder.adapter.iterdir():
            check_kind(file)
        tokenizer = AutoTokenizer.from_pretrained(str(folder.adapter), trust_remote_code=False)
        if tokenizer.is_fast and not (folder.adapter / "tokenizer.json").is_file():  # upstream makes one without words
            raise FileNotFoundError("tokenizer.json is missing.")
    except Exception as error:  # a damaged file makes the tokenizers raise anything
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"no tokenizer at {folder.adapter}: {first} Expected the one that training saved") from error
    if not other_template:
        edited = folder.adapter / "chat_template.jinja"
        advice = f"{edited} was edited after training: put it back, or give --other_template"
        _check_same("chat template", sha256(str(tokenizer.chat_template)), receipt.template.sha256, advice)
    return tokenizer


def read_held_out(folder: RunFolder) -> list[HeldOutRow]:
    """Return the conversations that the run kept from training; none where it kept none.

    Raises:
        RunFolderError: when the file is damaged, naming the row.
    """
    fix = "Train again, or restore the file from a copy"
    try:
        rows = read_record(folder.held_out, list[HeldOutRow], fix=fix)
        for i, row in enumerate(rows):
            check_messages(row.messages, f"key {i}.messages")
            check_tools(row.tools, f"key {i}.tools")
    except FileNotFoundError:
        return []
    except RowError as error:
        raise RunFolderError(f"{folder.held_out}, {error.detail}. {fix}") from error
    return rows


def _check_same(what: str, found: str, expected: str, advice: str) -> None:
    if found != expected:
        raise CheckError(
            f"the {what} is not this run's: its hash is {found[:12]}, the receipt has {expected[:12]}. {advice}"
        )


@torch.no_grad()
def _on_off_difference(model: Any, encoder: ConversationEncoder, held_out: Sequence[HeldOutRow]) -> float:
    """Return the largest change of a logit when the adapter is switched off, on a few of the run's own prompts."""
    greeting = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    largest = 0.0
    for row in held_out[:_PROBES] or [HeldOutRow("", greeting)]:
        ids = torch.tensor([encoder.encode(row.messages, row.tools).input_ids[:512]], device=model.device)
        on = model(input_ids=ids).logits.float()
        with model.disable_adapter():
            off = model(input_ids=ids).logits.float()
        largest = max(largest, float((on - off).abs().max()))
    if not largest > 0:
        raise CheckError(
            f"switching the adapter off changes no logit (largest difference {largest}): it does nothing or holds NaN. "
            "Train for more steps; metrics.jsonl shows whether grad_norm was zero"
        )
    return largest
