"""The style of plots: SVG whose text stays text, with colors for light and dark pages.

The ink is the page's text color; the palette is Okabe and Ito's, darkened for contrast on white.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedgen_edge.report.summary import BACKBONE, GLOBAL, LOCAL, PERSONAL, Number, Row, RunFiles

INK = "#010203"
"""Placeholder for the page's text color until the SVG is finished."""
COLORS = {BACKBONE: "#808690", LOCAL: "#d55e00", GLOBAL: "#0072b2", PERSONAL: "#009e73"}
EXTRA_COLORS = ("#a67c00", "#cc79a7", "#7a68c9", "#4a8fb5", "#8a6d5a", "#b5485d", "#5f8f3e")
SERIES = (COLORS[GLOBAL], *EXTRA_COLORS)
MARKERS = {BACKBONE: "D", LOCAL: "s", GLOBAL: "o", PERSONAL: "^"}
LINE_STYLES = ("-", "--", ":", "-.")
WIDTH = 5.8
"""Inches: small enough that 10-point text is readable on a phone."""
LOGARITHMIC = 8
"""Ratio of largest to smallest value from which an axis is logarithmic."""
DECADES = 1000
"""Ratio of largest to smallest value from which only powers of ten are labeled."""
BACKGROUND_STYLE = (
    "<style>svg{color:#1b1f24;background:#fff}@media(prefers-color-scheme:dark)"
    "{svg{color:#e6e8eb;background:#14171c}}</style>"
)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedgen-edge",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}

Point = tuple[Number, Number]


def assign_colors(models: Iterable[str]) -> dict[str, str]:
    """Assign a color to each model; those of the usual models never change."""
    extra_colors = cycle(EXTRA_COLORS)
    return {model: COLORS.get(model) or next(extra_colors) for model in models}


def list_methods(run: RunFiles) -> list[tuple[str, str, list[Row]]]:
    """List the label, color and rounds of the run's own method and of its baselines."""
    method_name = str(run.settings.get("method.name", "this run"))
    colors = assign_colors(run.baselines)
    baselines = [(name, colors[name], rounds) for name, rounds in run.baselines.items()]
    return [(method_name, COLORS[GLOBAL], run.rounds), *baselines]


def make_figure(rows: int | None = None) -> tuple[Figure, Axes]:
    """Make an empty figure, as high as its rows of clients need."""
    height = 3.4 if rows is None else 1.1 + 0.24 * rows
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def draw_line(axes: Axes, points: Sequence[Point], label: str, color: str) -> None:
    """Draw finite points and a line through them, with a dash pattern of its own."""
    finite_points = [point for point in points if math.isfinite(point[1])]
    style = LINE_STYLES[len(axes.lines) % len(LINE_STYLES)]
    if finite_points:
        axes.plot(*zip(*finite_points, strict=True), style, marker="o", color=color, label=label)


def draw_band(
    axes: Axes, x: Sequence[Number], values: Sequence[Sequence[Number]], color: str
) -> None:
    """Shade the range of values at each x."""
    if values and all(math.isfinite(value) for each in values for value in each):
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def finish_figure(
    figure: Figure, axes: Axes, x: str, y: str, columns: int = 3, logarithmic: bool = True
) -> Figure | None:
    """Label the axes and the lines; return None if nothing was drawn.

    Without a `y`, the x axis has the values; `logarithmic` allows them a logarithmic scale.
    """
    if not axes.has_data():
        return None
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y" if y else "x")
    _set_ticks(axes, "y" if y else "x", logarithmic)
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)
    return figure


def _set_ticks(axes: Axes, which: Literal["x", "y"], logarithmic: bool) -> None:
    """Label the axis with plain numbers, on a logarithmic scale if the values need one."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    if logarithmic and low > 0 and high > LOGARITHMIC * low:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < DECADES * low else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def to_svg(figure: Figure, name: str) -> str:
    """Return SVG to embed in a page: it scales, has unique ids, and uses the page's text color."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts have them
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    text = re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{name}"', text, count=1
    )
    return text.replace(INK, "currentColor").replace("'DejaVu Sans', sans-serif", "sans-serif")


def make_standalone(svg: str) -> str:
    """Turn the SVG into a standalone file, with its own background."""
    return svg.replace(">", f">{BACKGROUND_STYLE}", 1)
