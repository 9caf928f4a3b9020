"""Methods beside each other: what they reach, by what way, and what the paper says of them."""

import math
from collections.abc import Sequence
from statistics import fmean

from cells import (
    NONE,
    Form,
    Lines,
    Shown,
    between,
    find_round,
    format_choice,
    format_saving,
    gains,
    link,
    make_table,
    name_measure,
    over,
    ratios,
    read_lines,
    select_variant,
    spread,
    values,
)
from fedgen_edge.report.summary import BACKBONE, paired_interval
from fedgen_edge.runs.formatting import number, size
from fedgen_edge.tasks.measure import Measure
from items import Row


def methods(item: Row, rows: Sequence[Row]) -> Lines:
    """Methods beside each other, what each costs to the same quality, and the paper's claims."""
    shown, first = read_lines(item), rows[0]
    base = next(line for line in shown if line.variant == item["reference"] and line.costs)
    base_values = values(select_variant(rows, base.variant), base.model, item["measures"][0])
    goal = find_common_loss(shown, rows)
    heads = [
        "method",
        "the paper",
        "chosen",
        *(name_measure(measure, first) for measure in item["measures"]),
        f"over {base.name}",
        "uplink saved, %",
        *(f"{what} to the quality" for what in ("uplink", "downlink", "rounds", "seconds")),
    ]
    body = []
    for line in shown:
        records = select_variant(rows, line.variant)
        columns = [values(records, line.model, measure) for measure in item["measures"]]
        cells = [
            *(spread(each) for each in columns),
            "" if line == base else over(ratios(columns[0], base_values)),
            *(_costs(records, goal) if line.costs else [NONE] * 5),
        ]
        body.append([
            line.name,
            "" if line.paper is None else f"{line.paper:g}",
            "" if line.model == BACKBONE else format_choice(records),
            *(link(cell, item, records) if cell not in {"", NONE} else cell for cell in cells),
        ])  # fmt: skip
    quality = (
        "The quality that costs are counted to is, seed by seed, the lowest validation loss that "
        "every federated method reaches."
    )
    first_measure, last_measure = 3, 2 + len(item["measures"])
    narrow = (0, 1, first_measure, last_measure + 1, last_measure + 2)
    return [*make_table(heads, body, narrow), "", quality, *_claims(item, rows)]


def find_common_loss(shown: Sequence[Shown], rows: Sequence[Row]) -> dict[int, float]:
    """By seed, the lowest validation loss that all of those reach that are federated."""
    federated = {one.variant for one in shown if one.costs}
    losses: dict[int, float] = {}
    for row in (row for row in rows if row["variant"] in federated):
        lowest = min(loss for *_, loss in row["way"])
        losses[row["seed"]] = max(lowest, losses.get(row["seed"], -math.inf))
    return losses


def _costs(records: Sequence[Row], goal: dict[int, float]) -> Lines:
    when = [find_round(row, goal[row["seed"]]) for row in records]
    there = [found for found in when if found]
    assert len(there) == len(records), "the goal is what all of them reach"
    forms: dict[str, Form] = {"up": size, "down": size, "round": number, "seconds": number}
    return [
        format_saving(records),
        *(spread([f[key] for f in there], form) for key, form in forms.items()),
    ]


def _claims(item: Row, rows: Sequence[Row]) -> Lines:
    """Whether what the paper says of two methods holds of these records."""
    shown, out = {line.name: line for line in read_lines(item)}, [""]
    for claim in item.get("claims", ()):
        if "saved" in claim:
            out.append(
                _check_saving(claim, item, select_variant(rows, shown[claim["saved"]].variant))
            )
            continue
        better, worse = pair = shown[claim["better"]], shown[claim["worse"]]
        better_values, worse_values = [
            values(select_variant(rows, line.variant), line.model, item["measures"][0])
            for line in pair
        ]
        paper_ratio, reported = _read_report(claim.get("paper", (better.paper, worse.paper)))
        measured = ratios(better_values, worse_values)
        out.append(
            f"- **{better.name} over {worse.name}.** The paper: {reported}. Here: "
            f"{link(over(measured), item, select_variant(rows, better.variant))}. "
            f"{verdict(paper_ratio, measured)}"
        )
    return out


