"""The plots of one run, and of several runs side by side."""

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

from fedgen_edge.report.gains import gains, make_client_rows
from fedgen_edge.report.layer_plots import MERGING
from fedgen_edge.report.style import (
    COLORS,
    INK,
    MARKERS,
    SERIES,
    STYLE,
    Point,
    assign_colors,
    draw_band,
    draw_line,
    finish_figure,
    list_methods,
    make_figure,
    to_svg,
)
from fedgen_edge.report.summary import (
    BACKBONE,
    PERSONAL,
    Number,
    Row,
    RunFiles,
    by_model,
    validation,
)
from fedgen_edge.runs.formatting import printable, size

MAX_CLIENTS = 30
"""Maximum clients in one plot."""
SHORT_LABEL = 16
"""Maximum letters of a label, if three stand in a row."""
Draw = Callable[[RunFiles], Figure | None]


def draw_plots(run: RunFiles, draws: Mapping[str, Draw] | None = None) -> dict[str, str]:
    """Draw every plot that the run has numbers for, by name: of these, or of `PLOTS`."""
    with mpl.rc_context(STYLE):
        drawn = {name: draw(run) for name, draw in (draws or PLOTS).items()}
        return {name: to_svg(figure, name) for name, figure in drawn.items() if figure}


def overlay(groups: Mapping[str, Sequence[RunFiles]]) -> dict[str, str]:
    """Plot validation of several groups of runs: the mean over seeds, and their range."""
    with mpl.rc_context(STYLE):
        figure, axes = make_figure()
        for color, (label, runs) in zip(cycle(SERIES), groups.items(), strict=False):
            curves = [dict(_quality(run, run.rounds)) for run in runs]
            common_rounds = sorted(set.intersection(*map(set, curves)))
            values = [[curve[r] for curve in curves] for r in common_rounds]
            draw_line(
                axes,
                [(r, fmean(v)) for r, v in zip(common_rounds, values, strict=True)],
                label,
                color,
            )
            draw_band(axes, common_rounds, values, color)
        name = next(iter(groups.values()))[0].measure.name
        drawn = finish_figure(figure, axes, "round", f"validation {name}", columns=1)
        return {"comparison": to_svg(drawn, "comparison")} if drawn else {}


def validation_curves(run: RunFiles) -> Figure | None:
    """Plot validation after each round, with the baselines."""
    figure, axes = make_figure()
    for label, color, rounds in list_methods(run):
        draw_line(axes, _quality(run, rounds), label, color)
    return finish_figure(figure, axes, "round", f"validation {run.measure.name}")


def training_curves(run: RunFiles) -> Figure | None:
    """Plot each round's mean training loss; the band is from the best client to the worst."""
    figure, axes = make_figure()
    for label, color, rounds in list_methods(run):
        trained = [row for row in rounds if row["loss"] is not None]
        draw_line(axes, [(row["round"], row["loss"]) for row in trained], label, color)
    active_rounds = [row for row in run.rounds if row["clients"]]
    losses = [[c["loss"] for c in row["clients"]] for row in active_rounds]
    draw_band(axes, [row["round"] for row in active_rounds], losses, SERIES[0])
    return finish_figure(
        figure, axes, "round", f"training loss, {run.measure.training_loss or run.measure.unit}"
    )


