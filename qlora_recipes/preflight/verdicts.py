"""The verdicts a check can give, as functions. Whoever runs a check names the verdict after it.

*fail* stops the run: what follows would be another thing than it says. *warn* is for what may be meant.
"""

from __future__ import annotations

from qlora_recipes.run.receipt import Check


def passed(figure: str) -> Check:
    """Return a pass with what was measured."""
    return Check("", "pass", figure)


def fail_unless(holds: bool, figure: str, advice: str) -> Check:
    """Return a pass when `holds`, else a fail with the advice on how to mend it."""
    return passed(figure) if holds else Check("", "fail", figure, advice)


def warn_unless(holds: bool, figure: str, advice: str) -> Check:
    """Return a pass when `holds`, else a warning with the advice on what to look at."""
    return passed(figure) if holds else Check("", "warn", figure, advice)
