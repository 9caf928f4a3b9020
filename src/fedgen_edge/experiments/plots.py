"""A run's pictures, and those of several runs side by side."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, cycle
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedgen_edge.experiments.drawing import (
    COLOURS,
    INK,
    MARKS,
    SERIES,
    STYLE,
    Point,
    band,
    colours_of,
    figure_of,
    finished,
    line,
    methods_of,
    to_svg,
)
from fedgen_edge.experiments.gains import gains, per_client
from fedgen_edge.experiments.merging_plots import MERGING
from fedgen_edge.experiments.summary import (
    BACKBONE,
    PERSONAL,
    Number,
    Row,
    RunFiles,
    by_model,
    printable,
    size,
    validation,
)

MOST = 30
"""Clients in one picture."""
SHORT = 16
"""Letters of a label of which three stand in a row."""
Draw = Callable[[RunFiles], Figure | None]


def pictures(run: RunFiles, draws: Mapping[str, Draw] | None = None) -> dict[str, str]:
    """Every picture that the run has numbers for, by name: of these, or of `PICTURES`."""
    with mpl.rc_context(STYLE):
        drawn = {name: draw(run) for name, draw in (draws or PICTURES).items()}
        return {name: to_svg(figure, name) for name, figure in drawn.items() if figure}


def overlay(groups: Mapping[str, Sequence[RunFiles]]) -> dict[str, str]:
    """Validation of several groups of runs: the mean over seeds, and their range."""
    with mpl.rc_context(STYLE):
        figure, axes = figure_of()
        for colour, (label, runs) in zip(cycle(SERIES), groups.items(), strict=False):
            curves = [dict(_quality(run, run.rounds)) for run in runs]
            shared = sorted(set.intersection(*map(set, curves)))
            values = [[curve[r] for curve in curves] for r in shared]
            line(axes, [(r, fmean(v)) for r, v in zip(shared, values, strict=True)], label, colour)
            band(axes, shared, values, colour)
        name = next(iter(groups.values()))[0].measure.name
        drawn = finished(figure, axes, "round", f"validation {name}", columns=1)
        return {"comparison": to_svg(drawn, "comparison")} if drawn else {}


def validation_curves(run: RunFiles) -> Figure | None:
    """Validation after each round, baselines beside it."""
    figure, axes = figure_of()
    for label, colour, rounds in methods_of(run):
        line(axes, _quality(run, rounds), label, colour)
    return finished(figure, axes, "round", f"validation {run.measure.name}")


def training_curves(run: RunFiles) -> Figure | None:
    """Mean training loss of each round; the band is from the best client to the worst."""
    figure, axes = figure_of()
    for label, colour, rounds in methods_of(run):
        trained = [row for row in rounds if row["loss"] is not None]
        line(axes, [(row["round"], row["loss"]) for row in trained], label, colour)
    whole = [row for row in run.rounds if row["clients"]]
    losses = [[c["loss"] for c in row["clients"]] for row in whole]
    band(axes, [row["round"] for row in whole], losses, SERIES[0])
    return finished(
        figure, axes, "round", f"training loss, {run.measure.trained or run.measure.unit}"
    )


def quality_for_bytes(run: RunFiles) -> Figure | None:
    """Validation against all that clients have sent by then."""
    figure, axes = figure_of()
    for label, colour, rounds in methods_of(run):
        numbers, each = [row["round"] for row in rounds], [row["bytes_up"] for row in rounds]
        sent = dict(zip(numbers, accumulate(each), strict=True))
        points = [(sent[r], value) for r, value in _quality(run, rounds)]
        if points and not points[-1][0]:
            axes.axhline(points[-1][1], color=colour, ls="--", label=f"{label} (sends nothing)")
        else:
            line(axes, points, label, colour)
    held = f"validation {run.measure.name}"
    drawn = finished(figure, axes, "sent by all clients so far", held)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # sizes are long words
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    return drawn


def against(
    run: RunFiles, points: Callable[[Sequence[Row]], Sequence[Point]], x: str
) -> Figure | None:
    """Validation of each method against something else that its rounds have."""
    figure, axes = figure_of()
    for label, colour, rounds in methods_of(run):
        line(axes, points(rounds), label, colour)
    return finished(figure, axes, x, f"validation {run.measure.name}")


def client_gains(run: RunFiles) -> Figure | None:
    """Each model on each client's test data, the worst client on top."""
    tested = [row for row in per_client(run) if any(map(math.isfinite, row.tested.values()))]
    rows = _spread(sorted(tested, key=lambda row: min(row.tested.values())))
    figure, axes = figure_of(len(rows))
    for y, row in enumerate(rows):
        ends = min(row.tested.values()), max(row.tested.values())
        axes.plot(ends, (y, y), color=INK, alpha=0.25, linewidth=1)
    for model, colour in colours_of(by_model(run)).items():
        found = [(y, row.tested[model]) for y, row in enumerate(rows) if model in row.tested]
        heights, values = [y for y, _ in found], [value for _, value in found]
        mark = MARKS.get(model, "v")
        axes.plot(values, heights, mark, color=colour, markersize=6.5, label=model)
    _label(axes, [_name(row.client, row.newcomer) for row in rows])
    name = f"test {run.measure.name}{_shown(rows, tested)}"
    return finished(figure, axes, name, "", columns=4)


