"""The report's pictures as SVG: one that stands alone, and inline one that follows the page's colors, light or dark.

Records in, markup out. Matplotlib draws in colors that become the page's CSS variables; text stays text. Knows nothing
of files.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from markupsafe import Markup

from qlora_recipes.comparison.findings import Arm, Contrast, Report, before_tuning
from qlora_recipes.comparison.paired import Comparison
from qlora_recipes.report.escape import plain
from qlora_recipes.report.tables import label, mean_error
from qlora_recipes.run.display import running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Color -> CSS variable. A picture that stands alone has the colors themselves.
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
_MARKERS = "oDs^vP"
_WIDTH = 4.4  # inches; at 390 pixels of a phone its 9 pt text is still 10 pixels high
_LABELS = 1.3  # of it for the names of the differences
_SMALL = 3.0  # inches: three beside each other on a wide page
_LONGEST = 28  # characters of a label before it is cut


class Picture(NamedTuple):
    """One figure."""

    title: str
    svg: str
    """Complete, in the colors of a light page."""

    @property
    def inline(self) -> Markup:
        """As an element of the page, in the page's colors."""
        size = re.compile(r'(<svg[^>]*?) width="([\d.]+)pt" height="[^"]*"')
        svg = size.sub(r'\1 style="max-width: \2pt"', self.svg, count=1)
        for color, variable in _VARIABLES.items():
            svg = svg.replace(color, f"var({variable}, {color})")
        return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{self.title}" class="plot"', 1))


def pictures(report: Report) -> dict[str, Picture]:
    """Return every picture that the report has something for, by name."""
    return {name: picture for name, draw in PICTURES.items() if (picture := draw(report))}


def arms_plot(report: Report) -> Picture:
    """Draw every arm's score with its interval, and the score of its base before tuning."""
    untuned = {control.name: control.overall for control in report.controls}
    names = [arm.precision for arm in report.arms]
    figure, axes = _figure(0.9 + 0.38 * len(names), width=_WIDTH - _LABELS)
    colors = _colors(names)
    for height, arm in enumerate(reversed(report.arms)):
        name, color = arm.precision, colors[arm.precision]
        before = untuned.get(before_tuning(name))
        for score, filled in ((before, False), (arm.overall, True)):
            if score is not None:
                axes.plot(score.interval_95, (height, height), color=color, linewidth=1.5 if filled else 1)
                face = color if filled else "none"
                axes.plot([score.mean], [height], marker="o", color=color, markerfacecolor=face, markersize=7)
                axes.annotate(
                    f"{score.mean:.1f}", (score.mean, height), (0, 7), textcoords="offset points", ha="center",
                    color=_INK, fontsize=8,
                )  # fmt: skip
        _name_row(axes, height, f"{name}, baseline" if name == report.baseline else name, bold=name != report.baseline)
    axes.set(ylim=(-0.6, len(names) - 0.3), yticks=[])
    axes.margins(x=0.08)
    axes.set_xlabel("score in points" + ("; open: the base before tuning" if untuned else ""))
    return _picture(figure, "arms", "Score of every arm with its interval, and of its base before tuning")


def _cost_plot(what: str, title: str, cost: Callable[[Arm], float], unit: float = 1) -> Callable[[Report], Picture]:
    """Return what draws a cost against the score of every arm."""

    def draw(report: Report) -> Picture:
        found = {arm.precision: (cost(arm) / unit, arm.overall.mean, arm.overall.interval_95) for arm in report.arms}
        return _picture(_scatter(found, what, "score in points", from_zero=True), title, f"{title} against score")

    return draw


def _ladder_plot(
    what: str,
    title: str,
    value: Callable[[Contrast], tuple[float, tuple[float, float] | None] | None],
    *,
    banded: bool = False,
) -> Callable[[Report], Picture | None]:
    """Return what draws bits a weight of every arm but the baseline against something of its contrast.

    `banded` is for what the margin is a margin of.
    """

    def draw(report: Report) -> Picture | None:
        if len(report.arms) < 3:
            return None
        bits = {arm.precision: arm.weights.bits for arm in report.arms if arm.weights}
        values = {each.name: found for each in report.contrasts if each.name in bits and (found := value(each))}
        if not values:
            return None
        places = {name: (bits[name], *drawn) for name, drawn in values.items()}
        colors = _colors([arm.precision for arm in report.arms])
        margin = report.margin if banded else None
        figure = _scatter(places, "bits a weight", what, colors, margin)
        return _picture(figure, title, f"{title} against bits a weight")

    return draw


def _of_score(contrast: Contrast) -> tuple[float, tuple[float, float] | None]:
    return contrast.overall.difference, contrast.overall.interval_95


def _of_weights(contrast: Contrast) -> tuple[float, tuple[float, float] | None] | None:
    error = mean_error(contrast)
    return None if error is None else (error, None)


def _of_text(contrast: Contrast) -> tuple[float, tuple[float, float] | None] | None:
    for bits in contrast.bits[:1]:
        return bits.a - bits.b, bits.comparison.interval_95 if bits.comparison else None
    return None


