"""What a person sees of a run, while it trains and at its end, and the metrics file that programs read.

Changes nothing of the training.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from qlora_recipes.preflight import tally
from qlora_recipes.run.display import progress_bar, running_mean
from qlora_recipes.run.files import read_lines, write_text
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Resume


class ProgressDisplay(TrainerCallback):
    """A bar with step, loss, tokens/s and time left; nothing is drawn but on a terminal."""

    def __init__(self, console: Console) -> None:
        loss, speed = TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[speed]} tokens/s")
        self.progress = progress_bar("training", console, loss, speed)
        self.started = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        self.started = time.monotonic()
        self.tokens_before = max((entry.get("num_tokens", 0) for entry in state.log_history), default=0)
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss="-", speed="-"
        )
        self.progress.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, *, logs: Any = None, **kw: Any) -> None:
        if logs and "loss" in logs:
            speed = (logs.get("num_tokens", 0) - self.tokens_before) / max(time.monotonic() - self.started, 1e-9)
            skipped = f" ({logs['skipped_steps']} skipped)" if logs.get("skipped_steps") else ""
            self.progress.update(self.task, loss=f"{float(logs['loss']):.3f}{skipped}", speed=f"{speed:,.0f}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        self.progress.stop()


class MetricsFile(TrainerCallback):
    """Writes every logged step as one JSON line; a resumed run first drops what came after its checkpoint."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        write_text(self.file, "".join(_line(int(entry["step"]), entry) for entry in state.log_history))

    def on_log(self, args: Any, state: TrainerState, control: Any, *, logs: Any = None, **kw: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(_line(state.global_step, logs))


def _line(step: int, logs: Mapping[str, Any]) -> str:
    return json.dumps({"step": step, **logs}) + "\n"


def print_resume(resume: Resume, console: Console) -> None:
    """Print from which step a run is resumed, and which checkpoints were passed over."""
    for name, fault in resume.passed_over.items():
        console.print(Text(f"passed over {name}: {fault}"))
    for name, change in resume.versions_changed.items():
        console.print(Text(f"{name} {change} since the run was started: bit-identical results cannot be promised"))
    if resume.processes_changed:
        console.print(
            Text(f"processes {resume.processes_changed}: every step has the same rows, but is no longer bit-exact")
        )
    because = f" ({resume.reason})" if resume.reason else ""
    console.print(Text(f"resuming after step {resume.from_step}{because}"))


def plot_loss(metrics: Path, picture: Path, title: str) -> None:
    """Draw the logged losses of a run, with their running mean, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_lines(metrics, dict[str, Any], fix="Train again with --overwrite")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each logged step")
    axes.plot(steps, running_mean(losses, 10), color="tab:blue", label="running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held-out rows")
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def print_summary(folder: RunFolder, console: Console | None = None) -> None:
    """Say what a person looks for first in a receipt, in whole sentences."""
    run = folder.receipt()
    data, base, adapter, training, memory = run.data, run.base, run.adapter, run.training, run.memory
    quantized, asked, dropped = base.quantized, run.settings.training, sum(run.data.rows_dropped.values())
    stored = f"{quantized.found} of {quantized.expected} linear layers are stored as {run.precision}"
    rows = f"{asked['per_device_train_batch_size']} x {asked['gradient_accumulation_steps']} rows"
    planned = f", where {_gib(memory.planned_bytes)} were planned" if memory.planned_bytes else ""
    reserved = f" ({_gib(memory.reserved_bytes)} reserved)" if memory.reserved_bytes else ""
    resumed = ", ".join(str(resume.from_step) for resume in run.resumes)
    sentences = [
        f"Trained an adapter of {adapter.parameters:,} weights in {adapter.modules} modules ({adapter.dtype}, sha256 "
        f"{adapter.final_sha256[:12]}) on {base.model}, which takes {base.bytes / 2**20:,.1f} MiB"
        + (f": {stored}." if quantized.expected else f" in {run.precision}."),
        f"It saw {data.rows_used:,} of the {data.rows_in:,} rows of {data.source}; {data.rows_held_out:,} were held "
        f"out and {dropped:,} dropped. {data.supervised_tokens:,} of {data.tokens:,} tokens are in the loss.",
        f"The loss went from {training.first_loss:.3f} to {training.final_loss:.3f} in {training.steps} steps of "
        f"{rows}, at {training.tokens_per_second:,.0f} tokens/s in {training.seconds:.1f} s.",
        f"float16's loss scaler skipped {training.skipped_steps} of the steps." if training.skipped_steps else "",
        f"Memory peaked at {_gib(memory.peak_bytes)}{reserved}; training used {_gib(memory.training_bytes)} of it"
        f"{planned}.",
        f"Upstream defects repaired: {', '.join(run.repairs) or 'none'}.",
        f"The run was resumed after step {resumed}." if resumed else "",
        f"Checks: {tally(run.checks)}.",
        f"Everything is in {folder.path}. To score it: qlora-recipes evaluate {shlex.quote(str(folder.path))}",
    ]
    console = console or Console()
    for sentence in filter(None, sentences):
        console.print(Text(sentence))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
