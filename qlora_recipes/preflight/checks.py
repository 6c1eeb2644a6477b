"""What a check can say, how a list of checks is made on a run, shown as a table of 80 columns, and refused.

*fail* stops the run: what follows would not be what it claims. *warn* is for what may be meant. *untested* is for what
could not be looked at, and *off* for what the user turned off. Knows no single check.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qlora_recipes.errors import CheckError, RecipesError, UsageError, nearest
from qlora_recipes.preflight.probes import preserving_state
from qlora_recipes.run.receipt import Check

CheckFunction = Callable[[Any], Check]
"""A function of a run (see stages.py); its name is the check's."""

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "untested": "dim", "off": "dim"}
_COMPILER = "It needs a C compiler and Python's headers: apt-get install gcc python3-dev, or set CC to another one."
_SEVERITY = ("off", "pass", "untested", "warn", "fail")

# ---- Verdicts; whoever runs a check names the verdict after it ----


def passed(figure: str) -> Check:
    """Return a pass with what was measured."""
    return Check("", "pass", figure)


def untested(reason: str) -> Check:
    """Return the verdict of a check that could not look at what it is for."""
    return Check("", "untested", f"not tested: {reason}")


def fail_unless(holds: bool, figure: str, advice: str) -> Check:
    """Return a pass when `holds`, else a fail with the advice on how to fix it."""
    return passed(figure) if holds else Check("", "fail", figure, advice)


def warn_unless(holds: bool, figure: str, advice: str) -> Check:
    """Return a pass when `holds`, else a warning with the advice on what to look at."""
    return passed(figure) if holds else Check("", "warn", figure, advice)


# ---- Running ----


def run_checks(checks: Sequence[CheckFunction], run: Any, skip: Collection[str] = ()) -> list[Check]:
    """Return the verdict of every check, the worst of all processes; those in `skip` are recorded as off.

    Every process makes every check, and none of them communicates, so that no process waits for another inside one. But
    where FSDP divides the base all processes compute together: there a check makes the same passes in each.
    """
    made = [_run(check, run, skip) for check in checks]
    if PartialState().num_processes == 1:
        return made
    of_each_process: list[list[Check]] = gather_object([made])
    return [max(same, key=lambda check: _SEVERITY.index(check.verdict)) for same in zip(*of_each_process, strict=True)]


def _run(check: CheckFunction, run: Any, skip: Collection[str]) -> Check:
    name = check.__name__
    if name in skip:
        return Check(name, "off", "turned off")
    with preserving_state(getattr(run, "model", None)):
        try:
            return replace(check(run), name=name)
        except RecipesError as error:
            return Check(name, "fail", str(error))
        except Exception as error:  # a check may fail in as many ways as a library can; none may stop other processes
            first = (str(error).splitlines() or [""])[0]
            if isinstance(error, subprocess.CalledProcessError) or "C compiler" in first:  # as Triton raises
                return Check(name, "fail", f"Triton cannot build the GPU kernels of the loss: {first}", _COMPILER)
            return Check(
                name,
                "fail",
                f"the check itself failed: {type(error).__name__}: {first}",
                f"If you are sure of this run, --skip_checks {name} leaves the check out.",
            )


def refuse_failed(checks: Iterable[Check]) -> None:
    """Raise when a check failed.

    Raises:
        CheckError: with the name, the figure and the advice of each.
    """
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        said: dict[str, list[str]] = {}
        for check in failed:
            said.setdefault(f"{check.figure}. {check.advice}".rstrip(), []).append(check.name)
        faults = "\n".join(f"  {', '.join(names)}: {fault}" for fault, names in said.items())
        plural = "" if len(failed) == 1 else "s"
        raise CheckError(f"{len(failed)} check{plural} failed, so this run cannot be trusted:\n{faults}")


def check_names(skip: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the name of a check that does not exist.

    Raises:
        UsageError: naming the nearest.
    """
    known = list(known)
    for name in skip:
        if name not in known:
            raise UsageError(f"no check {name!r} to skip.{nearest(name, known)} They are: {', '.join(known)}")


# ---- The table ----


def print_checks(checks: Sequence[Check], title: str, console: Console) -> None:
    """Print one line a check, with the advice beneath what is not a pass."""
    columns = Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold")
    table = Table(*columns, box=None, show_header=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = Text(title, style="bold")
    for check in checks:
        figure = Text(check.figure)
        if check.advice and check.verdict != "pass":
            figure.append(f"\n{check.advice}", style="italic")
        table.add_row(Text(check.verdict, style=_STYLES[check.verdict]), Text(check.name), figure)
    console.print(table, Text(tally(checks)))


def print_groups(checks: Sequence[Check], title: str, console: Console, groups: Mapping[str, str]) -> None:
    """Print one line a group, `groups` being check to group, and everything that is not a pass in full."""
    table = Table(Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False, padding=(0, 1, 0, 0))
    table.title, table.title_justify = Text(f"{title}: {tally(checks)}", style="bold"), "left"
    for group in dict.fromkeys(groups.get(check.name, "recipe") for check in checks):
        made = [check for check in checks if groups.get(check.name, "recipe") == group]
        good = [check.name for check in made if check.verdict == "pass"]
        lines = [Text(", ".join(good), style="green")] if good else []
        for check in made:
            if check.verdict != "pass":
                line = Text.assemble((f"{check.verdict} {check.name}", _STYLES[check.verdict]), f": {check.figure}")
                lines.append(line.append(f". {check.advice}" if check.advice else "", style="italic"))
        table.add_row(Text(group), Text("\n").join(lines))
    console.print(table)


def tally(checks: Sequence[Check]) -> str:
    """Return how many checks have each verdict, such as `31 pass, 2 warn (steps, memory)`."""
    found = {verdict: [check.name for check in checks if check.verdict == verdict] for verdict in _STYLES}
    return ", ".join(
        f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if verdict != "pass" else "")
        for verdict, names in found.items()
        if names
    )
