"""The report's tables, each once: HTML, Markdown, CSV and LaTeX are made from the same rows.

Records in, tables and text out. Knows nothing of files or of pages.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_recipes.comparison.findings import Arm, Contrast, Report
from qlora_recipes.comparison.paired import Comparison
from qlora_recipes.comparison.sentences import interval, signed
from qlora_recipes.report.escape import latex, plain, spreadsheet


@dataclass(frozen=True)
class Column:
    """One column, and the form that its cells are shown in."""

    name: str
    form: str = "text"
    """A key of `FORMS`."""

    @property
    def numeric(self) -> bool:
        """Whether its cells are numbers, which stand to the right."""
        return self.form not in ("text", "verdict")


@dataclass(frozen=True)
class Table:
    """Rows under their columns; None is a cell that has nothing to say."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    whole: Sequence[int] = ()
    """Rows that sum up others."""

    def shown(self) -> list[list[str]]:
        """Return every cell as text."""
        forms = [FORMS[column.form] for column in self.columns]
        return [
            ["–" if cell is None else form(cell) for form, cell in zip(forms, row, strict=True)]  # noqa: RUF001
            for row in self.rows
        ]


def p_value(value: float) -> str:
    """Return a p-value with three digits."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def size(number: float) -> str:
    """Return bytes in a unit that a person reads."""
    for unit, bytes_of_one in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= bytes_of_one:
            return f"{number / bytes_of_one:,.2f} {unit}"
    return f"{number / 1024:,.0f} KiB"


FORMS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "verdict": str,
    "count": "{:,.0f}".format,
    "points": "{:.2f}".format,
    "bits": "{:.3f}".format,
    "fine": "{:.4f}".format,
    "difference": signed,
    "fine difference": lambda value: signed(value, 4),
    "interval": interval,
    "score interval": lambda bounds: f"{bounds[0]:.2f} to {bounds[1]:.2f}",
    "fine interval": lambda value: interval(value, 4),
    "percent": "{:.2f} %".format,
    "p": p_value,
    "bytes": size,
    "seconds": "{:,.0f} s".format,
}


def as_csv(table: Table) -> str:
    """Return the unrounded values as CSV; an interval takes two columns, and a cell without a value is empty.

    Text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ([f"{c.name} low", f"{c.name} high"] if c.form.endswith("interval") else [c.name] for c in table.columns)
    writer.writerow(name for pair in names for name in pair)
    for row in table.rows:
        cells: list[Any] = []
        for column, cell in zip(table.columns, row, strict=True):
            if column.form.endswith("interval"):
                cells += cell or (None, None)
            else:
                cells.append(spreadsheet(cell) if isinstance(cell, str) else cell)
        writer.writerow(cells)
    return stream.getvalue()


def as_latex(table: Table) -> str:
    """Return a `tabular` that needs no package, with its caption as a comment."""
    head = " & ".join(latex(column.name) for column in table.columns)
    body = [" & ".join(map(latex, row)) + r" \\" for row in table.shown()]
    for row in table.whole:
        body[row] = r"\hline " + body[row] + r" \hline"
    align = "".join("r" if column.numeric else "l" for column in table.columns)
    caption = " ".join(plain(table.caption).split())
    lines = [f"% {caption}", rf"\begin{{tabular}}{{{align}}}", r"\hline", rf"{head} \\", r"\hline", *body, r"\hline"]
    return "\n".join([*lines, r"\end{tabular}", ""])


def tables(report: Report) -> dict[str, Table]:
    """Return every table that the report has rows for, by name."""
    return {name: table for name, make in TABLES.items() if (table := make(report)).rows}


def verdict_of(found: Comparison) -> str:
    """Return the verdict, or that it was a trial."""
    return "trial" if found.limited else found.verdict


def _contrasts(report: Report) -> list[Contrast]:
    return [*report.contrasts, *([report.noise] if report.noise else [])]


def label(contrast: Contrast) -> str:
    """Return what is subtracted from what."""
    return f"{contrast.name} − {contrast.baseline}"  # noqa: RUF001  a minus


def _scores(report: Report) -> Table:
    tasks = list(report.arms[0].scores)
    columns = [Column(""), Column("all tasks", "points"), Column("95 % interval", "score interval")]
    tuned = [(f"{arm.precision}, tuned", arm.overall, arm.scores) for arm in report.arms]
    others = [(control.name, control.overall, control.scores) for control in report.controls]
    rows = [[name, mean.mean, mean.interval_95, *map(scores.get, tasks)] for name, mean, scores in tuned + others]
    caption = "Scores in points, means over seeds; all tasks: the mean over those of the verdict, with its own interval"
    return Table(caption, [*columns, *(Column(task, "points") for task in tasks)], rows)


