"""The card of an adapter: what it is and what was counted, in the form that the hub shows. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader

from qlora_recipes.run.receipt import Receipt


def model_card(receipt: Receipt, verdicts: Sequence[str] = ()) -> str:
    """Return the card of a run in Markdown; `verdicts` are the sentences of a report on it."""
    templates = Environment(loader=PackageLoader("qlora_recipes.report", "."), keep_trailing_newline=True)
    return templates.get_template("model_card.md.jinja").render(run=receipt, verdicts=verdicts)
