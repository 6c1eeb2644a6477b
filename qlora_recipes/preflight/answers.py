"""Greedy answers to a few held-out questions, and how many of them end by themselves."""

from __future__ import annotations

import torch

from qlora_recipes.data import Conversation
from qlora_recipes.preflight.samples import spread
from qlora_recipes.preflight.subject import TrainedRun
from qlora_recipes.preflight.verdicts import passed, warn_unless
from qlora_recipes.runs import Check, write_json

_QUESTIONS = 4
_NEW_TOKENS = 64


def answers_end(run: TrainedRun) -> Check:
    """Ask held-out questions; what is said is written to answers.json."""
    rows = spread([row for row in run.data.held_out if not row.truncated], _QUESTIONS)
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


@torch.no_grad()
def _ask(run: TrainedRun, rows: list[Conversation]) -> list[dict[str, object]]:
    """Answer all questions in one batch, padded on the left, so that the answers start together."""
    run.model.eval()
    prompts = [run.encoder.encode_prompt(row.messages[:-1]) for row in rows]
    width, pad, end = max(map(len, prompts)), run.tokenizer.pad_token_id, run.tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = run.trainer.args.device
    with run.trainer.compute_loss_context_manager():
        whole = run.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=_NEW_TOKENS,
            use_cache=True,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=end,
            pad_token_id=pad,
        )
    return [_said(run, row, new) for row, new in zip(rows, whole[:, width:].tolist(), strict=True)]


def _said(run: TrainedRun, row: Conversation, new: list[int]) -> dict[str, object]:
    end = run.tokenizer.eos_token_id
    answer = new[: new.index(end)] if end in new else new
    return {
        "place": row.place,
        "question": row.messages[-2]["content"],
        "answer": run.tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "wanted": row.messages[-1]["content"],
        "ended": end in new,
    }


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 60 else words[:57] + "..."