def sorted_gains(run: RunFiles) -> Figure | None:
    """Each client's gain from its personal adapter, from the least to the largest."""
    figure, axes = figure_of()
    for gain in gains(run):
        values = [value for value in gain.each.values() if math.isfinite(value)]
        if gain.model != PERSONAL or gain.reference == BACKBONE or not values:
            continue
        places = [100 * (at + 0.5) / len(values) for at in range(len(values))]
        colour, mark = COLOURS[gain.reference], MARKS[gain.reference]
        label = f"over {gain.reference}" + " (new)" * gain.newcomers
        face = "none" if gain.newcomers else colour
        style = {"color": colour, "markerfacecolor": face, "label": label, "alpha": 0.9}
        size = 6.5 if len(values) <= MOST else 3
        axes.plot(places, values, f"{mark}:", linewidth=1, markersize=size, **style)
    if not axes.has_data():
        return None
    if len(axes.lines) == 1:  # one line is not named elsewhere
        figure.legend(loc="outside upper left")
    axes.axhline(0, color=INK, alpha=0.4, linewidth=1)
    axes.set_xlim(0, 100)
    y = f"test {run.measure.name} lowered by, %"
    return finished(figure, axes, "clients, % of them, sorted", y, logarithmic=False)


def who_holds_what(run: RunFiles) -> Figure | None:
    """Training examples of each client by label, or its items where labels say nothing.

    The client that holds most of what is drawn is on top.
    """
    items = f"training {run.measure.items}"
    totals = [sum(own) for own in zip(*_held(run.clients, items).values(), strict=True)]
    by_size = sorted(zip(totals, run.clients, strict=True), key=lambda pair: pair[0])
    rows = _spread([row for _, row in by_size])
    held = _held(rows, items)
    figure, axes = figure_of(len(rows))
    left: list[Number] = [0.0] * len(rows)
    for colour, (kind, widths) in zip((*SERIES, COLOURS[BACKBONE]), held.items(), strict=False):
        axes.barh(range(len(rows)), widths, 0.7, left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _label(axes, [_name(row["client"], row.get("newcomer", False)) for row in rows])
    name = "training examples" if len(held) > 1 else items
    return finished(
        figure,
        axes,
        name + _shown(rows, run.clients),
        "",
        columns=3 if max(map(len, held)) <= SHORT else 2,
    )


PICTURES: dict[str, Draw] = {
    "validation": validation_curves,
    "clients": client_gains,
    "gains": sorted_gains,
    "bytes": quality_for_bytes,
    "training": training_curves,
    "data": who_holds_what,
    **MERGING,
}


def _held(rows: Sequence[Row], items: str) -> dict[str, list[Number]]:
    labels = [row.get("labels") or {} for row in rows]
    if all(len(each) < 2 for each in labels):
        return {items: [row["items"] for row in rows]}
    total = sum(map(Counter, labels), Counter())
    top = [label for label, _ in total.most_common(len(SERIES))]
    rest: list[Number] = [
        sum(each.values()) - sum(each.get(label, 0) for label in top) for each in labels
    ]
    held: dict[str, list[Number]] = {
        label: [each.get(label, 0) for each in labels] for label in top
    }
    return {**held, "others": rest} if any(rest) else held


def _quality(run: RunFiles, rounds: Sequence[Row]) -> list[Point]:
    return [(r, run.measure.shown(loss, 1)) for r, loss in validation(rounds)]


def _label(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, max(1, len(names)) - 0.3)
    axes.tick_params("y", length=0)


def _name(client: str, newcomer: bool) -> str:
    short = client if len(client) < 24 else client[:22] + "\N{HORIZONTAL ELLIPSIS}"
    return printable(short) + " (new)" * newcomer


def _shown(rows: Sequence[Any], of: Sequence[Any]) -> str:
    """How many clients a picture has, where it has not all of them."""
    return f" ({len(rows)} of {len(of)} clients)" if len(rows) < len(of) else ""


def _spread(rows: Sequence[Any]) -> list[Any]:
    step = max(1.0, (len(rows) - 1) / (MOST - 1))
    return [rows[round(i * step)] for i in range(min(MOST, len(rows)))]
