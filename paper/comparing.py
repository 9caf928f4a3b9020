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
    called,
    chosen,
    gains,
    linked,
    of,
    of_item,
    over,
    ratios,
    reached,
    saved,
    spread,
    tabled,
    values,
)
from fedgen_edge.report.summary import BACKBONE, paired_interval
from fedgen_edge.runs.formatting import number, size
from fedgen_edge.tasks.measure import Measure
from items import Row


def methods(item: Row, rows: Sequence[Row]) -> Lines:
    """Methods beside each other, what each costs to the same quality, and the paper's claims."""
    shown, first = of_item(item), rows[0]
    base = next(one for one in shown if one.variant == item["reference"] and one.costs)
    theirs = values(of(rows, base.variant), base.model, item["measures"][0])
    goal = common(shown, rows)
    heads = [
        "method",
        "the paper",
        "chosen",
        *(called(measure, first) for measure in item["measures"]),
        f"over {base.name}",
        "uplink saved, %",
        *(f"{what} to the quality" for what in ("uplink", "downlink", "rounds", "seconds")),
    ]
    body = []
    for one in shown:
        own = of(rows, one.variant)
        found = [values(own, one.model, measure) for measure in item["measures"]]
        cells = [
            *(spread(each) for each in found),
            "" if one == base else over(ratios(found[0], theirs)),
            *(_costs(own, goal) if one.costs else [NONE] * 5),
        ]
        body.append([
            one.name,
            "" if one.paper is None else f"{one.paper:g}",
            "" if one.model == BACKBONE else chosen(own),
            *(linked(cell, item, own) if cell not in {"", NONE} else cell for cell in cells),
        ])  # fmt: skip
    quality = (
        "The quality that costs are counted to is, seed by seed, the lowest validation loss that "
        "every federated method reaches."
    )
    return [*tabled(heads, body), "", quality, *_claims(item, rows)]


def common(shown: Sequence[Shown], rows: Sequence[Row]) -> dict[int, float]:
    """By seed, the lowest validation loss that all of those reach that are federated."""
    federated = {one.variant for one in shown if one.costs}
    found: dict[int, float] = {}
    for row in (row for row in rows if row["variant"] in federated):
        lowest = min(loss for *_, loss in row["way"])
        found[row["seed"]] = max(lowest, found.get(row["seed"], -math.inf))
    return found


def _costs(own: Sequence[Row], goal: dict[int, float]) -> Lines:
    when = [reached(row, goal[row["seed"]]) for row in own]
    there = [found for found in when if found]
    assert len(there) == len(own), "the goal is what all of them reach"
    forms: dict[str, Form] = {"up": size, "down": size, "round": number, "seconds": number}
    return [saved(own), *(spread([f[key] for f in there], form) for key, form in forms.items())]


def _claims(item: Row, rows: Sequence[Row]) -> Lines:
    """Whether what the paper says of two methods holds of these records."""
    shown, out = {one.name: one for one in of_item(item)}, [""]
    for claim in item.get("claims", ()):
        if "saved" in claim:
            out.append(_saving(claim, item, of(rows, shown[claim["saved"]].variant)))
            continue
        ours, theirs = pair = shown[claim["better"]], shown[claim["worse"]]
        own, other = [values(of(rows, one.variant), one.model, item["measures"][0]) for one in pair]
        told, reported = _reported(claim.get("paper", (ours.paper, theirs.paper)))
        measured = ratios(own, other)
        out.append(
            f"- **{ours.name} over {theirs.name}.** The paper: {reported}. Here: "
            f"{linked(over(measured), item, of(rows, ours.variant))}. {verdict(told, measured)}"
        )
    return out


def _reported(paper: float | Sequence[float]) -> tuple[float, str]:
    """The logarithm of the paper's ratio, and its words; it may give the ratio alone."""
    if isinstance(paper, int | float):
        return math.log(paper), number(paper)
    ours, theirs = paper
    return math.log(ours / theirs), f"{number(ours / theirs)} ({ours:g} against {theirs:g})"


