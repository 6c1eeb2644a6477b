"""Run a list of checks on a run, agree on the verdicts over all processes, and refuse what failed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from qlora_recipes.errors import CheckError, RecipesError, UsageError, nearest
from qlora_recipes.preflight.preserving import preserving_state
from qlora_recipes.run.receipt import Check

CheckFunction = Callable[[Any], Check]
"""A function of one stage of a run (see subject.py); its name is the check's."""

_SEVERITY = ("off", "pass", "warn", "fail")


def run_checks(checks: Sequence[CheckFunction], run: Any, skip: Collection[str] = ()) -> list[Check]:
    """Return the verdict of every check, the worst of all processes; those in `skip` are recorded as off.

    Every process makes every check and none of them communicates, so that no process waits for another inside one.
    """
    return _worst_of_all([_run(check, run, skip) for check in checks])


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
            return Check(
                name,
                "fail",
                f"could not be made: {type(error).__name__}: {first}",
                f"If you are sure of this run, --skip_checks {name} goes without it.",
            )


def _worst_of_all(checks: list[Check]) -> list[Check]:
    if PartialState().num_processes == 1:
        return checks
    of_each_process: list[list[Check]] = gather_object([checks])
    return [max(same, key=lambda check: _SEVERITY.index(check.verdict)) for same in zip(*of_each_process, strict=True)]


def refuse_failed(checks: Iterable[Check]) -> None:
    """Raise when a check failed.

    Raises:
        CheckError: with the name, the figure and the advice of each.
    """
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        faults = "\n".join(f"  {check.name}: {check.figure}. {check.advice}".rstrip() for check in failed)
        raise CheckError(f"{len(failed)} of the run's checks failed, and nothing can be proven of it:\n{faults}")


def check_names(skip: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the name of a check that there is none of.

    Raises:
        UsageError: naming the nearest.
    """
    known = list(known)
    for name in skip:
        if name not in known:
            raise UsageError(f"no check {name!r} to skip.{nearest(name, known)} They are: {', '.join(known)}")
