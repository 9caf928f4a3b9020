"""What every view is made of: the numbers of records, as a page has them."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from fedgen_edge.report.summary import paired_interval
from fedgen_edge.runs.formatting import number
from fedgen_edge.tasks.measure import Measure, Number
from items import Row, format_overrides

Form = Callable[[Number], str]
Lines = list[str]
View = Callable[[Row, Sequence[Row]], Lines]
NONE = "-"


class Shown(NamedTuple):
    """One line of a comparison: a model of a variant, under a name of its own."""

    name: str
    variant: str
    model: str
    paper: float | None = None
    """What the paper reports, by its own measure."""
    costs: bool = True
    """Whether it is federated, so that its bytes and rounds say something."""


def read_lines(item: Row) -> list[Shown]:
    """The lines that the item's file names."""
    return [Shown(**row) for row in item["rows"]]


SAMPLED = {"distance": "", "distance_of_clients": ", mean of clients"}
"""Measures of samples, and what is said beside the distance's name."""


def name_measure(measure: str, row: Row) -> str:
    """What a measure's number is."""
    unit = Measure(*row["measure"])
    if measure in SAMPLED:
        return next(test["seen_by"] for test in row["test"].values()) + SAMPLED[measure]
    per = f"{unit.name} per {unit.items.removesuffix('s')}" if unit.exponential else unit.name
    return {
        "word": f"{unit.name} per word",
        "pooled": per,
        "mean": f"{per}, mean of clients",
        "worst_decile": f"{per}, worst tenth of clients",
    }[measure]


def select_variant(rows: Iterable[Row], variant: str) -> list[Row]:
    """A variant's records, a seed each."""
    return sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"])


def values(rows: Iterable[Row], model: str, measure: str) -> list[float]:
    """A model's number in each of these records."""
    return [row["test"][model][measure] for row in rows]


def apart(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Each of ours less theirs."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def gains(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Per cent by which each of ours lies below theirs."""
    return [100 * (1 - a / b) for a, b in zip(ours, theirs, strict=True)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Logarithms of each of ours over theirs: as far from 0 for half as for twice as much."""
    return [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]


def over(found: Sequence[float]) -> str:
    """The geometric mean of ratios, and its 95 % interval, from their logarithms."""
    mean, low, high = (number(math.exp(end)) for end in paired_interval(found))
    return f"{mean} ({low} to {high})"


def link(text: str, item: Row, rows: Sequence[Row]) -> str:
    """The text as a link to the records' lines."""
    ends = sorted({row["line"] for row in rows})
    lines = f"#L{ends[0]}"
    if len(ends) > 1 and ends[-1] - ends[0] == len(ends) - 1:
        lines += f"-L{ends[-1]}"
    return f"[{text}](../../paper/results/{item['records']}-{item['scale']}.jsonl{lines})"


def spread(found: Sequence[Number], form: Form = number) -> str:
    """The mean, and half its 95 % interval."""
    mean, low, _ = paired_interval(found)
    return f"{form(mean)} ± {form(mean - low)}" if mean > low > -math.inf else form(mean)


def between(found: Sequence[Number]) -> str:
    """The mean, and its 95 % interval, with signs."""
    mean, low, high = (f"{end:+.2f}" for end in paired_interval(found))
    return f"{mean} ({low} to {high})"


def format_choice(own: Sequence[Row]) -> str:
    """What a variant's trials chose, as code; nothing without trials."""
    return f"`{format_overrides(own[0]['chosen'])}`" if own[0]["chosen"] else ""


def make_table(
    heads: Sequence[str], body: Iterable[Sequence[str]], narrow: Sequence[int] = ()
) -> Lines:
    """A table in Markdown; with the numbers of a few columns, these first and the rest folded."""
    body = list(body)
    if narrow and len(narrow) < len(heads):
        few = make_table(
            [heads[at] for at in narrow], [[cells[at] for at in narrow] for cells in body]
        )
        fold = ['<details markdown="1">', "<summary>All columns</summary>", ""]
        return [*few, "", *fold, *make_table(heads, body), "", "</details>"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(cells)} |" for cells in body]


def group_by_division(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Records by their divisions."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["division"], []).append(row)
    return found


def each_division(view: View) -> View:
    """The view of one division, for each under its name."""

    def views(item: Row, rows: Sequence[Row]) -> Lines:
        out = []
        for division, own in group_by_division(rows).items():
            out += ["", *([f"**{division}**", ""] if division else []), *view(item, own)]
        return out

    return views


def find_round(row: Row, loss: float) -> Row | None:
    """The first judged round at which a run's loss is that low: its number, and what it cost."""
    for at, up, down, *seconds, found in row["way"]:
        if found <= loss:
            return {"round": at, "up": up, "down": down, "seconds": sum(seconds)}
    return None


def format_saving(own: Sequence[Row]) -> str:
    found = [100 * (1 - row["bytes_up"] / row["bytes_full"]) for row in own]
    return f"{fmean(found):.2f}"


def range_of(rows: Sequence[Row], key: str) -> str:
    found = {row[key] for row in rows}
    ends = dict.fromkeys(number(v) if isinstance(v, float) else v for v in (min(found), max(found)))
    return " to ".join(map(str, ends))
