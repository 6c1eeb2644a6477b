"""After training: the adapter moved and is finite, the base did not move, and what was saved reloads and answers.

Changes no weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import AutoTokenizer

from qlora_recipes.base.adapters import add_adapter
from qlora_recipes.base.loading import base_sha256
from qlora_recipes.base.sharding import local
from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.evaluation.generation import Generation, ended, generate
from qlora_recipes.formatters import answer_of, before_last_answer
from qlora_recipes.preflight.checks import fail_unless, untested, warn_unless
from qlora_recipes.preflight.probes import logits, probe_batch
from qlora_recipes.preflight.prompts import template_agrees, template_sha256
from qlora_recipes.preflight.rows import spread
from qlora_recipes.run.files import write_json
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

_RELOADED = "reloaded"
_FEW_LOSSES = 10
_QUESTIONS = 4
_NEW_TOKENS = 64


def adapter_finite(run: Run) -> Check:
    """No weight is NaN or infinite."""
    finite = run.adapter.all_finite
    return fail_unless(
        finite,
        f"all {run.adapter.parameters:,} weights" if finite else "NaN or infinite weights",
        "Lower --learning_rate; see grad_norm in metrics.jsonl for the step where it blew up.",
    )


def adapter_changed(run: Run) -> Check:
    """B starts at zero and moves at once; A has no gradient before B has moved, which takes a few steps."""
    unchanged = run.adapter.unchanged
    stuck = [name for name in unchanged if "lora_A" not in name]
    figure = f"{len(unchanged)} tensors unchanged, {unchanged[0]} first" if unchanged else "every tensor"
    advice = "Train for more steps, or leave these modules out of target_modules."
    return fail_unless(False, figure, advice) if stuck else warn_unless(not unchanged, figure, advice)


def losses_finite(run: Run) -> Check:
    """No logged loss or gradient norm is NaN or infinite; one such step, unless it was skipped, spoils every weight."""
    logged = [
        f"{name} of step {entry['step']}" for entry in run.trainer.state.log_history
        for name in ("loss", "grad_norm") if name in entry and not math.isfinite(entry[name])
    ]  # fmt: skip
    skipped = cast(Any, run.trainer).skipped_steps
    counted = f"; {skipped} steps skipped by float16's loss scaler" if skipped else ""
    return fail_unless(
        not logged,
        f"{logged[0]}, {len(logged)} in all" if logged else f"every logged loss and gradient norm{counted}",
        "Lower --learning_rate, or use --dtype bfloat16.",
    )


def loss_fell(run: Run) -> Check:
    """The last tenth of the logged losses is below the first tenth."""
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    if len(losses) < 2:
        return untested(f"{len(losses)} of the steps logged a loss; give --logging_steps 1")
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    advice = "Train longer: a few losses are mostly noise." if len(losses) < _FEW_LOSSES else "Lower --learning_rate."
    return warn_unless(last < first, f"{first:.3f} to {last:.3f} over {len(losses)} logged steps", advice)


def base_unchanged(run: Run) -> Check:
    """The stored bytes of the base are those that were loaded."""
    now = base_sha256(run.model)
    return fail_unless(
        now == run.base.sha256,
        f"sha256 {now[:12]}" if now == run.base.sha256 else f"sha256 {run.base.sha256[:12]} became {now[:12]}",
        "Something trained or repacked the base, on which the saved adapter would be another.",
    )


def optimizer_state_kept(run: Run) -> Check:
    """Every adapter weight has a finite optimizer state, which a weight that the optimizer never saw has not."""
    optimizer = cast(Any, run.trainer.optimizer)  # accelerate wraps it
    states = getattr(optimizer, "optimizer", optimizer).state
    parts = [local(part) for state in states.values() for part in state.values() if torch.is_tensor(part)]
    trained = sum(weight.requires_grad for weight in run.model.parameters())
    finite = all(bool(torch.isfinite(part.float()).all()) for part in parts)
    return fail_unless(
        finite and (not states or len(states) == trained),
        f"of {len(states)} of {trained} tensors, {'all' if finite else 'not all'} finite",
        "Report this as a bug, with the optimizer's name.",
    )


def adapter_reloads(run: Run) -> Check:
    """The adapter that was saved gives the logits of the one in memory, to the last bit."""
    batch = probe_batch(run)
    trained = logits(run, batch)
    add_adapter(run.model, run.folder.unproven, _RELOADED)
    try:
        run.model.set_adapter(_RELOADED)
        moved = float((logits(run, batch) - trained).abs().max())
    finally:
        run.model.set_adapter("default")
        run.model.delete_adapter(_RELOADED)
    return fail_unless(
        moved == 0, f"logits moved by {moved:.2g}", "The saved file is not what was trained; train again."
    )


def tokenizer_reloads(run: Run) -> Check:
    """The tokenizer in the adapter folder has the training template, and gives the training ids for it."""
    saved = AutoTokenizer.from_pretrained(run.folder.unproven)
    encoder = ConversationEncoder(saved, run.encoder.template)
    rows = spread(run.data.train, 20, ~run.data.figures["truncated"])
    wrong = [row.place for row in rows if encoder.encode(row.messages, row.tools).input_ids != row.encoded.input_ids]
    rendered = template_agrees(replace(run, prepared=replace(run.prepared, tokenizer=saved, encoder=encoder)))
    template, expected = template_sha256(saved), run.data.template.sha256
    fault = ""
    if template != expected:
        fault = f"template {template[:12]}, trained with {expected[:12]}"
    elif wrong:
        fault = f"{len(wrong)} of {len(rows)} rows give other ids, {wrong[0]} first"
    elif rendered.verdict != "pass":
        fault = rendered.figure
    advice = "Put what the tokenizer needs into ModelSpec.tokenizer, so that it is saved with it."
    return fail_unless(not fault, fault or f"{len(rows)} rows give the training ids", advice)


# ---- Greedy answers to a few held-out questions ----


def answers_end(run: Run) -> Check:
    """Ask held-out questions, written with their answers to answers.json; an empty answer does not count as one."""
    rows = spread(run.data.held_out, _QUESTIONS, ~run.data.held_out_figures["truncated"])
    rows = [row for row in rows if before_last_answer(row.messages)]  # a plain text asks nothing
    if not rows:
        return untested("no held-out row to ask")
    answers = _ask(run, rows)
    if run.trainer.accelerator.is_main_process:
        write_json(run.folder.answers, answers)
    empty = sum(not answer["answer"] for answer in answers)
    by_itself = sum(bool(answer["ended"] and answer["answer"]) for answer in answers)
    return warn_unless(  # without their words: the figure is in run.json, which is published
        by_itself > 0,
        f"{by_itself} of {len(answers)} within {_NEW_TOKENS} tokens{f', {empty} without a word' if empty else ''}",
        "Train longer, or look at answers.json: the model may just have long answers to give.",
    )


def _ask(run: Run, rows: Sequence[Conversation]) -> list[dict[str, object]]:
    """Answer all questions in one batch, in the arithmetic of training."""
    run.model.eval()
    asked = [before_last_answer(row.messages) for row in rows]
    prompts = [run.encoder.encode_prompt(before, row.tools) for before, row in zip(asked, rows, strict=True)]
    end, pad = run.encoder.end_id, run.tokenizer.pad_token_id
    with run.trainer.compute_loss_context_manager():
        answers = generate(run.model, prompts, end=end, pad=pad, settings=Generation(max_new_tokens=_NEW_TOKENS))
    return [
        {
            "place": row.place,
            "question": before[-1]["content"],
            "answer": str(run.tokenizer.decode(new, skip_special_tokens=True)).strip(),
            "expected": answer_of(row.messages[len(before)]),
            "ended": ended(run.model, end, new),
        }
        for row, before, new in zip(rows, asked, answers, strict=True)
    ]
