"""The report's plots as inline SVG that follows the page's colors, light or dark. Records in, markup out.

Matplotlib draws in placeholder colors, which become the page's CSS variables; text stays text. Knows nothing of files.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from qlora_recipes.comparison.escape import plain
from qlora_recipes.comparison.findings import Contrast, LossCurve, Report
from qlora_recipes.comparison.paired import Comparison
from qlora_recipes.run.display import running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder -> CSS variable. The placeholders are read as themselves where a picture stands alone.
_INK, _FAINT, _BAND = "#1b1f24", "#8a929b", "#d5e8d8"
_VERDICTS = {"equivalent": "#1a7f37", "different": "#c4320a", "inconclusive": "#9a6700"}
_ARMS = ("#0a62c9", "#c2571a", "#6f42c1", "#0b7a75", "#a0195b", "#4d5b21")
_VARIABLES = {
    _INK: "--ink",
    _FAINT: "--faint",
    _BAND: "--band",
    **{color: f"--{verdict}" for verdict, color in _VERDICTS.items()},
    **{color: f"--arm-{i}" for i, color in enumerate(_ARMS)},
}
_WIDTH = 4.4  # inches; at 390 pixels of a phone its 9 pt text is still 10 pixels high
_LABELS = 1.3  # of it for the names of the differences
_LONGEST = 28  # characters of a label before it is cut


def forest_plot(report: Report) -> Markup:
    """Draw every difference with its 90 and 95 % interval, and the margin as a band."""
    contrasts = [*report.contrasts, *([report.noise] if report.noise else [])]
    rows = [row for contrast in contrasts for row in _rows(contrast)]
    figure, axes = _figure(0.9 + 0.32 * len(rows), width=_WIDTH - _LABELS)
    axes.axvspan(-report.margin, report.margin, color=_BAND, linewidth=0)
    axes.axvline(0, color=_FAINT, linewidth=1)
    for height, (label, found, bold) in enumerate(reversed(rows)):
        color, weight = _VERDICTS[found.verdict], "bold" if bold else "normal"
        axes.plot(found.interval_95, (height, height), color=color, linewidth=1)
        axes.plot(found.interval, (height, height), color=color, linewidth=4 if bold else 2.5, solid_capstyle="butt")
        axes.plot([found.difference], [height], marker="o", color=color, markersize=7 if bold else 5)
        axes.annotate(
            _short(label), (0, height), (-8, 0), ("axes fraction", "data"), "offset points",
            ha="right", va="center", color=_INK, weight=weight, parse_math=False,
        )  # fmt: skip
    edge = max([report.margin, *(abs(bound) for _, found, _ in rows for bound in found.interval_95)])
    axes.set(xlim=(-1.08 * edge, 1.08 * edge), ylim=(-0.7, len(rows) - 0.3), yticks=[])
    axes.set_xlabel(f"difference in points; band: margin of ±{report.margin:g}")
    return _markup(figure, "forest", "Differences from the baseline with their intervals, and the margin")


def _rows(contrast: Contrast) -> list[tuple[str, Comparison, bool]]:
    """The contrast over all tasks, and beneath it each task where there are several."""
    label = f"{contrast.name} − {contrast.baseline}"  # noqa: RUF001  a minus
    tasks = [(found.task, found.comparison, False) for found in contrast.tasks]
    return [(label, contrast.overall, True), *(tasks if len(tasks) > 1 else [])]


def loss_plot(losses: Sequence[LossCurve]) -> Markup:
    """Draw the training losses of all runs, each as a running mean, one color for each precision."""
    figure, axes = _figure(2.9)
    colors = _colors([curve.precision for curve in losses])
    for curve in losses:
        axes.plot(
            curve.steps, running_mean(curve.losses, 20), color=colors[curve.precision], linewidth=1.4, alpha=0.85,
            label=plain(curve.precision) if curve.seed == losses[0].seed else None,
            linestyle="-" if curve.precision == losses[0].precision else (0, (4, 1.5)),
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.locator_params(axis="x", integer=True)
    _add_legend(axes)
    return _markup(figure, "loss", "Training loss of every run")


def error_plot(report: Report) -> Markup | None:
    """Draw the quantization error of every layer in the order of the model, one color for each precision."""
    contrasts = [contrast for contrast in report.contrasts if contrast.quantization_error]
    if not contrasts:
        return None
    figure, axes = _figure(2.3)
    colors = _colors([arm.precision for arm in report.arms])
    for contrast in contrasts:
        errors = [100 * layer.relative_error for layer in contrast.quantization_error]
        axes.plot(range(1, len(errors) + 1), errors, ".", color=colors[contrast.name], label=plain(contrast.name))
    highest = max(layer.relative_error for contrast in contrasts for layer in contrast.quantization_error)
    axes.set(xlabel="linear layer, from input to output", ylabel="relative error, %", ylim=(0, 118 * highest or 1))
    _add_legend(axes)
    return _markup(figure, "error", "Quantization error by layer")


def _colors(names: Sequence[str]) -> Mapping[str, str]:
    return {name: _ARMS[i % len(_ARMS)] for i, name in enumerate(dict.fromkeys(names))}


def _figure(height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # its own canvas: no display, and no state shared with pyplot

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=_FAINT)
    axes.tick_params(colors=_INK, labelsize=9, length=3)
    axes.xaxis.label.set(color=_INK, fontsize=9)
    axes.yaxis.label.set(color=_INK, fontsize=9)
    return figure, axes


def _add_legend(axes: Axes) -> None:
    axes.grid(color=_FAINT, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)


def _markup(figure: Figure, name: str, title: str) -> Markup:
    """Return the figure as an `svg` element whose colors are the page's."""
    from matplotlib import rc_context

    stream = io.StringIO()
    same_bytes_for_same_input = rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9})
    with same_bytes_for_same_input, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser's fonts draw it
        figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)  # its style is for `*`
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg.replace("\n", " "), count=1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable}, {color})")
    svg = re.sub(r"font: [^;\"]*?(\d+)px[^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}" class="plot"', 1))


def _short(label: str) -> str:
    label = " ".join(plain(label).split())
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
