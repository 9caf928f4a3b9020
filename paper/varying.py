"""What becomes of a measure where one thing is varied, and where it is best."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from cells import (
    Lines,
    Shown,
    apart,
    between,
    format_choice,
    format_saving,
    gains,
    group_by_division,
    link,
    make_table,
    name_measure,
    ratios,
    read_lines,
    select_variant,
    spread,
    values,
)
from fedgen_edge.report.summary import BACKBONE, paired_interval
from fedgen_edge.runs.formatting import size
from items import Row


def curve(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a value of what is varied, its models beside each other."""
    (measure, *others), models = item["measures"], item["models"]
    name = name_measure(measure, rows[0])
    beside = [(model, other) for other in others for model in models]
    heads = [
        item["axis"],
        "chosen",
        *(f"{model}: {name}" for model in models),
        f"{models[0]} less that of {item['reference']}",
        *(f"{model} less {models[0]}" for model in models[1:]),
        *(f"{model}: {name_measure(other, rows[0])}" for model, other in beside),
        "sent by clients",
        "to them",
        "uplink saved, %",
        "seconds of the rounds",
    ]
    reference_values = values(select_variant(rows, item["reference"]), models[0], measure)
    body = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        records = select_variant(rows, variant)
        columns = [values(records, model, measure) for model in models]
        cells = [
            *map(spread, columns),
            "" if variant == item["reference"] else between(apart(columns[0], reference_values)),
            *(between(apart(each, columns[0])) for each in columns[1:]),
            *(spread(values(records, *pair)) for pair in beside),
            *(spread([row[way] for row in records], size) for way in ("bytes_up", "bytes_down")),
            format_saving(records),
            spread([row["seconds"]["federation"] for row in records]),
        ]
        body.append(
            [variant, format_choice(records), *(link(c, item, records) if c else "" for c in cells)]
        )
    knees = (knee(item, rows, model, each) for each in item["measures"] for model in models)
    narrow = (0, *range(2, 2 + 2 * len(models)), heads.index("uplink saved, %"))
    return [*make_table(heads, body, narrow), "", *knees]


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
    values_by_variant = {v: values(select_variant(rows, v), model, measure) for v in on_it}
    least = min(values_by_variant, key=lambda variant: fmean(values_by_variant[variant]))
    lows = {
        v: paired_interval(apart(each, values_by_variant[least]))[1]
        for v, each in values_by_variant.items()
    }
    return Best(least, [v for v, low in lows.items() if v != least and low <= 0])


def knee(item: Row, rows: Sequence[Row], model: str, measure: str) -> str:
    """Where the lowest mean is, and what cannot be told from it."""
    least, near = best(item, rows, model, measure)
    name = f", {name_measure(measure, rows[0])}" if len(item["measures"]) > 1 else ""
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
            told = [item["name"], model, name_measure(measure, rows[0]), least, ", ".join(near)]
            body.append([*told, item.get("paper", "")])
    return "\n".join(make_table(heads, body))


def compare_repeat(item: Row, rows: Sequence[Row], there: Row, repeated_rows: Sequence[Row]) -> str:
    """Whether an item's best value is best in another one too, and what its models gain in both.

    Args:
        item: that repeats the other.
        rows: its records.
        there: the item that is repeated.
        repeated_rows: its records.
    """
    out, (first, *models) = [], item["models"]
    for model in item["models"]:
        first_best = best(there, repeated_rows, model, there["measures"][0]).least
        least, near = best(item, rows, model, item["measures"][0])
        holds = "is" if first_best == least else "may be" if first_best in near else "is not"
        told = f"{item['axis']} {first_best}, the best of `{there['name']}`, {holds} the best here."
        out.append(f"- {model}: {told}")
    for model in models:
        both = []
        for own, found in ((there, repeated_rows), (item, rows)):
            held = select_variant(found, item["reference"])
            ours, theirs = (values(held, name, own["measures"][0]) for name in (model, first))
            both.append(link(between(gains(ours, theirs)), own, held))
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
    for division, held in group_by_division(rows).items():
        records = [select_variant(held, line.variant) for line in shown]
        cell_values = [
            values(held_rows, line.model, measure)
            for line, held_rows in zip(shown, records, strict=True)
        ]
        least = min(map(fmean, cell_values))
        cells = [
            link(spread(each), item, of_it)
            for each, of_it in zip(cell_values, records, strict=True)
        ]
        bold = [
            f"**{c}**" if fmean(f) == least else c for c, f in zip(cells, cell_values, strict=True)
        ]
        body.append([division, *bold])
    about = f"{name_measure(measure, rows[0])}, by {item['axis']}."
    out = ["", about, "", *make_table(["", *(line.name for line in shown)], body)]
    frozen = next((line for line in shown if line.model == BACKBONE), None)
    return [*out, *measure_recovery(item, rows, frozen)] if frozen else out


def columns(item: Row, rows: Sequence[Row]) -> list[Shown]:
    """The item's rows, or every variant's first model."""
    if "rows" in item:
        return read_lines(item)
    return [Shown(v, v, item["models"][0]) for v in dict.fromkeys(r["variant"] for r in rows)]


def measure_recovery(item: Row, rows: Sequence[Row], frozen: Shown) -> Lines:
    """Of the nats that each division but the first costs the frozen backbone, the share made good.

    100 % is a model that is as good there as it is on the first, 0 % one that loses as much.
    """
    measure, (first, *far_divisions) = item["measures"][0], group_by_division(rows).items()
    shown = [line for line in columns(item, rows) if line != frozen]

    def measure_loss(line: Shown, held: Sequence[Row]) -> list[float]:
        near, far = (
            values(select_variant(part, line.variant), line.model, measure)
            for part in (first[1], held)
        )
        return ratios(far, near)

    body = []
    for division, held in far_divisions:
        whole, cells = measure_loss(frozen, held), []
        for line in shown:
            found = gains(measure_loss(line, held), whole)
            cells.append(link(spread(found), item, select_variant(held, line.variant)))
        body.append([division, *cells])
    about = (
        f"Of the nats that the frozen backbone loses against `{first[0]}`, made good, %: 100 is as "
        "good as there."
    )
    return ["", about, "", *make_table(["", *(line.name for line in shown)], body)]