def forest_plot(report: Report) -> Picture:
    """Draw every difference with its 90 and 95 % interval, and the margin as a band."""
    contrasts = [*report.contrasts, *([report.noise] if report.noise else [])]
    rows = [row for contrast in contrasts for row in _rows(contrast)]
    figure, axes = _figure(0.9 + 0.32 * len(rows), width=_WIDTH - _LABELS)
    axes.axvspan(-report.margin, report.margin, color=_BAND, linewidth=0)
    axes.axvline(0, color=_FAINT, linewidth=1)
    for height, (name, found, bold) in enumerate(reversed(rows)):
        color = _VERDICTS[found.verdict]
        axes.plot(found.interval_95, (height, height), color=color, linewidth=1)
        axes.plot(found.interval, (height, height), color=color, linewidth=4 if bold else 2.5, solid_capstyle="butt")
        axes.plot([found.difference], [height], marker="o", color=color, markersize=7 if bold else 5)
        _name_row(axes, height, name, bold=bold)
    edge = max([report.margin, *(abs(bound) for _, found, _ in rows for bound in found.interval_95)])
    axes.set(xlim=(-1.08 * edge, 1.08 * edge), ylim=(-0.7, len(rows) - 0.3), yticks=[])
    axes.set_xlabel(f"difference in points; band: margin of ±{report.margin:g}")
    return _picture(figure, "forest", "Differences from the baseline with their intervals, and the margin")


def _rows(contrast: Contrast) -> list[tuple[str, Comparison, bool]]:
    """The contrast over all tasks, and beneath it each task where there are several."""
    tasks = [(found.task, found.comparison, False) for found in contrast.tasks]
    return [(label(contrast), contrast.overall, True), *(tasks if len(tasks) > 1 else [])]


def loss_plot(report: Report) -> Picture:
    """Draw the training losses of all runs, each as a running mean, one color for each precision."""
    losses = report.losses
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
    return _picture(figure, "loss", "Training loss of every run")


def error_plot(report: Report) -> Picture | None:
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
    return _picture(figure, "error", "Quantization error by layer")


def _colors(names: Sequence[str]) -> Mapping[str, str]:
    return {name: _ARMS[i % len(_ARMS)] for i, name in enumerate(dict.fromkeys(names))}


def _figure(height: float, width: float = _WIDTH, layout: Literal["constrained"] | None = None) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # its own canvas: no display, and no state shared with pyplot

    figure = Figure(figsize=(width, height), layout=layout)
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


def _name_row(axes: Axes, height: float, name: str, *, bold: bool) -> None:
    """Write the name of a row to the left of the axes."""
    axes.annotate(
        _short(name), (0, height), (-8, 0), ("axes fraction", "data"), "offset points",
        ha="right", va="center", color=_INK, weight="bold" if bold else "normal", parse_math=False,
    )  # fmt: skip


def _scatter(
    found: Mapping[str, tuple[float, float, tuple[float, float] | None]],
    x: str,
    y: str,
    colors: Mapping[str, str] | None = None,
    margin: float | None = None,
    *,
    from_zero: bool = False,
) -> Figure:
    """Draw one marker for each arm, by name: x, y and the interval of y; those of one x stand side by side."""
    figure, axes = _figure(2.6, width=_SMALL, layout="constrained")
    colors = colors or _colors(list(found))
    if margin is not None:
        axes.axhspan(-margin, margin, color=_BAND, linewidth=0)
        axes.axhline(0, color=_FAINT, linewidth=1)
    places = [place for place, _, _ in found.values()]
    apart = 0.04 * (max(places) - (0 if from_zero else min(places)) or max(places))
    alike = 0.005 * max(places)
    for i, (name, (place, value, bounds)) in enumerate(found.items()):
        place += apart * sum(abs(place - earlier) < alike for earlier in places[:i])
        if bounds:
            axes.plot((place, place), bounds, color=colors[name], linewidth=1.5)
        marker = _MARKERS[list(colors).index(name) % len(_MARKERS)]
        axes.plot([place], [value], linestyle="", marker=marker, color=colors[name], markersize=7, label=plain(name))
    axes.margins(x=0.12, y=0.12)
    if from_zero:
        axes.set_xlim(0, 1.2 * max(places))
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=_FAINT, alpha=0.25, linewidth=0.6)
    figure.legend(
        loc="outside lower center", ncols=2 if len(found) == 4 else 3, frameon=False, labelcolor=_INK, fontsize=9,
        handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
    return figure


def _picture(figure: Figure, name: str, title: str) -> Picture:
    from matplotlib import rc_context

    stream = io.StringIO()
    same_bytes_for_same_input = rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9})
    with same_bytes_for_same_input, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser's fonts draw it
        cut = None if figure.get_layout_engine() else "tight"
        figure.savefig(stream, format="svg", transparent=True, bbox_inches=cut, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace("\n", " ")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)  # its style is for `*`
    return Picture(title, re.sub(r"font: [^;\"]*?(\d+)px[^;\"]*", r"font: \1px system-ui, sans-serif", svg))


def _short(label: str) -> str:
    label = " ".join(plain(label).split())
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


PICTURES: dict[str, Callable[[Report], Picture | None]] = {
    "arms": arms_plot,
    "cost_base": _cost_plot("base as stored, MiB", "Size of the base", lambda arm: arm.base_bytes, 2**20),
    "cost_peak": _cost_plot("peak memory, MiB", "Peak memory", lambda arm: arm.peak_bytes, 2**20),
    "cost_speed": _cost_plot("tokens a second", "Speed", lambda arm: arm.tokens_per_second),
    "differences": forest_plot,
    "ladder_score": _ladder_plot("difference in points", "Difference in score", _of_score, banded=True),
    "ladder_error": _ladder_plot("weight error, %", "Quantization error", _of_weights),
    "ladder_bits": _ladder_plot("bits per byte, difference", "Difference in bits per byte", _of_text),
    "losses": loss_plot,
    "quantization_error": error_plot,
}
"""By the name of their files."""
