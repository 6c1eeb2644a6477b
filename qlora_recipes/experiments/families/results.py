"""What came out for each architecture, as a table on the screen, in Markdown and as JSON. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_recipes.experiments.families.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from qlora_recipes.experiments.families.examine import Examined

_NONE = "-"
COLUMNS = {
    "4-bit": "share of the weights of linear layers and experts that NF4 stores in 4 bits",
    "template": "whose: TRL's training version, the tokenizer's with its own marks, one marked here, or the plain one",
    "mask": "ids and loss mask of the same rows beside those of TRL's own training template",
    "leak": "largest difference in a packed conversation's logits when the one before it changes",
    "plan": "planned bytes of the base by those counted: bf16 on the meta device, nf4 in memory",
    "forged": "messages that could open a turn, of those tried",
    "reload": "whether the saved adapter gives the logits of the trained one, with nf4 and bf16",
    "nf4": "first and last loss",
    "bf16": "first and last loss",
    "speed": "tokens/s with nf4 by those of the plain TRL script",
}
"""Name to what a column says."""


def cells(found: Examined) -> list[str]:
    """Return the text of each column."""
    return [
        _NONE if found.quantized_share is None else f"{found.quantized_share:.1%}",
        found.template or _NONE,
        found.mask or _NONE,
        _figure(found, "packing_leak", until=" in the next").partition(",")[0],
        " ".join(f"{found.plan[name]:.3f}" if name in found.plan else _NONE for name in ("bf16", "nf4")),
        _figure(found, "forged_turns", until=" tries"),
        " ".join(_reloads(found, precision) for precision in ("nf4", "bf16")),
        *(_losses(found, precision) for precision in ("nf4", "bf16")),
        _NONE if found.speed is None else f"{found.speed:.2f}",
    ]


def _figure(found: Examined, check: str, *, until: str) -> str:
    """Return the beginning of what a check found, or its verdict where that is no pass."""
    made = found.checks.get("nf4", {}).get(check)
    if made is None:
        return _NONE
    return made.figure.partition(until)[0] if made.verdict == "pass" else made.verdict


def _reloads(found: Examined, precision: str) -> str:
    made = found.checks.get(precision, {}).get("adapter_reloads")
    return _NONE if made is None else "yes" if made.verdict == "pass" else made.verdict


def _losses(found: Examined, precision: str) -> str:
    first, last = found.losses.get(precision, (None, None))
    return _NONE if first is None or last is None else f"{first:.2f} {last:.2f}"


def reasons(found: Examined) -> list[str]:
    """Return a sentence for everything that was refused, failed or differs, each once."""
    told: dict[str, list[str]] = {}
    for part, reason in (found.reasons | found.known).items():
        told.setdefault(reason, []).append(part)
    return [f"{', '.join(parts)}: {reason}" for reason, parts in told.items()]


def print_table(all_found: Sequence[Examined], console: Console) -> None:
    """Print a row for each architecture, and below it the reasons."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("architecture", *COLUMNS):
        table.add_column(name, no_wrap=name == "architecture")
    for found in all_found:
        style = "green" if found.passes else "red"
        table.add_row(Text(found.name, style=style), *map(Text, cells(found)))
    console.print(table)
    for found in all_found:
        for reason in reasons(found):
            console.print(Text(f"{found.name}: {reason}"))
    console.print(Text(_summary(all_found)))


def _summary(all_found: Iterable[Examined]) -> str:
    passing = [found.passes for found in all_found]
    return f"{sum(passing)} of {len(passing)} architectures pass every check and train with nf4 and bf16"


def markdown(all_found: Sequence[Examined], command: str) -> str:
    """Return the table, what its columns say, the command that made it, and the reasons."""
    lines = [f"Made by `{command}`. {_summary(all_found)}.", ""]
    lines += [f"- **{name}**: {text}" for name, text in COLUMNS.items()]
    lines += ["", "| architecture | as in | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for found in all_found:
        of = f"{found.name} | [{ARCHITECTURES[found.name].hub_id}](https://huggingface.co/{ARCHITECTURES[found.name].hub_id})"
        lines.append(f"| {of} | " + " | ".join(cells(found)) + " |")
    failing = [f"- {found.name}: {_escaped(reason)}" for found in all_found for reason in reasons(found)]
    return "\n".join(lines + (["", "What fails or differs, and why:", "", *failing] if failing else [])) + "\n"


def _escaped(text: str) -> str:
    """Return text whose brackets and angles stay as they are in Markdown."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return text


def as_dict(found: Examined) -> dict[str, Any]:
    """Return everything about one architecture as JSON can hold it."""
    architecture = ARCHITECTURES[found.name]
    return {"hub_id": architecture.hub_id, "trait": architecture.trait, "passes": found.passes, **asdict(found)}