def _read_report(paper: float | Sequence[float]) -> tuple[float, str]:
    """The logarithm of the paper's ratio, and its words; it may give the ratio alone."""
    if isinstance(paper, int | float):
        return math.log(paper), number(paper)
    ours, theirs = paper
    return math.log(ours / theirs), f"{number(ours / theirs)} ({ours:g} against {theirs:g})"


def _check_saving(claim: Row, item: Row, records: Sequence[Row]) -> str:
    in_paper, percent = claim["paper"], float(format_saving(records))
    holds = "holds" if percent > in_paper else "does not hold"
    return (
        f"- **Uplink saved by {claim['saved']}.** The paper: more than {in_paper:g} %. Here: "
        f"{link(f'{percent:.2f} %', item, records)}. It {holds}."
    )


def verdict(paper_ratio: float, measured: Sequence[float]) -> str:
    """Whether an order holds, and a gain is as large as told, by the 95 % interval.

    Args:
        paper_ratio: logarithm of a ratio below 1.
        measured: the same, a seed each.
    """
    _, low, high = paired_interval(measured)
    if low > 0:
        return "The order is the reverse."
    if high >= 0:
        return "The order is not settled."
    return "The order holds, and the gain is " + (
        "smaller."
        if low > paper_ratio
        else "larger."
        if high < paper_ratio
        else "as large, to the interval."
    )


def convergence(item: Row, rows: Sequence[Row]) -> Lines:
    """Validation after each third of the rounds, and how much the last third still changed."""
    name = f"validation {name_measure('pooled', rows[0])}"
    heads = ["method", *(f"{name}, {part}" for part in THIRDS), "lower by the last third, %"]
    body = []
    for line in read_lines(item):
        records = select_variant(rows, line.variant)
        ends = [thirds(row) for row in records]
        cells = [spread(each) for each in zip(*ends, strict=True)]
        cells.append(between(gains([f[2] for f in ends], [f[1] for f in ends])))
        body.append([line.name, *(link(cell, item, records) for cell in cells)])
    return make_table(heads, body)


THIRDS = ("a third of the rounds", "two thirds", "all")


def thirds(row: Row) -> list[float]:
    """The validation number at the last judged round of each third."""
    measure = Measure(*row["measure"])
    ends = [[way for way in row["way"] if 3 * way[0] <= part * row["rounds"]] for part in (1, 2, 3)]
    return [measure.compute(before[-1][-1], 1) for before in ends]


def drift(item: Row, rows: Sequence[Row]) -> Lines:
    """How clients pull apart on the way to the same loss, in the rounds just before it."""
    shown = read_lines(item)
    goal = find_common_loss(shown, rows)
    heads = ["method", "rounds to the loss", "drift over mean change", "cosine between clients"]
    body = []
    for line in shown:
        records = select_variant(rows, line.variant)
        drifts = [measure_drift(row, goal[row["seed"]]) for row in records]
        cells = [spread(each) for each in zip(*drifts, strict=True)]
        body.append([line.name, *(link(cell, item, records) for cell in cells)])
    about = (
        "The loss is, seed by seed, the lowest that all of these reach. Drift is how far a client "
        "moves in a round, over how far their mean change goes: 1 where all agree. Changes are of "
        "effective weights: of an adapter's layer, that of B A, and of a full model's, that of the "
        f"weight. Both are means over the {BEFORE} rounds up to there."
    )
    return [*make_table(heads, body), "", about]


BEFORE = 5
"""Rounds whose drift is told: one round's clients are few."""


def measure_drift(row: Row, loss: float) -> list[float]:
    """The round that reaches a loss, drift over the mean change, and cosine between clients."""
    at = find_round(row, loss)
    assert at, "the goal is what all of them reach"
    told = [d for d in get_moves(row) if at["round"] - BEFORE < d[0] <= at["round"]]
    cosines = [cosine for *_, cosine in told if cosine is not None]
    return [at["round"], fmean(own / mean for _, own, mean, _ in told), fmean(cosines)]


def get_moves(row: Row) -> list[list]:
    """What a record says of each round's drift.

    Raises:
        FileNotFoundError: it is older than the measurement.
    """
    if "moves" not in row:
        raise FileNotFoundError(f"{row['item']}: line {row['line']} does not tell drift")
    return row["moves"]
