"""Preferences: the reference is the start, only the answers are scored, and training prefers the chosen ones more.

Changes nothing of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qlora_recipes.base.adapters import ADAPTER
from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.preflight.checks import fail_unless, untested, warn_unless
from qlora_recipes.preflight.rows import spread
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

REFERENCE = "ref"
"""What DPOTrainer calls its copy of the adapter (TRL 1.16, `trainer/dpo_trainer.py`)."""
_PAIRS = 4
_READ_BACK = 200


def answers_alone(run: Run) -> Check:
    """Both answers of a row follow the same prompt, no token of which is scored; read back from the trainer's batch."""
    rows = spread(run.data.train, _READ_BACK)
    batch = run.trainer.data_collator([row.pair for row in rows])
    scored = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    chosen, rejected = scored[: len(rows)], scored[len(rows) :]
    wrong = [
        row.place
        for row, better, worse in zip(rows, chosen, rejected, strict=True)
        if (row.messages[-1]["content"], row.rejected) != (_text(run, better, row), _text(run, worse, row))
        and not row.truncated
    ]
    return fail_unless(
        not wrong,
        f"{len(wrong)} of {len(rows)} rows have other words in the loss, {wrong[0]} first"
        if wrong
        else f"both answers of {len(rows)} rows, and nothing of their prompts",
        "Put the answer and its end-of-turn token, nothing else, in the template's {% generation %} block.",
    )


def _text(run: Run, ids: list[int], row: Conversation) -> str:
    """Return the words of an answer; the answer itself where they differ in white space alone."""
    controls = run.encoder.control_tokens(ids)
    words = str(run.tokenizer.decode([token for token in ids if token not in controls]))
    known = (str(row.messages[-1]["content"]), str(row.rejected))
    return next((text for text in known if "".join(text.split()) == "".join(words.split())), words)


def reference_is_the_start(run: Run) -> Check:
    """Before the first step model and reference give every answer the same probability: no margin, a loss of ln 2."""
    trainer: Any = run.trainer
    moved = [
        name
        for name, weight in run.model.named_parameters()
        if f".{ADAPTER}." in name
        and not torch.equal(weight, run.model.get_parameter(name.replace(f".{ADAPTER}.", f".{REFERENCE}.")))
    ]
    if moved:
        return fail_unless(False, f"{len(moved)} of its tensors differ, {moved[0]} first", "Report this as a bug.")
    batch = trainer.data_collator([row.pair for row in run.data.train[:_PAIRS]])
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
    run.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss = float(trainer.compute_loss(run.model, batch))
    margin = trainer._metrics["eval"]["rewards/margins"][-1]
    trainer._metrics["eval"].clear()
    plain = list(trainer.loss_types) == ["sigmoid"] and not trainer.label_smoothing
    return fail_unless(
        margin == 0 and (not plain or abs(loss - math.log(2)) <= 1e-6),
        f"a margin of {margin:.3g} and a loss of {loss:.6f} on {_PAIRS} rows" + ", which is ln 2" * plain,
        "Something changed the adapter between loading and training.",
    )


def margins_rise(run: Run) -> Check:
    """The chosen answers gain on the rejected ones, compared with the reference: the last tenth of the logged steps."""
    margins = mean_margins(run.trainer.state.log_history)
    if not margins:
        return untested("no step logged a margin; give --logging_steps 1")
    first, last = margins
    return warn_unless(last > max(first, 0), f"{first:.3f} to {last:.3f}", "Train longer, or raise --learning_rate.")


def mean_margins(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the mean `rewards/margins` of the first and of the last tenth of the logged steps; none without any."""
    margins = [entry["rewards/margins"] for entry in log if "rewards/margins" in entry]
    tenth = max(1, len(margins) // 10)
    return [sum(part) / tenth for part in (margins[:tenth], margins[-tenth:])] if margins else []
