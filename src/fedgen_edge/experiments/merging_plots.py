"""Pictures of merging: what it misses, what becomes of each layer, and how far clients agree."""

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedgen_edge.experiments.drawing import (
    COLOURS,
    INK,
    Point,
    band,
    figure_of,
    finished,
    line,
    methods_of,
)
from fedgen_edge.experiments.merging import Spread, agreement, drifts, over_layers
from fedgen_edge.experiments.summary import GLOBAL, LOCAL, Row, RunFiles


def methods(
    run: RunFiles, of: Callable[[Sequence[Row]], list[Spread]], y: str, logarithmic: bool = True
) -> Figure | None:
    """The middle of each method; the band is the range of the run's own."""
    figure, axes = figure_of()
    for label, colour, rounds in methods_of(run):
        _middle(axes, of(rounds), label, colour)
    _range(axes, of(run.rounds), COLOURS[GLOBAL])
    return finished(figure, axes, "round", y, logarithmic=logarithmic)


def norms(run: RunFiles) -> Figure | None:
    """A against B: medians over layers, and their ranges."""
    figure, axes = figure_of()
    for what, colour in (("a", COLOURS[GLOBAL]), ("b", COLOURS[LOCAL])):
        found = over_layers(run.rounds, what)
        _middle(axes, found, what.upper(), colour)
        _range(axes, found, colour)
    return finished(figure, axes, "round", "norm of a factor")


def cosines(run: RunFiles) -> Figure | None:
    """Mean cosine between the changes of two clients; below zero they cancel."""
    figure, axes = figure_of()
    for label, colour, rounds in methods_of(run):
        found = [(row["round"], agreement(row)) for row in rounds]
        points: list[Point] = [(at, cosine) for at, cosine in found if cosine is not None]
        line(axes, points, label, colour)
    if not axes.has_data():
        return None
    axes.axhline(0, color=INK, alpha=0.4, linewidth=1)
    return finished(figure, axes, "round", "cosine between clients", logarithmic=False)


def _middle(axes: Axes, found: Sequence[Spread], label: str, colour: str) -> None:
    line(axes, [(each.round, each.middle) for each in found], label, colour)


def _range(axes: Axes, found: Sequence[Spread], colour: str) -> None:
    ends = [(each.low, each.high) for each in found]
    band(axes, [each.round for each in found], ends, colour)


def _layers(what: str) -> Callable[[Sequence[Row]], list[Spread]]:
    return partial(over_layers, what=what)


MERGING: dict[str, Callable[[RunFiles], Figure | None]] = {
    "error": partial(methods, of=_layers("error"), y="aggregation error"),
    "rank": partial(methods, of=_layers("rank"), y="effective rank", logarithmic=False),
    "norms": norms,
    "drift": partial(methods, of=drifts, y="norm of a client's change"),
    "cosine": cosines,
}
"""By name."""