def _effects(report: Report) -> Table:
    columns = [Column("step"), Column("compared"), Column("difference", "difference")]
    columns += [Column("90 % interval", "interval"), Column("95 % interval", "interval"), Column("verdict", "verdict")]
    rows = [
        [each.name, each.meaning, found.difference, found.interval, found.interval_95, verdict_of(found)]
        for each in report.effects
        for found in [each.comparison]
    ]
    return Table("The steps from the baseline to each arm, in points over all tasks of the verdict", columns, rows)


def _differences(report: Report) -> Table:
    names = "arm task metric score baseline difference".split()
    forms = "text text text points points difference".split()
    columns = [Column(name, form) for name, form in zip(names, forms, strict=True)]
    columns += [Column("90 % interval", "interval"), Column("95 % interval", "interval"), Column("documents", "count")]
    columns += [Column("p equal", "p"), Column("p differ", "p"), Column("verdict", "verdict")]
    rows, whole = [], []
    for contrast in _contrasts(report):
        for task in contrast.tasks:
            scores = task.task, task.metric, task.score, task.baseline_score
            rows.append([label(contrast), *scores, *_figures(task.comparison, task.p_holm)])
        whole.append(len(rows))
        nothing = "overall", None, None, None
        rows.append([label(contrast), *nothing, *_figures(contrast.overall, contrast.overall.p_difference)])
    caption = f"Differences from the baseline in points, with a margin of ±{report.margin:g}"
    return Table(caption, columns, rows, whole)


def _figures(found: Comparison, p_difference: float) -> list[Any]:
    intervals = found.difference, found.interval, found.interval_95
    return [*intervals, found.n, found.p_equivalence, p_difference, verdict_of(found)]


def _ladder(report: Report) -> Table:
    """Every arm against the baseline: what it takes, and what it does; only where there are more than two."""
    contrasts = {contrast.name: contrast for contrast in report.contrasts}
    texts = [bits.task for bits in report.contrasts[0].bits]
    columns = [
        Column("arm"),
        Column("base", "bytes"),
        Column("peak memory", "bytes"),
        Column("bits a weight", "bits"),
        Column("of which tables", "bits"),
        Column("score", "points"),
        Column("difference", "difference"),
        Column("95 % interval", "interval"),
        Column("verdict", "verdict"),
        Column("weight error", "percent"),
        *(Column(f"bits per byte, {task}", "fine") for task in texts),
    ]

    def row(arm: Arm) -> list[Any]:
        contrast = contrasts.get(arm.precision)
        stored = (arm.weights.bits, arm.weights.table_bits) if arm.weights else (None, None)
        cost = arm.precision, arm.base_bytes, arm.peak_bytes, *stored, arm.overall.mean
        if contrast is None:
            return [*cost, None, None, "baseline", None, *(bits.b for bits in report.contrasts[0].bits)]
        found = contrast.overall
        against = found.difference, found.interval_95, verdict_of(found), mean_error(contrast)
        return [*cost, *against, *(bits.a for bits in contrast.bits)]

    rows = [row(arm) for arm in report.arms] if len(report.arms) > 2 else []
    caption = f"Every precision against {report.baseline}; score and difference in points"
    return Table(caption, columns, rows)


def mean_error(contrast: Contrast) -> float | None:
    """Return the mean over layers of the relative quantization error, in percent."""
    errors = [layer.relative_error for layer in contrast.quantization_error]
    return 100 * sum(errors) / len(errors) if errors else None


def _claims(report: Report) -> Table:
    columns = [Column("claim"), Column("where"), Column("here", "verdict"), Column("figure")]
    rows = [[claim.claim, claim.source, claim.verdict, claim.figure] for claim in report.claims]
    return Table("What the QLoRA paper (arXiv 2305.14314) says, and what was found here", columns, rows)


def _cost(report: Report) -> Table:
    columns = [Column("arm"), Column("base as stored", "bytes"), Column("peak in training", "bytes")]
    columns += [Column("adapter", "bytes"), Column("tokens/s", "count"), Column("training", "seconds")]
    rows = [
        [arm.precision, arm.base_bytes, arm.peak_bytes, arm.adapter_bytes, arm.tokens_per_second, arm.seconds,
         arm.final_loss] for arm in report.arms
    ]  # fmt: skip
    caption = "Means over seeds; the peak is the highest of any seed"
    return Table(caption, [*columns, Column("final loss", "fine")], rows)


