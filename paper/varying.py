"""What becomes of a measure where one thing is varied, and where it is best."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from cells import (
    Lines,
    Shown,
    apart,
    between,
    called,
    chosen,
    divided,
    gains,
    linked,
    of,
    of_item,
    ratios,
    saved,
    spread,
    tabled,
    values,
)
from fedgen_edge.report.summary import BACKBONE, paired_interval
from fedgen_edge.runs.formatting import size
from items import Row


def curve(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a value of what is varied, its models beside each other."""
    (measure, *others), models = item["measures"], item["models"]
    name = called(measure, rows[0])
    beside = [(model, other) for other in others for model in models]
    heads = [
        item["axis"],
        "chosen",
        *(f"{model}: {name}" for model in models),
        f"{models[0]} less that of {item['reference']}",
        *(f"{model} less {models[0]}" for model in models[1:]),
        *(f"{model}: {called(other, rows[0])}" for model, other in beside),
        "sent by clients",
        "to them",
        "uplink saved, %",
        "seconds of the rounds",
    ]
    theirs = values(of(rows, item["reference"]), models[0], measure)
    body = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = of(rows, variant)
        found = [values(own, model, measure) for model in models]
        cells = [
            *map(spread, found),
            "" if variant == item["reference"] else between(apart(found[0], theirs)),
            *(between(apart(each, found[0])) for each in found[1:]),
            *(spread(values(own, *pair)) for pair in beside),
            *(spread([row[way] for row in own], size) for way in ("bytes_up", "bytes_down")),
            saved(own),
            spread([row["seconds"]["federation"] for row in own]),
        ]
        body.append([variant, chosen(own), *(linked(c, item, own) if c else "" for c in cells)])
    knees = (knee(item, rows, model, each) for each in item["measures"] for model in models)
    return [*tabled(heads, body), "", *knees]


class Best(NamedTuple):
    """Of what is varied."""

    least: str
    """The value with the lowest mean."""
    near: list[str]
    """Those that are not settled above it."""


def best(item: Row, rows: Sequence[Row], model: str, measure: str) -> Best:
    """Which value a model does best with."""
    variants = dict.fromkeys(row["variant"] for row in rows)
    on_it = [variant for variant in variants if variant not in item.get("beside", ())]
    found = {v: values(of(rows, v), model, measure) for v in on_it}
    least = min(found, key=lambda variant: fmean(found[variant]))
    lows = {v: paired_interval(apart(each, found[least]))[1] for v, each in found.items()}
    return Best(least, [v for v, low in lows.items() if v != least and low <= 0])


def knee(item: Row, rows: Sequence[Row], model: str, measure: str) -> str:
    """Where the lowest mean is, and what cannot be told from it."""
    least, near = best(item, rows, model, measure)
    name = f", {called(measure, rows[0])}" if len(item["measures"]) > 1 else ""
    also = f"not settled from it: {'; '.join(near)}" if near else "all others are settled above it"
    out = f"- {model}{name}: the mean is lowest with {item['axis']} {least}; {also}."
    if paper := item.get("paper"):
        holds = "has it" if paper == least else "may have it" if paper in near else "has not"
        out += f" The paper's {paper} {holds}."
    return out


def bests(measured: Sequence[tuple[Row, Sequence[Row]]]) -> str:
    """The best values of items that vary the same, beside each other.

    Args:
        measured: items that vary the same, with their records; no divisions.
    """
    axis = measured[0][0]["axis"]
    heads = ["item", "model", "measure", f"best {axis}", "not settled from it", "the paper"]
    body = []
    for item, rows in measured:
        pairs = [(model, measure) for measure in item["measures"] for model in item["models"]]
        for model, measure in pairs:
            least, near = best(item, rows, model, measure)
            told = [item["name"], model, called(measure, rows[0]), least, ", ".join(near)]
            body.append([*told, item.get("paper", "")])
    return "\n".join(tabled(heads, body))


def repeated(item: Row, rows: Sequence[Row], there: Row, others: Sequence[Row]) -> str:
    """Whether an item's best value is best in another one too, and what its models gain in both.

    Args:
        item: that repeats the other.
        rows: its records.
        there: the item that is repeated.
        others: its records.
    """
    out, (first, *models) = [], item["models"]
    for model in item["models"]:
        first_best = best(there, others, model, there["measures"][0]).least
        least, near = best(item, rows, model, item["measures"][0])
        holds = "is" if first_best == least else "may be" if first_best in near else "is not"
        told = f"{item['axis']} {first_best}, the best of `{there['name']}`, {holds} the best here."
        out.append(f"- {model}: {told}")
    for model in models:
        both = []
        for own, found in ((there, others), (item, rows)):
            held = of(found, item["reference"])
            ours, theirs = (values(held, name, own["measures"][0]) for name in (model, first))
            both.append(linked(between(gains(ours, theirs)), own, held))
        out.append(
            f"- {model} below {first}, with {item['axis']} {item['reference']}, %: {both[0]} in "
            f"`{there['name']}`, {both[1]} here."
        )
    return "\n".join(out)


def grid(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a division, a column a variant or a row of the item; each line's lowest mean is bold.

    With the frozen backbone among them: how much of what divisions but the first cost it each other
    one makes good.
    """
    measure, shown = item["measures"][0], columns(item, rows)
    body = []
    for division, held in divided(rows).items():
        own = [of(held, one.variant) for one in shown]
        found = [values(each, one.model, measure) for one, each in zip(shown, own, strict=True)]
        least = min(map(fmean, found))
        cells = [linked(spread(each), item, of_it) for each, of_it in zip(found, own, strict=True)]
        bold = [f"**{c}**" if fmean(f) == least else c for c, f in zip(cells, found, strict=True)]
        body.append([division, *bold])
    about = f"{called(measure, rows[0])}, by {item['axis']}."
    out = ["", about, "", *tabled(["", *(one.name for one in shown)], body)]
    frozen = next((one for one in shown if one.model == BACKBONE), None)
    return [*out, *closed(item, rows, frozen)] if frozen else out


def columns(item: Row, rows: Sequence[Row]) -> list[Shown]:
    """The item's rows, or every variant's first model."""
    if "rows" in item:
        return of_item(item)
    return [Shown(v, v, item["models"][0]) for v in dict.fromkeys(r["variant"] for r in rows)]


def closed(item: Row, rows: Sequence[Row], frozen: Shown) -> Lines:
    """Of the nats that each division but the first costs the frozen backbone, the share made good.

    100 % is a model that is as good there as it is on the first, 0 % one that loses as much.
    """
    measure, (first, *others) = item["measures"][0], divided(rows).items()
    shown = [one for one in columns(item, rows) if one != frozen]

    def lost(one: Shown, held: Sequence[Row]) -> list[float]:
        near, far = (values(of(part, one.variant), one.model, measure) for part in (first[1], held))
        return ratios(far, near)

    body = []
    for division, held in others:
        whole, cells = lost(frozen, held), []
        for one in shown:
            found = gains(lost(one, held), whole)
            cells.append(linked(spread(found), item, of(held, one.variant)))
        body.append([division, *cells])
    about = (
        f"Of the nats that the frozen backbone loses against `{first[0]}`, made good, %: 100 is as "
        "good as there."
    )
    return ["", about, "", *tabled(["", *(one.name for one in shown)], body)]
