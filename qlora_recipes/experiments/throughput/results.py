"""The figures of a comparison as a table and as a plot. Knows nothing of how they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_GIB = 2**30


def print_table(figures: Mapping[str, Any], console: Console) -> None:
    """Print one comparison: a row for each arm, how many times as fast the recipe is, the share of the bound."""
    arms, bound = figures["arms"], figures["bound"]
    console.print(Text(_title(figures), style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("arm", "tokens/s", "range", "recipe", "bound", "in the loss/s", "padding", "GiB", "loss"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm, found in arms.items():
        low, high = found["tokens_per_second_range"]
        speed = found["tokens_per_second"]
        table.add_row(
            arm,
            f"{speed:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            f"x {arms['recipe']['tokens_per_second'] / speed:.2f}",
            f"{speed / bound['tokens_per_second']:.0%}",
            f"{found['supervised_tokens_per_second']:,.0f}",
            f"{found['padding_share']:.0%}",
            f"{found['peak_bytes'] / _GIB:.2f}",
            f"{found['losses'][-1]:.4f}",
        )
    console.print(table)
    for arm, found in arms.items():
        console.print(Text(f"{arm}: {_how(found)}"))
    speeds = f"products at {bound['flops'] / 1e9:,.0f} GFLOP/s and copies at {bound['copied'] / 1e9:,.1f} GB/s"
    console.print(Text(f"bound {bound['tokens_per_second']:,.0f} tokens/s: {speeds}, measured in this run"))


def _title(figures: Mapping[str, Any]) -> str:
    model, rows = figures["model"], figures["rows"]
    base = "its stand-in" if model["standin"] else f"{model['hidden_size']} x {model['num_hidden_layers']} layers"
    of = f"rows of {rows['length']} tokens" if rows["length"] else rows["file"]
    return f"{model['family']}, {base}, {figures['precision']}, {of}"


def _how(found: Mapping[str, Any]) -> str:
    kept = f", {found['storage']}" if found["quantized_linears"] or found["storage"] != "packed" else ""
    plan = ""
    if "planned_bytes" in found:
        plan = f"; {found['training_bytes'] / _GIB:.2f} GiB of training, {found['planned_bytes'] / _GIB:.2f} planned"
    return (
        f"{found['quantized_linears']} quantized linears{kept}; {found['micro_batch']} rows at a time, "
        f"checkpointing {'on' if found['checkpointing'] else 'off'}, "
        f"{found['threads']} threads{plan}"
    )


def plot(all_figures: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the tokens/s of every arm, a group for each comparison with the bound as a line."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(all_figures[0]["arms"])
    figure, axes = pyplot.subplots(figsize=(3.5 + 0.6 * len(arms) * len(all_figures), 3.6), layout="constrained")
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        places = [group + (number - (len(arms) - 1) / 2) * width for group in range(len(all_figures))]
        found = [figures["arms"][arm] for figures in all_figures]
        speeds = [each["tokens_per_second"] for each in found]
        low, high = np.transpose([each["tokens_per_second_range"] for each in found])
        bars = axes.bar(places, speeds, width, yerr=[speeds - low, high - speeds], capsize=3, label=arm)
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=8)
    for group, figures in enumerate(all_figures):
        limit = figures["bound"]["tokens_per_second"]
        axes.plot([group - 0.45, group + 0.45], [limit, limit], "k--", linewidth=1, label=None if group else "bound")
    labels = [f"{each['rows']['length']} tokens" if each["rows"]["length"] else _title(each) for each in all_figures]
    axes.set_xticks(range(len(all_figures)), labels, fontsize=8)
    axes.set_ylabel("real tokens a second")
    figure.legend(fontsize=8, loc="outside right upper")
    axes.margins(y=0.15)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