def _flips(report: Report) -> Table:
    kinds = "right to wrong", "wrong to right", "wrong to other wrong"
    columns = [Column("arm"), Column("task"), Column("seed", "count"), *(Column(kind, "count") for kind in kinds)]
    rows = [
        [label(contrast), count.task, count.seed, flips.right_to_wrong, flips.wrong_to_right,
         flips.wrong_to_other_wrong, flips.n, flips.p]
        for contrast in _contrasts(report) for count in contrast.flips for flips in [count.flips]
    ]  # fmt: skip
    caption = "Documents that were answered differently"
    return Table(caption, [*columns, Column("documents", "count"), Column("McNemar p", "p")], rows)


def _changed(report: Report) -> Table:
    names = ["arm", "change", "task", "subject", "document", "seed", "says more", "prompt", "expected"]
    rows = [
        [label(contrast), change.change, change.task, change.subject, change.doc_id, change.seed,
         {"arm": contrast.name, "baseline": contrast.baseline, None: None}[change.goes_on],
         change.prompt, change.target, change.baseline_answer, change.answer]
        for contrast in report.contrasts for change in contrast.changed
    ]  # fmt: skip
    columns = [Column(name) for name in [*names, "answer of the baseline", "answer of the arm"]]
    return Table("Some of the answers that changed", columns, rows)


def _bits(report: Report) -> Table:
    columns = [Column("arm"), Column("text"), Column("bits per byte", "fine"), Column("baseline", "fine")]
    columns += [Column("difference", "fine difference"), Column("90 % interval", "fine interval")]
    rows = [
        [label(contrast), bits.task, bits.a, bits.b, bits.a - bits.b, found and found.interval, found and found.n]
        for contrast in _contrasts(report)
        for bits in contrast.bits
        for found in [bits.comparison]
    ]
    caption = "Bits per byte of held-out text, lower is better; interval by a paired bootstrap over texts"
    return Table(caption, [*columns, Column("texts", "count")], rows)


def _divergence(report: Report) -> Table:
    columns = [Column("arm"), *(Column(name, "fine") for name in ("mean", "median", "99th percentile"))]
    rows = [
        [label(contrast), kl.mean_kl, kl.median_kl, kl.p99_kl, kl.same_top_1, kl.tokens]
        for contrast in _contrasts(report)
        for kl in [contrast.divergence]
        if kl
    ]
    caption = "Next-token distributions on the held-out answers: KL(baseline ‖ arm) in nats per token, first seed"
    columns += [Column("same likeliest token", "percent"), Column("tokens", "count")]
    return Table(caption, columns, rows)


def _errors(report: Report) -> Table:
    columns = [Column("arm"), Column("layers", "count"), Column("mean", "percent"), Column("highest", "percent")]
    rows = []
    for contrast in report.contrasts:
        if layers := contrast.quantization_error:
            worst = max(layers, key=lambda layer: layer.relative_error)
            rows.append([contrast.name, len(layers), mean_error(contrast), 100 * worst.relative_error, worst.layer])
    caption = "Quantization error: Frobenius norm of (stored − original) over that of the original weights"  # noqa: RUF001
    return Table(caption, [*columns, Column("in layer")], rows)


def _losses(report: Report) -> Table:
    columns = [Column("arm"), Column("seed", "count"), Column("first loss", "fine"), Column("last loss", "fine")]
    rows = [[curve.precision, curve.seed, curve.losses[0], curve.losses[-1], curve.steps[-1]]
            for curve in report.losses if curve.steps]  # fmt: skip
    return Table("Training losses in nats per token, not averaged", [*columns, Column("steps", "count")], rows)


def _verified(report: Report) -> Table:
    rows = [[fact.verdict, fact.name, fact.figure] for fact in report.validity]
    return Table("What was counted and verified", [Column("verdict"), Column("what"), Column("figure")], rows)


TABLES: dict[str, Callable[[Report], Table]] = {
    "scores": _scores,
    "effects": _effects,
    "differences": _differences,
    "ladder": _ladder,
    "claims": _claims,
    "cost": _cost,
    "flips": _flips,
    "changed_answers": _changed,
    "bits_per_byte": _bits,
    "divergence": _divergence,
    "quantization_error": _errors,
    "losses": _losses,
    "verified": _verified,
}
"""By the name of their files."""
