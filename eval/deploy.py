"""Measure what comes after training: switching and mixing adapters, and an adapter merged against one that is not.

python eval/deploy.py RUN_A RUN_B --new_tokens 32 --json deploy.json

The runs share a base, as for `qlora-recipes ask`. Every time is a median; arms take turns in one process. Memory is the
process's anonymous memory (RssAnon) beside what it had before. Everything temporary is removed at the end.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qlora_recipes.base.checkpoint import weight_files
from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.flags import RUNS, Parser, count, file_to_write
from qlora_recipes.deploy.answering import MixingProof, Request, answer, prove_mixing
from qlora_recipes.deploy.choice import seconds_per_token
from qlora_recipes.deploy.mixing import BASE, MixedRuns, restore_runs
from qlora_recipes.deploy.weights import Changes, read_changes, write_configuration, write_merged
from qlora_recipes.evaluation.generation import Generation
from qlora_recipes.evaluation.loaded import BaseKey, restore_base, restore_run
from qlora_recipes.formatters import before_last_answer
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.run.folder import RunFolder

_REPEATS = 3
_STATUS = Path("/proc/self/status")
_FLAGS = (
    count("new_tokens", "tokens of an answer (32)", 32),
    count("prompts", "questions, each asked of another run in turn (16)", 16),
    file_to_write("json", "write the figures here", ".json"),
)


@dataclass
class Figures:
    """Everything that is measured."""

    parameters: int
    precision: str
    proof: MixingProof
    switch_seconds: float
    adapter_bytes: dict[str, int]
    tokens_per_second: dict[str, float]
    """`mixed`: all questions as one batch; `separate`: a batch for each adapter; `one by one`."""
    milliseconds_per_token: dict[str, float] = field(default_factory=dict)
    merge: dict[str, float] = field(default_factory=dict)


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    flags = Parser("eval/deploy.py", __doc__.split("\n")[0], {"flags": _FLAGS}, words=RUNS).parse(argv)
    folders = [RunFolder(Path(run)) for run in flags["run"]]
    with restore_runs(folders) as runs:
        figures = _mixing(runs, flags["prompts"], Generation(max_new_tokens=flags["new_tokens"]))
        files = weight_files(runs.run.receipt.base.model, runs.run.receipt.base.revision)
    gc.collect()
    _merging(folders[0], files, figures)
    text = json.dumps(asdict(figures), indent=2)
    print(text)
    if flags["json"]:
        Path(flags["json"]).write_text(text + "\n", encoding="utf-8")


def _mixing(runs: MixedRuns, prompts: int, settings: Generation) -> Figures:
    names = list(runs.adapters)
    kept = [(before_last_answer(row.messages), row.tools) for row in runs.run.held_out]
    asked = [each for each in kept if each[0]] or [([{"role": "user", "content": "Hello"}], None)]
    questions = islice(cycle(asked), prompts)
    requests = [Request(said, name, tools=tools) for (said, tools), name in zip(questions, cycle(names), strict=False)]
    separate = replace(runs, unmixable="measured apart")
    arms: dict[str, Callable[[], Any]] = {
        "mixed": lambda: answer(runs, requests, settings, batch_size=prompts),
        "separate": lambda: answer(separate, requests, settings, batch_size=prompts),
        "one by one": lambda: answer(separate, requests, settings, batch_size=1),
    }
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(_REPEATS):
        for name, work in arms.items():
            started = time.perf_counter()
            found = work()
            speeds[name].append(sum(given.tokens for given in found) / (time.perf_counter() - started))
    switches = []
    for i in range(20):
        started = time.perf_counter()
        runs.model.set_adapter(runs.adapters[names[1 + i % (len(names) - 1)]])
        switches.append(time.perf_counter() - started)
    return Figures(
        parameters=runs.run.receipt.base.parameters,
        precision=runs.run.precision,
        proof=prove_mixing(runs),
        switch_seconds=median(switches),
        adapter_bytes={name: runs.bytes_of(name) for name in names if name != BASE},
        tokens_per_second={name: median(values) for name, values in speeds.items()},
    )


def _merging(folder: RunFolder, files: Any, figures: Figures) -> None:
    """Measure a token's time of base and adapter in both precisions, and of the adapter merged, and its writing."""
    receipt = folder.receipt()
    dtype = getattr(torch, receipt.dtype)
    wide = next(name for name, kind in PRECISIONS.items() if kind.dtype == receipt.dtype)
    times: dict[str, list[float]] = {}
    for precision in dict.fromkeys((receipt.precision, wide)):
        key = BaseKey.of(receipt, precision)
        with restore_run(folder, restore_base(key), key) as run:
            changes, prompt = read_changes(run.model, files), _prompt(run)
            end, tokenizer = run.encoder.end_id, run.tokenizer
            for _ in range(_REPEATS):
                times.setdefault(f"{precision} with adapter", []).append(seconds_per_token(run.model, prompt))
                with run.model.disable_adapter():
                    times.setdefault(f"{precision} alone", []).append(seconds_per_token(run.model, prompt))
        del run
        gc.collect()
    with tempfile.TemporaryDirectory(prefix="merged-") as scratch:
        merged = Path(scratch, "merged")
        figures.merge = _written(files, changes, merged, dtype)
        write_configuration(next(iter(files.values())).parent, merged, receipt.dtype, end)
        tokenizer.save_pretrained(merged)
        model = restore_base(replace(BaseKey.of(receipt, wide), model=str(merged), revision=None)).model
        times["merged"] = [seconds_per_token(model, prompt) for _ in range(_REPEATS)]
    figures.milliseconds_per_token = {name: 1000 * median(values) for name, values in times.items()}


def _prompt(run: Any) -> list[int]:
    ids: list[int] = run.encoder.encode_prompt([{"role": "user", "content": "Hello"}])
    return ids


def _written(files: Any, changes: Changes, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Write a merged checkpoint, and return seconds, the peak of memory beside before, and the largest shard."""
    before, peak, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    write_merged(files, changes, folder, dtype)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    shards = [shard.stat().st_size for shard in folder.glob("*.safetensors")]
    return {
        "seconds": seconds,
        "peak_bytes": peak[0],
        "shards": len(shards),
        "largest_shard_bytes": max(shards),
        "bytes": sum(shards),
    }


def _anonymous() -> int:
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
