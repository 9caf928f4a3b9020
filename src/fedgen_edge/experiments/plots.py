"""A run's pictures as SVG: text stays text, and the colours hold on light and on dark.

The ink is the page's own colour; the palette is Okabe and Ito's, darkened where white needs it.
"""

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, cycle
from statistics import fmean
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedgen_edge.experiments.summary import (
    BACKBONE,
    GLOBAL,
    LOCAL,
    PERSONAL,
    Number,
    Row,
    RunFiles,
    by_model,
    per_client,
    printable,
    size,
    validation,
)

INK = "#010203"
"""Stands for the page's text colour until the SVG is done."""
COLOURS = {BACKBONE: "#808690", LOCAL: "#d55e00", GLOBAL: "#0072b2", PERSONAL: "#009e73"}
OTHERS = ("#a67c00", "#cc79a7", "#7a68c9", "#4a8fb5", "#8a6d5a", "#b5485d", "#5f8f3e")
SERIES = (COLOURS[GLOBAL], *OTHERS)
MARKS = {BACKBONE: "D", LOCAL: "s", GLOBAL: "o", PERSONAL: "^"}
LINES = ("-", "--", ":", "-.")
WIDTH = 5.8
"""Inches: small enough that 10-point text is readable on a phone."""
MOST = 30
"""Clients in one picture."""
LOGARITHMIC = 8
"""Largest value to smallest, from where an axis is logarithmic."""
PAPER = (
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
Draw = Callable[[RunFiles], Figure | None]


def pictures(run: RunFiles, draws: Mapping[str, Draw] | None = None) -> dict[str, str]:
    """Every picture that the run has numbers for, by name: of these, or of `PICTURES`."""
    with mpl.rc_context(STYLE):
        drawn = {name: draw(run) for name, draw in (draws or PICTURES).items()}
        return {name: _svg(figure, name) for name, figure in drawn.items() if figure}


def overlay(groups: Mapping[str, Sequence[RunFiles]]) -> dict[str, str]:
    """Validation of several groups of runs: the mean over seeds, and their range."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for colour, (label, runs) in zip(cycle(SERIES), groups.items(), strict=False):
            curves = [dict(_quality(run, run.rounds)) for run in runs]
            shared = sorted(set.intersection(*map(set, curves)))
            values = [[curve[r] for curve in curves] for r in shared]
            _line(axes, [(r, fmean(v)) for r, v in zip(shared, values, strict=True)], label, colour)
            _band(axes, shared, values, colour)
        name = next(iter(groups.values()))[0].measure.name
        drawn = _finished(figure, axes, "round", f"validation {name}", columns=1)
        return {"comparison": _svg(drawn, "comparison")} if drawn else {}


def validation_curves(run: RunFiles) -> Figure | None:
    """Validation after each round, baselines beside it."""
    figure, axes = _figure()
    for label, colour, rounds in _methods(run):
        _line(axes, _quality(run, rounds), label, colour)
    return _finished(figure, axes, "round", f"validation {run.measure.name}")


def training_curves(run: RunFiles) -> Figure | None:
    """Mean training loss of each round; the band is from the best client to the worst."""
    figure, axes = _figure()
    for label, colour, rounds in _methods(run):
        trained = [row for row in rounds if row["loss"] is not None]
        _line(axes, [(row["round"], row["loss"]) for row in trained], label, colour)
    whole = [row for row in run.rounds if row["clients"]]
    losses = [[c["loss"] for c in row["clients"]] for row in whole]
    _band(axes, [row["round"] for row in whole], losses, COLOURS[GLOBAL])
    return _finished(
        figure, axes, "round", f"training loss, {run.measure.trained or run.measure.unit}"
    )


def quality_for_bytes(run: RunFiles) -> Figure | None:
    """Validation against all that clients have sent by then."""
    figure, axes = _figure()
    for label, colour, rounds in _methods(run):
        numbers, each = [row["round"] for row in rounds], [row["bytes_up"] for row in rounds]
        sent = dict(zip(numbers, accumulate(each), strict=True))
        points = [(sent[r], value) for r, value in _quality(run, rounds)]
        if points and not points[-1][0]:
            axes.axhline(points[-1][1], color=colour, ls="--", label=f"{label} (sends nothing)")
        else:
            _line(axes, points, label, colour)
    held = f"validation {run.measure.name}"
    drawn = _finished(figure, axes, "sent by all clients so far", held)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    return drawn


def against(
    run: RunFiles, points: Callable[[Sequence[Row]], Sequence[Point]], x: str
) -> Figure | None:
    """Validation of each method against something else that its rounds have."""
    figure, axes = _figure()
    for label, colour, rounds in _methods(run):
        _line(axes, points(rounds), label, colour)
    return _finished(figure, axes, x, f"validation {run.measure.name}")


def client_gains(run: RunFiles) -> Figure | None:
    """Each model on each client's test data, the worst client on top."""
    rows = [row for row in per_client(run) if any(map(math.isfinite, row.tested.values()))]
    rows = _spread(sorted(rows, key=lambda row: min(row.tested.values())))
    figure, axes = _figure(len(rows))
    for y, row in enumerate(rows):
        ends = min(row.tested.values()), max(row.tested.values())
        axes.plot(ends, (y, y), color=INK, alpha=0.25, linewidth=1)
    for model, colour in _colours(by_model(run)).items():
        found = [(y, row.tested[model]) for y, row in enumerate(rows) if model in row.tested]
        heights, values = [y for y, _ in found], [value for _, value in found]
        mark = MARKS.get(model, "v")
        axes.plot(values, heights, mark, color=colour, markersize=6.5, label=model)
    _label(axes, [_name(row.client, row.newcomer) for row in rows])
    return _finished(figure, axes, f"test {run.measure.name}", "", columns=4)


def who_holds_what(run: RunFiles) -> Figure | None:
    """Training examples of each client by label, or its items where labels say nothing."""
    rows = _spread(sorted(run.clients, key=lambda row: row["train"]))
    items = f"training {run.measure.items}"
    held = _held(rows, items)
    figure, axes = _figure(len(rows))
    left: list[Number] = [0.0] * len(rows)
    for colour, (kind, widths) in zip((*SERIES, COLOURS[BACKBONE]), held.items(), strict=False):
        axes.barh(range(len(rows)), widths, 0.7, left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _label(axes, [_name(row["client"], row.get("newcomer", False)) for row in rows])
    return _finished(figure, axes, "training examples" if len(held) > 1 else items, "")


PICTURES: dict[str, Draw] = {
    "validation": validation_curves,
    "clients": client_gains,
    "bytes": quality_for_bytes,
    "training": training_curves,
    "data": who_holds_what,
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


def _methods(run: RunFiles) -> list[tuple[str, str, list[Row]]]:
    own = str(run.settings.get("method.name", "this run"))
    colours = _colours(run.baselines)
    beside = [(name, colours[name], rounds) for name, rounds in run.baselines.items()]
    return [(own, COLOURS[GLOBAL], run.rounds), *beside]


def _colours(models: Iterable[str]) -> dict[str, str]:
    others = cycle(OTHERS)
    return {model: COLOURS.get(model) or next(others) for model in models}


def _quality(run: RunFiles, rounds: Sequence[Row]) -> list[Point]:
    return [(r, run.measure.shown(loss, 1)) for r, loss in validation(rounds)]


def _figure(rows: int | None = None) -> tuple[Figure, Axes]:
    height = 3.4 if rows is None else 1.1 + 0.24 * rows
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _line(axes: Axes, points: Sequence[Point], label: str, colour: str) -> None:
    whole = [point for point in points if math.isfinite(point[1])]
    style = LINES[len(axes.lines) % len(LINES)]
    if whole:
        axes.plot(*zip(*whole, strict=True), style, marker="o", color=colour, label=label)


def _band(axes: Axes, x: Sequence[Number], values: Sequence[Sequence[Number]], colour: str) -> None:
    if values and all(math.isfinite(value) for each in values for value in each):
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _label(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, max(1, len(names)) - 0.3)
    axes.tick_params("y", length=0)


def _name(client: str, newcomer: bool) -> str:
    short = client if len(client) < 24 else client[:22] + "\N{HORIZONTAL ELLIPSIS}"
    return printable(short) + " (new)" * newcomer


def _spread(rows: Sequence[Any]) -> list[Any]:
    step = max(1.0, (len(rows) - 1) / (MOST - 1))
    return [rows[round(i * step)] for i in range(min(MOST, len(rows)))]


def _finished(figure: Figure, axes: Axes, x: str, y: str, columns: int = 3) -> Figure | None:
    if not axes.has_data():
        return None
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y" if y else "x")
    _ticks(axes, "y" if y else "x")
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)
    return figure


def _ticks(axes: Axes, which: Literal["x", "y"]) -> None:
    """Plain numbers, on a logarithmic axis where the values need one."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    if low > 0 and high > LOGARITHMIC * low:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _svg(figure: Figure, name: str) -> str:
    """SVG to lay in a page: it scales, its ids are its own, and its ink is the page's."""
    drawn = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts have them
        figure.savefig(
            drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", drawn.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    text = re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{name}"', text, count=1
    )
    return text.replace(INK, "currentColor").replace("'DejaVu Sans', sans-serif", "sans-serif")


def standalone(svg: str) -> str:
    """The same as a file of its own, which has its own paper."""
    return svg.replace(">", f">{PAPER}", 1)
