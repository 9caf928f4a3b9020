"""Plots of aggregation: its error, each layer's fate, and how far clients agree."""

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedgen_edge.report.layers import Spread, agreement, drifts, over_layers
from fedgen_edge.report.style import (
    COLORS,
    INK,
    Point,
    draw_band,
    draw_line,
    finish_figure,
    list_methods,
    make_figure,
)
from fedgen_edge.report.summary import GLOBAL, LOCAL, Row, RunFiles


def plot_methods(
    run: RunFiles, of: Callable[[Sequence[Row]], list[Spread]], y: str, logarithmic: bool = True
) -> Figure | None:
    """Plot each method's median; the band is the range of the run's own method."""
    figure, axes = make_figure()
    for label, color, rounds in list_methods(run):
        _draw_middle(axes, of(rounds), label, color)
    _draw_range(axes, of(run.rounds), COLORS[GLOBAL])
    return finish_figure(figure, axes, "round", y, logarithmic=logarithmic)


def norms(run: RunFiles) -> Figure | None:
    """Plot the norms of A and B: medians over layers, and their ranges."""
    figure, axes = make_figure()
    for what, color in (("a", COLORS[GLOBAL]), ("b", COLORS[LOCAL])):
        spreads = over_layers(run.rounds, what)
        _draw_middle(axes, spreads, what.upper(), color)
        _draw_range(axes, spreads, color)
    return finish_figure(figure, axes, "round", "norm of a factor")


def cosines(run: RunFiles) -> Figure | None:
    """Plot the mean cosine between the updates of two clients; below zero they cancel."""
    figure, axes = make_figure()
    for label, color, rounds in list_methods(run):
        agreements = [(row["round"], agreement(row)) for row in rounds]
        points: list[Point] = [(at, cosine) for at, cosine in agreements if cosine is not None]
        draw_line(axes, points, label, color)
    if not axes.has_data():
        return None
    axes.axhline(0, color=INK, alpha=0.4, linewidth=1)
    return finish_figure(figure, axes, "round", "cosine between clients", logarithmic=False)


def _draw_middle(axes: Axes, spreads: Sequence[Spread], label: str, color: str) -> None:
    draw_line(axes, [(each.round, each.middle) for each in spreads], label, color)


def _draw_range(axes: Axes, spreads: Sequence[Spread], color: str) -> None:
    ends = [(each.low, each.high) for each in spreads]
    draw_band(axes, [each.round for each in spreads], ends, color)


def _layers(what: str) -> Callable[[Sequence[Row]], list[Spread]]:
    return partial(over_layers, what=what)


MERGING: dict[str, Callable[[RunFiles], Figure | None]] = {
    "error": partial(plot_methods, of=_layers("error"), y="aggregation error"),
    "rank": partial(plot_methods, of=_layers("rank"), y="effective rank", logarithmic=False),
    "norms": norms,
    "drift": partial(plot_methods, of=drifts, y="norm of a client's change"),
    "cosine": cosines,
}
"""The plots by name."""