def quality_for_bytes(run: RunFiles) -> Figure | None:
    """Plot validation against all bytes that clients have sent by then."""
    figure, axes = make_figure()
    for label, color, rounds in list_methods(run):
        numbers, bytes_up = [row["round"] for row in rounds], [row["bytes_up"] for row in rounds]
        sent = dict(zip(numbers, accumulate(bytes_up), strict=True))
        points = [(sent[r], value) for r, value in _quality(run, rounds)]
        if points and not points[-1][0]:
            axes.axhline(points[-1][1], color=color, ls="--", label=f"{label} (sends nothing)")
        else:
            draw_line(axes, points, label, color)
    y_label = f"validation {run.measure.name}"
    drawn = finish_figure(figure, axes, "sent by all clients so far", y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # sizes have long labels
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    return drawn


def validation_against(
    run: RunFiles, points: Callable[[Sequence[Row]], Sequence[Point]], x: str
) -> Figure | None:
    """Plot each method's validation against another quantity of its rounds."""
    figure, axes = make_figure()
    for label, color, rounds in list_methods(run):
        draw_line(axes, points(rounds), label, color)
    return finish_figure(figure, axes, x, f"validation {run.measure.name}")


def client_gains(run: RunFiles) -> Figure | None:
    """Plot each model on each client's test data, the worst client on top."""
    tested = [
        row for row in make_client_rows(run) if any(map(math.isfinite, row.test_results.values()))
    ]
    rows = _spread(sorted(tested, key=lambda row: min(row.test_results.values())))
    figure, axes = make_figure(len(rows))
    for y, row in enumerate(rows):
        ends = min(row.test_results.values()), max(row.test_results.values())
        axes.plot(ends, (y, y), color=INK, alpha=0.25, linewidth=1)
    for model, color in assign_colors(by_model(run)).items():
        points = [
            (y, row.test_results[model]) for y, row in enumerate(rows) if model in row.test_results
        ]
        heights, values = [y for y, _ in points], [value for _, value in points]
        mark = MARKERS.get(model, "v")
        axes.plot(values, heights, mark, color=color, markersize=6.5, label=model)
    _label(axes, [_name(row.client, row.newcomer) for row in rows])
    name = f"test {run.measure.name}{_format_subset(rows, tested)}"
    return finish_figure(figure, axes, name, "", columns=4)


def sorted_gains(run: RunFiles) -> Figure | None:
    """Plot each client's gain from its personal adapter, from the smallest to the largest."""
    figure, axes = make_figure()
    for gain in gains(run):
        values = [value for value in gain.gain_by_client.values() if math.isfinite(value)]
        if gain.model != PERSONAL or gain.reference == BACKBONE or not values:
            continue
        places = [100 * (at + 0.5) / len(values) for at in range(len(values))]
        color, mark = COLORS[gain.reference], MARKERS[gain.reference]
        label = f"over {gain.reference}" + " (new)" * gain.newcomers
        face = "none" if gain.newcomers else color
        style = {"color": color, "markerfacecolor": face, "label": label, "alpha": 0.9}
        size = 6.5 if len(values) <= MAX_CLIENTS else 3
        axes.plot(places, values, f"{mark}:", linewidth=1, markersize=size, **style)
    if not axes.has_data():
        return None
    if len(axes.lines) == 1:  # a single line has no other legend
        figure.legend(loc="outside upper left")
    axes.axhline(0, color=INK, alpha=0.4, linewidth=1)
    axes.set_xlim(0, 100)
    y = f"test {run.measure.name} lowered by, %"
    return finish_figure(figure, axes, "clients, % of them, sorted", y, logarithmic=False)


def label_distribution(run: RunFiles) -> Figure | None:
    """Plot each client's training examples by label, or its items if labels are uninformative.

    The client with the most is on top.
    """
    items = f"training {run.measure.items}"
    totals = [sum(own) for own in zip(*_count_labels(run.clients, items).values(), strict=True)]
    by_size = sorted(zip(totals, run.clients, strict=True), key=lambda pair: pair[0])
    rows = _spread([row for _, row in by_size])
    counts = _count_labels(rows, items)
    figure, axes = make_figure(len(rows))
    left: list[Number] = [0.0] * len(rows)
    for color, (kind, widths) in zip((*SERIES, COLORS[BACKBONE]), counts.items(), strict=False):
        axes.barh(range(len(rows)), widths, 0.7, left, color=color, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _label(axes, [_name(row["client"], row.get("newcomer", False)) for row in rows])
    name = "training examples" if len(counts) > 1 else items
    return finish_figure(
        figure,
        axes,
        name + _format_subset(rows, run.clients),
        "",
        columns=3 if max(map(len, counts)) <= SHORT_LABEL else 2,
    )


PLOTS: dict[str, Draw] = {
    "validation": validation_curves,
    "clients": client_gains,
    "gains": sorted_gains,
    "bytes": quality_for_bytes,
    "training": training_curves,
    "data": label_distribution,
    **MERGING,
}


def _count_labels(rows: Sequence[Row], items: str) -> dict[str, list[Number]]:
    labels = [row.get("labels") or {} for row in rows]
    if all(len(each) < 2 for each in labels):
        return {items: [row["items"] for row in rows]}
    total = sum(map(Counter, labels), Counter())
    top = [label for label, _ in total.most_common(len(SERIES))]
    others: list[Number] = [
        sum(each.values()) - sum(each.get(label, 0) for label in top) for each in labels
    ]
    counts: dict[str, list[Number]] = {
        label: [each.get(label, 0) for each in labels] for label in top
    }
    return {**counts, "others": others} if any(others) else counts


def _quality(run: RunFiles, rounds: Sequence[Row]) -> list[Point]:
    return [(r, run.measure.compute(loss, 1)) for r, loss in validation(rounds)]


def _label(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, max(1, len(names)) - 0.3)
    axes.tick_params("y", length=0)


def _name(client: str, newcomer: bool) -> str:
    short = client if len(client) < 24 else client[:22] + "\N{HORIZONTAL ELLIPSIS}"
    return printable(short) + " (new)" * newcomer


def _format_subset(rows: Sequence[Any], of: Sequence[Any]) -> str:
    """Say how many clients a plot shows, if it does not show all."""
    return f" ({len(rows)} of {len(of)} clients)" if len(rows) < len(of) else ""


def _spread(rows: Sequence[Any]) -> list[Any]:
    step = max(1.0, (len(rows) - 1) / (MAX_CLIENTS - 1))
    return [rows[round(i * step)] for i in range(min(MAX_CLIENTS, len(rows)))]
