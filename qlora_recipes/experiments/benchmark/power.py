"""What a benchmark can find with its documents and seeds, said before it trains."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_recipes.comparison.power import plan_sentence
from qlora_recipes.evaluation.task_loading import EvalTask
from qlora_recipes.experiments.benchmark.plan import Plan


def power_of(tasks: Sequence[EvalTask], plan: Plan) -> str | None:
    """Return the sentence, or None for tasks whose documents are not known before training."""
    asked: list[set[str]] = []
    for task in tasks:
        if task.kind != "bits_per_byte":
            documents = {f"{doc}" for part in task.parts for _, doc in part.doc_iterator(limit=plan.limit)}
            if len(documents) > 1 and documents not in asked:  # two tasks that ask the same questions are one
                asked.append(documents)
    return plan_sentence(list(map(len, asked)), len(plan.seeds)) if asked else None
