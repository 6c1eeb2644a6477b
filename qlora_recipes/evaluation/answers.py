"""Answers before and after tuning, side by side for people to read. Records in, a page out: knows nothing of models."""

from __future__ import annotations

import html
import re
from contextlib import suppress
from pathlib import Path

from qlora_recipes.evaluation.records import UnfinishedTaskError, read_task
from qlora_recipes.run.files import write_text

_TASK = "held_out_answers"
_ROWS = 50  # as many as anyone reads; the records have all
_MARKDOWN = re.compile(r"[\\`*_~|$\[\]]")


def write_before_and_after(evaluation: Path) -> None:
    """Write `answers.md` into a run's folder of results, once held-out answers of run and base are there.

    Where they are not of the same questions, decoded alike, there is none.
    """
    page = evaluation / "answers.md"
    page.unlink(missing_ok=True)  # of results that have been replaced
    with suppress(UnfinishedTaskError):
        (base, before), (tuned, after) = read_task(evaluation / "base", _TASK), read_task(evaluation, _TASK)
        if (base.documents_sha256, base.decoding) != (tuned.documents_sha256, tuned.decoding):
            return
        shown = [(a.prompt, a.answer, b.answer, a.target) for a, b in zip(before, after, strict=True)][:_ROWS]
        scores = f"{tuned.metric} {base.metrics[base.metric]:.3f} before, {tuned.metrics[tuned.metric]:.3f} after"
        lines = [
            "# Held-out questions, answered before and after tuning",
            f"The first {len(shown)} of {tuned.n_docs} questions; answers are {tuned.decoding}; {scores}, over all.",
            "| question | before | after | expected |\n|---|---|---|---|\n"
            + "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in shown),
        ]
        write_text(page, "\n\n".join(lines) + "\n")


def _cell(text: str) -> str:
    escaped = _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", html.escape(text))
    return "<br>".join(escaped.splitlines())