def _saving(claim: Row, item: Row, own: Sequence[Row]) -> str:
    told, found = claim["paper"], float(saved(own))
    return (
        f"- **Uplink saved by {claim['saved']}.** The paper: more than {told:g} %. Here: "
        f"{linked(f'{found:.2f} %', item, own)}. It {'holds' if found > told else 'does not hold'}."
    )


def verdict(told: float, measured: Sequence[float]) -> str:
    """Whether an order holds, and a gain is as large as told, by the 95 % interval.

    Args:
        told: logarithm of a ratio below 1.
        measured: the same, a seed each.
    """
    _, low, high = paired_interval(measured)
    if low > 0:
        return "The order is the reverse."
    if high >= 0:
        return "The order is not settled."
    return "The order holds, and the gain is " + (
        "smaller." if low > told else "larger." if high < told else "as large, to the interval."
    )


def convergence(item: Row, rows: Sequence[Row]) -> Lines:
    """Validation after each third of the rounds, and how much the last third still changed."""
    name = f"validation {called('pooled', rows[0])}"
    heads = ["method", *(f"{name}, {part}" for part in THIRDS), "lower by the last third, %"]
    body = []
    for one in of_item(item):
        own = of(rows, one.variant)
        found = [thirds(row) for row in own]
        cells = [spread(each) for each in zip(*found, strict=True)]
        cells.append(between(gains([f[2] for f in found], [f[1] for f in found])))
        body.append([one.name, *(linked(cell, item, own) for cell in cells)])
    return tabled(heads, body)


THIRDS = ("a third of the rounds", "two thirds", "all")


def thirds(row: Row) -> list[float]:
    """The validation number at the last judged round of each third."""
    measure = Measure(*row["measure"])
    ends = [[way for way in row["way"] if 3 * way[0] <= part * row["rounds"]] for part in (1, 2, 3)]
    return [measure.compute(before[-1][-1], 1) for before in ends]


def drift(item: Row, rows: Sequence[Row]) -> Lines:
    """How clients pull apart on the way to the same loss, in the rounds just before it."""
    shown = of_item(item)
    goal = common(shown, rows)
    heads = ["method", "rounds to the loss", "drift over mean change", "cosine between clients"]
    body = []
    for one in shown:
        own = of(rows, one.variant)
        found = [pulled(row, goal[row["seed"]]) for row in own]
        cells = [spread(each) for each in zip(*found, strict=True)]
        body.append([one.name, *(linked(cell, item, own) for cell in cells)])
    about = (
        "The loss is, seed by seed, the lowest that all of these reach. Drift is how far a client "
        "moves in a round, over how far their mean change goes: 1 where all agree. Changes are of "
        "effective weights: of an adapter's layer, that of B A, and of a full model's, that of the "
        f"weight. Both are means over the {BEFORE} rounds up to there."
    )
    return [*tabled(heads, body), "", about]


BEFORE = 5
"""Rounds whose drift is told: one round's clients are few."""


def pulled(row: Row, loss: float) -> list[float]:
    """The round that reaches a loss, drift over the mean change, and cosine between clients."""
    at = reached(row, loss)
    assert at, "the goal is what all of them reach"
    told = [d for d in moves(row) if at["round"] - BEFORE < d[0] <= at["round"]]
    cosines = [cosine for *_, cosine in told if cosine is not None]
    return [at["round"], fmean(own / mean for _, own, mean, _ in told), fmean(cosines)]


def moves(row: Row) -> list[list]:
    """What a record says of each round's drift.

    Raises:
        FileNotFoundError: it is older than the measurement.
    """
    if "moves" not in row:
        raise FileNotFoundError(f"{row['item']}: line {row['line']} does not tell drift")
    return row["moves"]
