"""A comparison in one sentence, with its margin, documents and seeds. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_recipes.comparison.intervals import Interval
from qlora_recipes.comparison.paired import Comparison


def sentence(
    name: str,
    baseline: str,
    found: Comparison,
    tasks: Sequence[str],
    seeds: Sequence[int],
    *,
    unlike: Mapping[str, float] | None = None,
    doubts: Sequence[str] = (),
    rest: Comparison | None = None,
) -> str:
    """Say what an arm did against its baseline. Differences are in points.

    `unlike` holds the differences of tasks that differ by themselves where the mean over tasks is equivalent. `doubts`
    are reasons why agreement would mean nothing, and `rest` is the comparison over the tasks that have none.
    """
    distinct = f" ({found.n_distinct:,} of them distinct)" if found.n_distinct < found.n else ""
    evidence = f"{found.n:,} documents{distinct} of {_count(len(tasks), 'task')} and {_count(len(seeds), 'seed')}"
    margin = f"the margin of ±{found.margin:g} {'point' if found.margin == 1 else 'points'}"
    reasons = "; ".join(doubts)
    note = f" Agreement of these arms would mean nothing: {reasons}." if doubts else ""
    if found.limited:
        return (
            f"NOT A RESULT: the evaluation was limited to {evidence}. In this trial {name} scores "
            f"{points(found.difference)} against {baseline} (90 % interval {interval(found.interval)})."
        )
    if found.verdict == "equivalent":
        if rest:
            note = f" Without the tasks where agreement means nothing it is {_estimate(rest)}: {reasons}."
        return (
            f"{name} matches {baseline}: its score differs by {points(found.difference)} (90 % interval "
            f"{interval(found.interval)}), which lies inside {margin}, over {evidence}.{_of_one(seeds)}{note}"
        )
    if found.verdict == "different":
        better = "above" if found.difference > 0 else "below"
        return (
            f"{name} does not match {baseline}: it scores {points(abs(found.difference), sign=False)} {better} it "
            f"(95 % interval {interval(found.interval_95)}, 90 % {interval(found.interval)}), with {margin}, over "
            f"{evidence}.{_of_one(seeds)}{note}"
        )
    if unlike:
        single = ", ".join(f"{task} {points(difference)}" for task, difference in unlike.items())
        return (
            f"{name} does not match {baseline} in every task: {single}. Only the mean over tasks is alike, with "
            f"{points(found.difference)} (90 % interval {interval(found.interval)}) inside {margin}, over {evidence}."
            f"{_of_one(seeds)}{note}"
        )
    if doubts and found.interval_inside_margin:
        others = f" In the other tasks the difference is {_estimate(rest)}, not inside the margin." if rest else ""
        return (
            f"{name} and {baseline} agree, but the agreement means nothing: {reasons}.{others} Their scores differ by "
            f"{points(found.difference)} (90 % interval {interval(found.interval)}), inside {margin}, over {evidence}."
            f"{_of_one(seeds)}"
        )
    return (
        f"Inconclusive: {name} scores {points(found.difference)} against {baseline} (90 % interval "
        f"{interval(found.interval)}); that is not inside {margin}, nor does the 95 % interval "
        f"({interval(found.interval_95)}) exclude zero, over {evidence}.{_of_one(seeds)}{_needed(found)}{note}"
    )


def _estimate(found: Comparison) -> str:
    return f"{points(found.difference)} (90 % interval {interval(found.interval)})"


def _needed(found: Comparison) -> str:
    if found.n_needed is not None:
        too = f" and {found.seeds_needed} seeds" if found.seeds_needed is not None else ""
        of_more = " Those documents should be of more subjects too." if found.n_clusters < found.n_distinct else ""
        return f" About {found.n_needed:,} documents{too} would settle it.{of_more}"
    if found.seeds_needed is not None:
        return f" The documents are enough; about {found.seeds_needed} seeds would settle it if these are typical."
    return " What is wide is the spread over seeds: train more of them." if found.seed_interval else ""


def _of_one(seeds: Sequence[int]) -> str:
    return " With one seed, this is about these two runs and not about two precisions." if len(seeds) == 1 else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, a typographic minus, and none for zero."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else ("−" if value < 0 else "+") + text  # noqa: RUF001  the sign of print


def points(value: float, *, sign: bool = True) -> str:
    """Return a difference in percentage points."""
    text = signed(value) if sign else f"{value:.2f}"
    return f"{text} points"


def interval(bounds: Interval, digits: int = 2) -> str:
    """Return both bounds of an interval."""
    return f"{signed(bounds[0], digits)} to {signed(bounds[1], digits)}"
