"""Take one architecture through this package as a user would, and note what each part of it said. Never raises.

A part that refuses or fails is noted with its reason, and what does not need it goes on.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from trl.chat_template_utils import get_training_chat_template

from qlora_recipes import DatasetSpec, Recipe, preflight
from qlora_recipes.base.loading import load_outline
from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.data.encoding import IGNORED
from qlora_recipes.data.templates import dated
from qlora_recipes.errors import CheckError, RecipesError
from qlora_recipes.experiments.families.architectures import ARCHITECTURES
from qlora_recipes.memory import estimate
from qlora_recipes.models import spec_named
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Check
from qlora_recipes.settings import Settings, resolve
from qlora_recipes.stages import Run
from qlora_recipes.standins import ROWS
from qlora_recipes.training.build import build_trainer, load_model, prepare_rows
from qlora_recipes.training.train import train

PRECISIONS = ("nf4", "bf16")
_MAX_LENGTH = 2048  # a template may write a page of its own before the first question
_REASON = 400  # characters
_EQUAL, _NO_MASK = "equal", "TRL has none"
_SAME_MASK = (_EQUAL, _NO_MASK)
_LEAST_SHARE = 0.99
_PLAN_ERROR = 0.02


@dataclass
class Examined:
    """What came out for one architecture; a figure that could not be had is None."""

    name: str
    parameters: int | None = None
    """Counted on the meta device."""
    quantized_share: float | None = None
    """Of the weights of linear layers and experts, those that are in 4 bits with NF4."""
    plan: dict[str, float] = field(default_factory=dict)
    """Planned bytes of the base by what was counted: `bf16` on the meta device, `nf4` in memory."""
    template: str | None = None
    """Where the chat template comes from."""
    mask: str | None = None
    """Ids and loss mask beside TRL's own for the same rows."""
    checks: dict[str, dict[str, Check]] = field(default_factory=dict)
    """Precision to check to what it said."""
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Precision to the first and the last loss."""
    speed: float | None = None
    """Tokens/s of the recipe by those of the plain script."""
    reasons: dict[str, str] = field(default_factory=dict)
    """What was refused or failed, and why."""
    known: dict[str, str] = field(default_factory=dict)
    """What differs or is refused rightly, and why."""

    @property
    def passes(self) -> bool:
        return not self.reasons

    def expect(self, name: str, holds: bool, otherwise: str) -> None:
        """Note a reason where something does not hold."""
        if not holds:
            self.reasons[name] = otherwise

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note why what is inside fails, and go on after it."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # bars of libraries
                yield
        except Exception as error:  # whatever it is, the other architectures are still to be examined
            kind = "" if isinstance(error, RecipesError) else f"{type(error).__name__}: "
            text = " ".join(f"{kind}{error}".split())
            self.reasons[name] = text if len(text) <= _REASON else f"{text[: _REASON - 3]}..."


def write_rows(count: int, folder: Path) -> Path:
    """Write the first of the bundled conversations into a file and return it."""
    file = folder / "rows.jsonl"
    with ROWS["openassistant_guanaco"].open(encoding="utf-8") as lines:
        file.write_text("".join(islice(lines, count)), encoding="utf-8")
    return file


def settings_for(name: str, model: Path, rows: Path, precision: str, steps: int, output_dir: Path) -> Settings:
    """Return the settings of a recipe that names a folder, a file and little else.

    The folder stands for the hub id of the architecture: with a specification of ours where that has one.
    """
    spec = spec_named(ARCHITECTURES[name].hub_id)
    declared = {
        "model": replace(spec, hub_id=str(model), revision=None, sizes=None),
        "dataset": DatasetSpec(str(rows)),
        "lora": dict(r=8, lora_alpha=16),
        "training": dict(
            max_steps=steps,
            max_length=_MAX_LENGTH,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
            save_strategy="no",
        ),
        "__module__": __name__,
    }
    return resolve(type("Family", (Recipe,), declared), precision=precision, output_dir=output_dir)


def examine(
    name: str,
    model: Path,
    rows: Path,
    *,
    steps: int = 4,
    precisions: Sequence[str] = PRECISIONS,
    speed: bool = False,
) -> Examined:
    """Return what came out for the model in a folder; with no precision only its plan, rows and template."""
    found = Examined(name)
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as scratch:

        def settings(precision: str) -> Settings:
            return settings_for(name, model, rows, precision, steps, Path(scratch) / precision)

        with found.part("plan"):
            _look_at_plan(found, settings("bf16"))
        with found.part("rows"):
            run = prepare_rows(settings("nf4"))
            found.template = run.data.template.origin
            with found.part("mask"):
                found.mask = mask_beside_trl(run, model)
                found.expect("mask", found.mask in _SAME_MASK, found.mask)
            _check(found, "nf4", preflight.BEFORE_LOADING, run)
            if precisions:
                with found.part("model"):
                    _look_at_model(found, load_model(run), Path(scratch))
        for precision in precisions:
            with found.part(precision):
                _train(found, settings(precision))
        if speed:
            with found.part("speed"):
                found.speed = _speed(name, model, rows, steps, Path(scratch))
    known = ARCHITECTURES[name].known
    found.known = {part: known[part] for part in found.reasons if part in known}
    others = {part: reason for part, reason in found.reasons.items() if part not in known}
    found.reasons = {part: reason.replace(str(model), name) for part, reason in others.items()}
    return found


def _look_at_plan(found: Examined, settings: Settings) -> None:
    outline = load_outline(settings.model, None)
    if outline is None:
        raise RecipesError("the model cannot be made on the meta device")
    found.parameters = sum(weight.numel() for weight in outline.parameters())
    _compare_plan(found, settings, 2 * found.parameters)


def _look_at_model(found: Examined, run: Run, scratch: Path) -> None:
    outline = cast(PreTrainedModel, load_outline(run.settings.model, None))
    found.quantized_share = quantized_share(run.model, outline)
    share = f"{found.quantized_share:.1%} of the weights of linear layers and experts are in 4 bits"
    found.expect("4-bit", found.quantized_share >= _LEAST_SHARE, f"{share}, expected {_LEAST_SHARE:.0%}")
    with found.part("plan"):
        _compare_plan(found, run.settings, run.base.bytes)
    whole = Run(run.prepared, run.loaded, build_trainer(run, RunFolder(scratch / "checked")))
    _check(found, "nf4", preflight.BEFORE_TRAINING, whole)


def _compare_plan(found: Examined, settings: Settings, counted: int) -> None:
    """Compare the planned bytes of the base with those counted."""
    precision, planned = settings.precision.name, estimate.plan(settings).training.base
    found.plan[precision] = planned / counted
    holds = abs(planned - counted) <= _PLAN_ERROR * counted
    found.expect(f"plan in {precision}", holds, f"{planned:,} bytes of the base planned, {counted:,} counted")


def _check(found: Examined, precision: str, checks: Sequence[preflight.CheckFunction], run: Run) -> None:
    """Make the checks, and take the failed ones as reasons."""
    _note(found, precision, preflight.run_checks(checks, run))


def _note(found: Examined, precision: str, checks: list[Check]) -> None:
    found.checks.setdefault(precision, {}).update({check.name: check for check in checks})
    found.reasons |= {check.name: check.figure for check in checks if check.verdict == "fail"}


def _train(found: Examined, settings: Settings) -> None:
    try:
        receipt = train(settings, console=Console(quiet=True)).receipt()
    except CheckError as error:
        if any(check.verdict == "fail" for check in found.checks.get("nf4", {}).values()):
            raise RecipesError("refused for the checks that fail") from error
        raise
    found.losses[settings.precision.name] = receipt.training.first_loss, receipt.training.final_loss
    _note(found, settings.precision.name, receipt.checks)


def mask_beside_trl(run: Run, model: Path) -> str:
    """Encode the rows as SFTTrainer does with `assistant_only_loss`, and say in how many ids or labels differ."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        source = tokenizer.chat_template and (get_training_chat_template(tokenizer) or tokenizer.chat_template)
    except ValueError:
        return _NO_MASK
    if not source:
        return _NO_MASK
    template = dated(ChatTemplate(source, "TRL's")).source  # the same day
    others = ids = 0
    for row in run.data.train:
        theirs: Any = tokenizer.apply_chat_template(
            list(row.messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        same_ids = list(theirs["input_ids"]) == row.encoded.input_ids
        in_loss = [label != IGNORED for label in row.encoded.labels]
        ids += not same_ids
        others += same_ids and [bool(part) for part in theirs["assistant_masks"]] != in_loss
    rows = len(run.data.train)
    if not ids and not others:
        return _EQUAL
    return f"{ids} of {rows} rows have other ids" if ids else f"{others} of {rows} masks differ"


def quantized_share(model: nn.Module, outline: PreTrainedModel) -> float:
    """Return the share of the weights of linear layers and experts that are stored in 4 bits; output layer left out."""
    output = outline.get_output_embeddings()
    possible = 0
    for module in outline.modules():
        if isinstance(module, nn.Linear):
            possible += module.weight.numel() if module is not output else 0
        elif "conv" not in type(module).__name__.lower():
            possible += sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim == 3)
    states = (getattr(weight, "quant_state", None) for weight in model.parameters())
    return sum(torch.Size(state.shape).numel() for state in states if state is not None) / possible


def _speed(name: str, model: Path, rows: Path, steps: int, scratch: Path) -> float:
    from qlora_recipes.experiments.throughput.arms import Specification
    from qlora_recipes.experiments.throughput.command import in_a_process

    spec = Specification(
        family=spec_named(ARCHITECTURES[name].hub_id).family or "",
        model=str(model),
        rows=str(rows),
        precision="nf4",
        dtype="bfloat16",
        max_length=_MAX_LENGTH,
        steps=steps + 1,
        r=8,
        storage="auto",
    )
    script, recipe = (in_a_process(arm, spec, scratch)["tokens_per_second"] for arm in ("trl_defaults", "recipe"))
    return float(recipe / script)
