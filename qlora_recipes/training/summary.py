"""The lines of a finished run's receipt that are printed at its end."""

from __future__ import annotations

from rich.console import Console

from qlora_recipes.preflight import tally
from qlora_recipes.run.display import figures_table
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import MemoryReceipt, Receipt


def print_summary(folder: RunFolder, console: Console | None = None) -> None:
    """Print the lines of a receipt that a person looks for first."""
    run = folder.receipt()
    data, base, adapter, training = run.data, run.base, run.adapter, run.training
    quantized = base.quantized
    dropped = sum(data.rows_dropped.values())
    rows = {
        "base": f"{base.model}, {run.precision}, {quantized.found} of {quantized.expected} linears "
        f"quantized, {base.bytes / 2**20:,.1f} MiB",
        "data": f"{data.source}: {data.rows_used:,} of {data.rows_in:,} rows trained on, "
        f"{data.rows_held_out:,} held out, {dropped:,} dropped",
        "in the loss": f"{data.supervised_tokens:,} of {data.tokens:,} tokens",
        "adapter": f"{adapter.parameters:,} weights in {adapter.modules} modules, {adapter.dtype}, "
        f"sha256 {adapter.final_sha256[:12]}",
        "loss": f"{training.first_loss:.3f} to {training.final_loss:.3f} in {training.steps} steps",
        "speed": f"{training.tokens_per_second:,.0f} tokens/s, {training.seconds:.1f} s",
        "a step": _step(run),
        "memory": _memory(run.memory),
        "repaired": ", ".join(run.repairs) or "nothing",
        "checks": tally(run.checks),
        "resumed": ", ".join(f"after step {resume.from_step}" for resume in run.resumes),
        "written to": str(folder.path),
    }
    (console or Console()).print(figures_table(rows))


def _step(run: Receipt) -> str:
    training, base = run.settings.training, run.base
    rows = f"{training['per_device_train_batch_size']} x {training['gradient_accumulation_steps']} rows"
    return f"{rows}, {base.storage} weights" if base.quantized.found else rows


def _memory(memory: MemoryReceipt) -> str:
    planned = memory.planned_bytes
    own = f", {memory.training_bytes / 2**30:.2f} of it used by training"
    return f"{memory.peak_bytes / 2**30:.2f} GiB peak{own}" + (f", {planned / 2**30:.2f} planned" if planned else "")
