"""The page that is written from what ran: docs/gpu.md. Knows nothing of how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_GIB = 2**30
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
_HEAD = """\
# On a GPU

    make gpu        # or: python eval/on_gpu.py --json gpu.json --markdown docs/gpu.md

One command, no network, under ten minutes on one GPU: the tests marked `gpu`, two demos, an evaluation, runs that are
killed and resumed, and for the shapes of Llama-2-7B and Falcon-7B, with random weights that are drawn as they are
loaded: tokens/s of the recipe in nf4, bf16 and fp16 and of TRL's documented scripts, memory of training and of an
evaluation beside the plan, a profile of one step, attention by conversation beside a mask. What is worth most comes
first; it goes on after a failure, writes down what it has after each part, and says what it did not reach. This page is
its output.
"""
NO_GPU = """\
**No GPU has run this yet.** What follows is the same program with small models on a CPU, which shows that the program
works and nothing of a GPU: take no speed from it. Peaks are left out, since a process here measures several things.
"""


def write(figures: Mapping[str, Any]) -> str:
    """Return the page."""
    outcomes, machine = figures["outcomes"], figures["machine"]
    scale, versions = figures["scale"], figures["versions"]
    where = machine["name"]
    if machine["device"] == "cuda":
        where += f", {machine['bytes'] / _GIB:.0f} GiB, capability {machine['capability']}, CUDA {machine['cuda']}"
    packages = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES)
    sections = [_HEAD] + [NO_GPU] * (machine["device"] != "cuda")
    sections.append(
        f"Ran on: {where}; {packages}. Models: {scale['num_hidden_layers']} layers, rows of up to "
        f"{scale['max_length']:,} tokens, 8 a step.\n"
    )
    sections += [section(outcomes) for section in (_speed, _evaluation, _attention, _profiles, _outcomes)]
    return "\n".join(section for section in sections if section)


def _of(outcomes: Sequence[Mapping[str, Any]], group: str) -> list[Mapping[str, Any]]:
    return [each for each in outcomes if each["group"] == group and each["state"] == "done"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _speed(outcomes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for each in _of(outcomes, "speed"):
        found = each["figures"]
        limit = found.get("bound")
        rows.append(
            [
                each["name"],
                f"{found['tokens_per_second']:,.0f}",
                f"{found['tokens_per_second'] / limit['tokens_per_second']:.0%}" if limit else "",
                _gib(found.get("peak_bytes")),
                _gib(found.get("training_bytes")),
                _gib(found.get("planned_bytes")),
                f"{found['micro_batch']}",
                f"{found['padding_share']:.0%}",
                "yes" if found["checkpointing"] else "no",
                f"{found['losses'][-1]:.4f}",
            ]
        )
    head = (
        "arm",
        "real tokens/s",
        "of the bound",
        "peak, GiB",
        "training, GiB",
        "planned, GiB",
        "rows at a time",
        "padding",
        "checkpointed",
        "last loss",
    )
    return "## Speed and memory\n\n" + _table(head, rows) if rows else ""


def _evaluation(outcomes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for each in _of(outcomes, "evaluation"):
        found = each["figures"]
        rows.append(
            [
                each["name"],
                f"{found['rows']} rows, {found['positions']:,} positions at a time",
                f"{found['tokens_per_second']:,.0f}",
                _gib(found.get("used_bytes")),
                _gib(found["planned_bytes"]),
            ]
        )
    head = ("base in NF4 with an adapter", "scored", "real tokens/s", "peak, GiB", "planned, GiB")
    return "## An evaluation\n\n" + _table(head, rows) if rows else ""


def _attention(outcomes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for each in _of(outcomes, "attention"):
        found = each["figures"]
        taken = found["milliseconds"]
        rows.append(
            [
                f"{found['heads'][0]} heads, {found['heads'][1]} of keys",
                f"{found['tokens']:,} in {found['conversations']}",
                f"{taken['by conversation']:.2f}",
                f"{taken['a mask']:.2f}",
                f"{taken['a mask'] / taken['by conversation']:.1f}",
                f"{found['largest_difference']:.4f}",
            ]
        )
    head = ("attention", "tokens, conversations", "by conversation, ms", "a mask, ms", "ratio", "largest difference")
    return "## Attention, forward and backward\n\n" + _table(head, rows) if rows else ""


def _profiles(outcomes: Sequence[Mapping[str, Any]]) -> str:
    text = ""
    for each in _of(outcomes, "profile"):
        found = each["figures"]
        total = found["total_milliseconds"]
        waits = "" if found["waits"] is None else f"; the processor waited for the GPU {found['waits']} times"
        took = f"a step of {found['seconds']:.2f} s in {found['micro_batches']} micro-batches"
        text += f"### {each['name']}: {took}{waits}\n\n"
        rows = [[f"`{name[:70]}`", f"{ms:,.1f}", f"{ms / total:.0%}"] for name, ms in found["milliseconds"].items()]
        text += _table(("what", "ms", "share"), rows) + "\n"
    return "## Where a step goes\n\n" + text if text else ""


def _outcomes(outcomes: Sequence[Mapping[str, Any]]) -> str:
    rows = [[each["name"], each["state"], f"{each['seconds']:.0f}", _last_line(each)] for each in outcomes]
    return "## What ran\n\n" + _table(("part", "state", "seconds", "what it said last"), rows)


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / _GIB:.2f}"


def _last_line(outcome: Mapping[str, Any]) -> str:
    """Return what a part without figures said last; where it failed, what comes before how it ended, too."""
    lines = [line.strip() for line in outcome["said"].splitlines() if line.strip()]
    said = "; ".join(line[:160] for line in lines[-2 if outcome["state"] == "failed" else -1 :])
    return "" if outcome["figures"] else said.replace("|", "/")
