"""Numbers within sentences: each is defined in `quotes.toml`, and made of the records."""

import shlex
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean

import comparing
import kept
import varying
import views
from benchmark_tables import read_benchmarks
from cells import (
    Shown,
    apart,
    between,
    find_round,
    format_saving,
    over,
    ratios,
    select_variant,
    values,
)
from fedgen_edge.runs.formatting import number, size
from items import Row, read


@cache
def read_quotes() -> dict[str, str]:
    """Every quote's definition, by its name."""
    return tomllib.loads(Path(__file__).with_name("quotes.toml").read_text("utf-8"))


def evaluate(definition: str) -> str:
    """The number that a definition, `FUNCTION ARGUMENT ...`, stands for."""
    name, *arguments = shlex.split(definition)
    return FUNCTIONS[name](*arguments)


@cache
def read_records(item: str) -> tuple[Row, list[Row]]:
    """An item, named with its scale, and its records."""
    name, _, scale = item.rpartition("-")
    return (read_item := read(name, scale)), kept.read_whole(read_item)


def select(item: str, line: str, measure: str, division: str = "") -> list[float]:
    """The numbers of `VARIANT.MODEL`, a seed each."""
    variant, _, model = line.rpartition(".")
    rows = [row for row in read_records(item)[1] if row["division"] == division]
    return values(select_variant(rows, variant), model, measure)


def mean(item: str, line: str, measure: str) -> str:
    """The mean over seeds."""
    return number(fmean(select(item, line, measure)))


def difference(item: str, line: str, reference: str, *measure: str) -> str:
    """The mean difference of two models, with its interval; a measure, perhaps a division."""
    return between(apart(select(item, line, *measure), select(item, reference, *measure)))


def ratio(item: str, line: str, reference: str, measure: str) -> str:
    """The ratio of two models, with its interval."""
    return over(ratios(select(item, line, measure), select(item, reference, measure)))


def best(item: str, model: str, measure: str) -> str:
    """The value of what is varied that has the lowest mean."""
    return varying.best(*read_records(item), model, measure).least


def uplink_saved(item: str, variant: str) -> str:
    """Per cent of full-model FedAvg's uplink that a variant does not send."""
    return format_saving(select_variant(read_records(item)[1], variant))


def bytes_sent(item: str, variant: str) -> str:
    """What all clients send in a run."""
    return size(fmean(row["bytes_up"] for row in select_variant(read_records(item)[1], variant)))


def cost_ratio(item: str, variant: str, reference: str, cost: str) -> str:
    """How often a variant's cost to the common loss holds that of another; a cost is `up`, ..."""
    asked, rows = read_records(item)
    shown = [Shown(**row) for row in asked["rows"]]
    goal = comparing.find_common_loss(shown, rows)

    def total(name: str) -> float:
        rounds = [find_round(row, goal[row["seed"]]) for row in select_variant(rows, name)]
        return fmean(found[cost] for found in rounds if found)

    return number(total(reference) / total(variant))


def describe_gains(item: str, division: str) -> str:
    """With how many examples tuning pays, and with how many it costs."""
    return views.describe_gains(views.by_client(*read_records(item))[division])


def benchmark(kind: str, name: str, *keys: str) -> str:
    """A number of a benchmark's result, by its keys."""
    value = read_benchmarks(kind)[name]
    for key in keys:
        value = value[key]
    return number(value)


def benchmark_range(kind: str, *path: str) -> str:
    """The least and the greatest of a number over a benchmark's results, or over its cases."""
    results = list(read_benchmarks(kind).values())
    if path[0] == "cases":
        results, path = [case for result in results for case in result["cases"]], path[1:]
    numbers = [result[path[0]] for result in results]
    return f"{number(min(numbers))} to {number(max(numbers))}"


FUNCTIONS: dict[str, Callable[..., str]] = {
    "mean": mean,
    "difference": difference,
    "ratio": ratio,
    "best": best,
    "uplink_saved": uplink_saved,
    "bytes_sent": bytes_sent,
    "cost_ratio": cost_ratio,
    "gains": describe_gains,
    "benchmark": benchmark,
    "benchmark_range": benchmark_range,
}
"""What a definition's first word may be."""
