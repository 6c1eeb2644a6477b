"""Kill runs with SIGKILL at random moments, resume them, and compare the results with those of an uninterrupted run.

    python tests/kill_and_resume.py --kills 30
    python tests/kill_and_resume.py --kills 12 --processes 2 [--sharded]

With several processes one of them is killed, and all are started again. Prints one line for each kill, then how many
runs ended with the same adapter, to the bit, and the same curve; exits with 1 when one did not. The models are tiny,
and random; the code is the one that trains real ones.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conftest import FAMILIES, make_tiny  # first: it keeps the hub and the GPU away
from forked_ranks import launch_variables, launcher_store
from rich.console import Console
from torch import cuda

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.base.adapters import WEIGHTS
from qlora_recipes.errors import EXIT_CODE, RecipesError
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.standins import ROWS
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

VARIANTS: dict[str, dict[str, Any]] = {
    f"{precision}, {'packed' if packing else 'padded'}": dict(precision=precision, training=dict(packing=packing))
    for precision in ("nf4", "bf16")
    for packing in (True, False)
}
"""Each with dropout, gradient accumulation, checkpoints and evaluations; two epochs begin within its steps."""

PLACES = ("anywhere", "steps", "save", "evaluation")
"""Where a kill is aimed at: uniformly over the whole run, over its steps, or within a save or an evaluation."""

START = "spawn" if cuda.is_available() else "fork"
"""bitsandbytes opens the GPU when it is imported, and a fork of such a process cannot use it."""
DETERMINISTIC = dict(full_determinism=True) if START == "spawn" else {}
"""On a GPU the backward pass of attention adds in any order, unless it is told not to."""
_LEFT_ALONE = 15
"""Seconds that the other processes get to notice by themselves that one is gone."""
_EVENTS = {"_save_checkpoint": "save", "evaluate": "evaluation", "training_step": "step"}
_COUNTED = ("steps", "micro_batches", "epochs", "first_loss", "final_loss", "tokens", "supervised_tokens")


@dataclass(frozen=True)
class Launch:
    """How a run is spread over processes, and which of them is watched and killed."""

    processes: int = 1
    sharded: bool = False
    victim: int = 0


@dataclass
class Session:
    """One process that trained, until it ended or was killed."""

    events: list[tuple[float, str]] = field(default_factory=list)
    """Seconds since its start, and `save`, `evaluation` or `step`; with `end of` before it when it was over."""
    seconds: float = 0.0
    killed: bool = False
    code: int = 0
    others: list[int] = field(default_factory=list)
    """Exit codes of the other processes of the same run."""

    def count(self, event: str) -> int:
        return [name for _, name in self.events].count(event)

    @property
    def phase(self) -> str:
        """What the process was at when it ended."""
        running = collections.Counter()
        for _, event in self.events:
            running[event.removeprefix("end of ")] += -1 if event.startswith("end of ") else 1
        return next((name for name in ("save", "evaluation", "step") if running[name]), self._between)

    @property
    def _between(self) -> str:
        return "between steps" if self.events else "before the first step"


def recipe(folder: Path) -> type[Recipe]:
    """Return a recipe of six steps on forty rows, and make its model and its rows."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        make_tiny("llama2", folder / "model")
        rows.write_text("".join(ROWS["guanaco_llama2"].read_text().splitlines(keepends=True)[:40]))

    class Killed(Recipe):
        model = FAMILIES["llama2"]
        dataset = DatasetSpec(str(rows), held_out=0.1)
        lora = dict(r=4, lora_dropout=0.1)
        training = dict(
            max_steps=12, max_length=128, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=3, logging_steps=2, **DETERMINISTIC,
        )  # fmt: skip

    return Killed


def run(
    folder: Path, variant: str, output: Path, launch: Launch, aim: Aim | None = None, *, resume: bool = False
) -> Session:
    """Train in processes of their own, and kill one when it is where `aim` says."""
    ways = multiprocessing.get_context(START)
    ear, mouth = ways.Pipe(duplex=False)
    store = launcher_store()
    children = []
    for rank in range(launch.processes):
        variables = launch_variables(rank, launch.processes, store, launch.processes) if launch.processes > 1 else {}
        of_child = (mouth, rank == launch.victim, variables)
        child = ways.Process(target=_child, args=(folder, variant, output, *of_child, resume, launch.sharded))
        child.start()
        children.append(child)
    mouth.close()
    with ear:
        session = _watch(children.pop(launch.victim), ear.fileno(), aim)
    session.others = [_end(child) for child in children]
    session.code = session.code or max(session.others, key=abs, default=0)
    return session


def _end(child: multiprocessing.Process) -> int:
    """Return the exit code of a process when it has ended; after a while it is killed, as a launcher does."""
    child.join(_LEFT_ALONE)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode


def _child(
    folder: Path,
    variant: str,
    output: Path,
    mouth: Connection,
    watched: bool,
    variables: dict[str, str],
    resume: bool,
    sharded: bool,
) -> None:
    """Train and end the process, whatever happens; every event goes into the pipe where it is watched."""
    code = 1
    try:
        os.environ.update(variables)
        if not watched:
            mouth.close()
        if sharded:
            from sharded_runs import FSDP, label

            os.environ.update(FSDP)
            label(as_on_gpus=True)
        log = (folder / "log.txt").open("a")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        for method, event in _EVENTS.items() if watched else ():
            setattr(RunTrainer, method, _told(getattr(RunTrainer, method), event, mouth.fileno()))
        choices = VARIANTS[variant]
        killed = recipe(folder)
        settings = resolve(
            killed, model=str(folder / "model"), dataset=killed.dataset.source, output_dir=output, **choices
        )
        train(settings, resume=resume, console=Console(file=log))
        code = 0
    except RecipesError as error:
        print(error)
        code = EXIT_CODE
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _told(method: Any, event: str, mouth: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        os.write(mouth, f"{event}\n".encode())
        result = method(*args, **kwargs)
        os.write(mouth, f"end of {event}\n".encode())
        return result

    return call


@dataclass
class Aim:
    """When to kill: so long after the n-th event of a name, or after the start where there is no name."""

    event: str | None
    count: int
    delay: float


def aim_at(place: str, reference: Session, chance: random.Random) -> Aim:
    """Return a random moment of a place, by the times that the undisturbed run took."""
    starts = [at for at, event in reference.events if event == place]
    if place == "anywhere":
        return Aim(None, 0, chance.uniform(0, reference.seconds))
    if place == "steps":
        first = next(at for at, event in reference.events if event == "step")
        return Aim("step", 1, chance.uniform(0, reference.seconds - first))
    which = chance.randrange(len(starts))
    end = next(at for at, event in reference.events if event == f"end of {place}" and at >= starts[which])
    return Aim(place, which + 1, chance.uniform(0, end - starts[which]))


def _watch(child: multiprocessing.Process, ear: int, aim: Aim | None) -> Session:
    session, began = Session(), time.monotonic()
    due = began + aim.delay if aim and aim.event is None else None
    unread = b""
    while True:
        ready, _, _ = select.select([ear], [], [], max(0, due - time.monotonic()) if due else None)
        if not ready:
            child.kill()
            due, session.killed = None, True
            continue
        piece = os.read(ear, 65536)
        if not piece:
            break
        *lines, unread = (unread + piece).split(b"\n")
        for line in lines:
            session.events.append((time.monotonic() - began, line.decode()))
            if (
                aim
                and sum(event == aim.event for _, event in session.events) == aim.count
                and line.decode() == aim.event
            ):
                due = time.monotonic() + aim.delay
    child.join()
    session.seconds, session.code = time.monotonic() - began, child.exitcode
    session.killed = session.code == -signal.SIGKILL
    return session


def outcome(output: Path) -> dict[str, Any]:
    """Return all that must be equal of two runs: the adapter's bytes, the counts, and the curve but for its times."""
    folder = RunFolder(output)
    receipt = folder.receipt()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    curve = [
        {name: value for name, value in row.items() if "runtime" not in name and "per_second" not in name}
        for row in rows
    ]
    return {
        "adapter": receipt.adapter.final_sha256,
        "file": (folder.adapter / WEIGHTS).read_bytes(),
        "counts": {name: getattr(receipt.training, name) for name in _COUNTED},
        "curve": curve,
    }


def kill_once(
    folder: Path, variant: str, place: str, reference: Session, chance: random.Random, number: int, launch: Launch
) -> dict:
    """Kill a run once, and sometimes once more, resume it to its end, and return how it compares."""
    output = folder / f"killed-{number}"
    launch = replace(launch, victim=chance.randrange(launch.processes) if launch.processes > 1 else 0)
    sessions = [run(folder, variant, output, launch, aim_at(place, reference, chance))]
    if sessions[0].killed and not RunFolder(output).finished and chance.random() < 0.25:
        sessions.append(run(folder, variant, output, launch, aim_at("steps", reference, chance), resume=True))
    phases = [session.phase for session in sessions if session.killed]
    if sessions[-1].killed and not RunFolder(output).finished:  # another process may have written the receipt
        run(folder, variant, output, launch, resume=True)
    whole, end = outcome(folder / variant), outcome(output) if RunFolder(output).finished else {}
    return {
        "variant": variant,
        "aimed at": place,
        "killed in": phases,
        "killed rank": launch.victim,
        "the others ended with": sessions[0].others,
        "went on from": [resume.from_step for resume in RunFolder(output).receipt().resumes] if end else [],
        "same": [name for name in whole if end.get(name) == whole[name]],
        "differs in": [name for name in whole if end.get(name) != whole[name]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="runs to kill (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 in place of DDP")
    given = parser.parse_args()
    launch = Launch(given.processes, given.sharded)
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe(folder)
        references = {variant: run(folder, variant, folder / variant, launch) for variant in given.variants}
        if any(session.code for session in references.values()):
            sys.exit((folder / "log.txt").read_text()[-3000:])
        results: list[dict] = []
        for number in range(10 * given.kills):
            if len(results) == given.kills:
                break
            variant = given.variants[len(results) % len(given.variants)]
            place = PLACES[len(results) // len(given.variants) % len(PLACES)]
            result = kill_once(folder, variant, place, references[variant], chance, number, launch)
            if result["killed in"]:  # else the run was over before the moment came
                results.append(result)
                print(json.dumps(result), flush=True)
        log = (folder / "log.txt").read_text()
    wrong = [result for result in results if result["differs in"]]
    kills = sum(len(result["killed in"]) for result in results)
    places = collections.Counter(phase for result in results for phase in result["killed in"])
    print(
        f"{len(results) - len(wrong)} of {len(results)} runs ended bit-identical, after {kills} kills: {dict(places)}"
    )
    if wrong:
        sys.exit(log[-6000:])


if __name__ == "__main__":
    main()
