"""Figures from an item's records alone, as SVG that is the same to the byte each time.

They lie on a light card of their own, so that they can be read in print and on a dark page.
"""

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cells import group_by_division, name_measure, read_lines, select_variant, values
from comparing import BEFORE, get_moves
from fedgen_edge.report.style import SERIES, STYLE, WIDTH, finish_figure, make_figure, to_svg
from fedgen_edge.report.summary import paired_interval
from fedgen_edge.runs.formatting import size
from fedgen_edge.tasks.measure import Measure
from items import ROOT, Row
from varying import columns
from views import by_client

FIGURES = ROOT / "docs" / "figures"
CARD: dict[Any, Any] = {**STYLE, "figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff"}
DARK = "#1b1f24"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))


def path_of(item: Row) -> Path:
    """Where an item's figure lies."""
    return FIGURES / f"{item['name']}-{item['scale']}.svg"


def draw_figure(item: Row, rows: Sequence[Row]) -> str:
    """An item's figure; its first line names the version that drew it."""
    with mpl.rc_context(CARD):
        figure = VIEWS[item["figure"]](item, rows)
        svg = to_svg(figure, f"{item['name']}-{item['scale']}")
    return f"<!-- matplotlib {mpl.__version__} -->\n{svg.replace('currentColor', DARK)}"


def _looks() -> cycle:
    """A colour, a marker and a way to dash for each line."""
    return cycle(zip(SERIES, MARKERS, STYLES, strict=False))


def _means(found: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means, and half their 95 % intervals."""
    told = [paired_interval(each) for each in found]
    return [mean for mean, _, _ in told], [mean - low for mean, low, _ in told]


def _seeds(item: Row) -> str:
    return f"mean and 95 % interval of {len(item['seeds'])} seeds"


def _plot_points(
    axes: Axes,
    values_by_point: Sequence[Sequence[float]],
    look: tuple,
    label: str,
    joined: Sequence[int],
) -> None:
    """Means with their intervals, side by side; a line through those that it joins."""
    (means, halves), (colour, marker, dashes) = _means(values_by_point), look
    axes.plot(joined, [means[at] for at in joined], color=colour, linestyle=dashes)
    axes.errorbar(
        range(len(means)), means, halves, label=label, color=colour, marker=marker,
        linestyle="none", capsize=3,
    )  # fmt: skip


def curve(item: Row, rows: Sequence[Row]) -> Figure:
    """The first measure over what is varied, a line a division and model."""
    figure, axes = make_figure()
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    divisions = list(dict.fromkeys(row["division"] for row in rows))
    looks = _looks()
    for division in divisions:
        own = [row for row in rows if row["division"] == division]
        for model in item["models"]:
            found = [values(select_variant(own, v), model, item["measures"][0]) for v in variants]
            label = f"{model}, {division}" if len(divisions) > 1 else model
            joined = [at for at, v in enumerate(variants) if v not in item.get("beside", ())]
            _plot_points(axes, found, next(looks), label, joined)
    axes.set_xticks(range(len(variants)), variants)
    name = name_measure(item["measures"][0], rows[0])
    return _whole(figure, axes, f"{item['axis']}\n({_seeds(item)})", f"test {name}")


def grid(item: Row, rows: Sequence[Row]) -> Figure:
    """The first measure over divisions, a line a column."""
    figure, axes = make_figure()
    held, measure = group_by_division(rows), item["measures"][0]
    for line, look in zip(columns(item, rows), _looks(), strict=False):
        found = [
            values(select_variant(own, line.variant), line.model, measure) for own in held.values()
        ]
        _plot_points(axes, found, look, line.name, range(len(held)))
    axes.set_xticks(range(len(held)), list(held))
    name = name_measure(measure, rows[0])
    return _whole(figure, axes, f"{item['axis']}\n({_seeds(item)})", f"test {name}")


def clients(item: Row, rows: Sequence[Row]) -> Figure:
    """What clients gain over what is varied, a line a division."""
    figure, axes = make_figure()
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for (division, held), look in zip(by_client(item, rows).items(), _looks(), strict=False):
        found = [[gain.mean for gain in held[variant]] for variant in variants]
        _plot_points(axes, found, look, division, range(len(variants)))
    axes.set_xticks(range(len(variants)), variants)
    name = Measure(*rows[0]["measure"]).name
    axes.set_yscale("symlog", linthresh=1)  # one that trains alone may lose hundreds of times that
    y = f"test {name} below {item['models'][0]}, %"
    return _whole(figure, axes, f"{item['axis']} ({_seeds(item)})", y, columns=2)


def convergence(item: Row, rows: Sequence[Row]) -> Figure:
    """Validation against rounds, bytes and seconds."""
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    name = f"validation {name_measure('pooled', rows[0])}"
    for panel, (x, column) in zip(figure.subplots(3), AXES.items(), strict=True):
        for line, look in zip(read_lines(item), _looks(), strict=False):
            if line.costs or column != 1:
                _way(
                    panel,
                    select_variant(rows, line.variant),
                    column,
                    look,
                    line.name if not column else "",
                )
        if column == 1:  # full models beside adapters
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        _whole(figure, panel, x if column else f"round ({_seeds(item)})", name)
    return figure


AXES = {"round": 0, "sent by all clients, up": 1, "seconds of the rounds": 3}
"""Columns of a record's way."""


def _way(axes: Axes, records: Sequence[Row], column: int, look: tuple, label: str) -> None:
    """A line with its interval through the rounds that were judged."""
    measure = Measure(*records[0]["measure"])
    steps = list(zip(*(row["way"] for row in records), strict=True))
    found = [[measure.compute(way[-1], 1) for way in step] for step in steps]
    _through(axes, [fmean(way[column] for way in step) for step in steps], found, look, label)


def _through(
    axes: Axes,
    x: Sequence[float],
    values_by_point: Sequence[Sequence[float]],
    look: tuple,
    label: str,
) -> None:
    """A line through means over seeds, with their intervals."""
    (means, halves), (colour, marker, dashes) = _means(values_by_point), look
    axes.plot(x, means, color=colour, marker=marker, linestyle=dashes, label=label or None)
    low, high = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def drift(item: Row, rows: Sequence[Row]) -> Figure:
    """The cosine between clients over the rounds, a few together."""
    figure, axes = make_figure()
    for line, look in zip(read_lines(item), _looks(), strict=False):
        points = [_cosines(row) for row in select_variant(rows, line.variant)]
        x = sorted(set.intersection(*map(set, points)))
        _through(axes, x, [[each[at] for each in points] for at in x], look, line.name)
    return _whole(figure, axes, f"round ({_seeds(item)})", "cosine between clients' changes")


def _cosines(row: Row) -> dict[int, float]:
    """Means over as many rounds as a table has, by the last of them."""
    cosines: dict[int, list[float]] = {}
    for number, *_, cosine in get_moves(row):
        if cosine is not None:
            cosines.setdefault(math.ceil(number / BEFORE) * BEFORE, []).append(cosine)
    return {last: fmean(each) for last, each in cosines.items()}


def _whole(figure: Figure, axes: Axes, x: str, y: str, columns: int = 3) -> Figure:
    found = finish_figure(figure, axes, x, y, columns)
    assert found, "an item has records"
    return found


VIEWS: dict[str, Callable[[Row, Sequence[Row]], Figure]] = {
    "clients": clients,
    "convergence": convergence,
    "curve": curve,
    "drift": drift,
    "grid": grid,
}
"""Ways to draw an item's records."""
