"""Greedy answers to a few held-out questions, and how many of them end by themselves."""

from __future__ import annotations

from qlora_recipes.base.adapters import generate
from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.preflight.rows import spread
from qlora_recipes.preflight.verdicts import passed, warn_unless
from qlora_recipes.run.files import write_json
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import TrainedRun

_QUESTIONS = 4
_NEW_TOKENS = 64


def answers_end(run: TrainedRun) -> Check:
    """Ask held-out questions; what is said is written to answers.json."""
    rows = spread(run.data.held_out, _QUESTIONS, ~run.data.held_out_figures["truncated"])
    if not rows:
        return passed("no held-out row to ask")
    answers = _ask(run, rows)
    if run.trainer.accelerator.is_main_process:
        write_json(run.folder.answers, answers)
    ended = sum(answer["ended"] for answer in answers)
    return warn_unless(
        ended > 0,
        f"{ended} of {len(answers)} within {_NEW_TOKENS} tokens; the first: {_short(answers[0]['answer'])!r}",
        "Train longer, or look at answers.json: the model may just have long answers to give.",
    )


def _ask(run: TrainedRun, rows: list[Conversation]) -> list[dict[str, object]]:
    """Answer all questions in one batch, in the arithmetic of training."""
    run.model.eval()
    prompts = [run.encoder.encode_prompt(row.messages[:-1]) for row in rows]
    end, pad = run.tokenizer.eos_token_id, run.tokenizer.pad_token_id
    with run.trainer.compute_loss_context_manager():
        answers = generate(run.model, prompts, end=end, pad=pad, max_new_tokens=_NEW_TOKENS)
    return [_said(run, row, answer) for row, answer in zip(rows, answers, strict=True)]


def _said(run: TrainedRun, row: Conversation, new: list[int]) -> dict[str, object]:
    return {
        "place": row.place,
        "question": row.messages[-2]["content"],
        "answer": run.tokenizer.decode(new, skip_special_tokens=True).strip(),
        "expected": row.messages[-1]["content"],
        "ended": new[-1:] == [run.tokenizer.eos_token_id],
    }


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 60 else words[:57] + "..."
