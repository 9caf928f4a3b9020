"""Recipes as they are: every model of a run, seed by seed or by its samples."""

from collections.abc import Sequence
from statistics import fmean

from cells import (
    Lines,
    Shown,
    apart,
    link,
    make_table,
    name_measure,
    read_lines,
    select_variant,
    spread,
    values,
)
from fedgen_edge.report.summary import paired_interval
from fedgen_edge.runs.formatting import size
from items import Row


def seeds(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a model and a column a seed, the differences that the item names, and the costs."""
    measure, shown = item["measures"][0], read_lines(item)
    body = []
    for line in shown:
        records = select_variant(rows, line.variant)
        numbers = values(records, line.model, measure)
        cells = [
            link(f"{value:.2f}", item, [row]) for value, row in zip(numbers, records, strict=True)
        ]
        body.append([line.name, *cells, link(f"{fmean(numbers):.2f}", item, records)])
    heads = ["model", *(f"seed {seed}" for seed in item["seeds"]), "mean"]
    caption = f"Test {name_measure(measure, rows[0])}."
    costs = [
        f"- `{variant}`: {describe_costs(select_variant(rows, variant))}"
        for variant in dict.fromkeys(row["variant"] for row in rows)
    ]
    return [
        "", caption, "", *make_table(heads, body), "", *compare_rows(item, rows), "",
        "Seconds are of training, all methods of a run together; memory is the peak of the first "
        "run's process.", "", *costs,
    ]  # fmt: skip


def compare_rows(item: Row, rows: Sequence[Row]) -> Lines:
    """The differences that an item names, each made seed by seed."""
    shown: dict[str, Shown] = {line.name: line for line in read_lines(item)}
    body = []
    for names in item["differences"]:
        pair = [shown[name] for name in names]
        records = [select_variant(rows, line.variant) for line in pair]
        minuend, subtrahend = (
            values(held, line.model, item["measures"][0])
            for held, line in zip(records, pair, strict=True)
        )
        mean, low, high = paired_interval(apart(minuend, subtrahend))
        cell = link(f"{mean:.2f}", item, [row for held in records for row in held])
        body.append([" less ".join(names), cell, f"{low:.2f} to {high:.2f}"])
    return make_table(["difference", "mean", "95 % interval over seeds"], body)


def describe_costs(rows: Sequence[Row]) -> str:
    """The seconds, memory and bytes of a variant's runs."""
    seconds = [
        row["seconds"]["federation"]
        + row["seconds"]["personal"]
        + sum(row["seconds"]["baselines"].values())
        for row in rows
    ]
    first = rows[0]
    sentence = (
        f"{min(seconds):.0f} to {max(seconds):.0f} seconds a run, {size(first['peak_bytes'])} of "
        "memory"
    )
    if not first["bytes_up"]:
        return f"{sentence}; clients send nothing."
    percent = 100 * (1 - first["bytes_up"] / first["bytes_full"])
    return (
        f"{sentence}; clients send {size(first['bytes_up'])} in a run, where full-model FedAvg "
        f"would send {size(first['bytes_full'])} (float32): {percent:.2f} % saved."
    )


def validation(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a value of what is varied: the validation number of each model, mean of clients."""
    body = []
    for variant in item["variants"]:
        records = select_variant(rows, variant)
        cells = [
            link(f"{fmean(row['validation'][model] for row in records):.2f}", item, records)
            for model in item["models"]
        ]
        body.append([variant, *cells])
    caption = f"Validation {name_measure('mean', rows[0])}."
    return ["", caption, "", *make_table([item["axis"], *item["models"]], body)]


SAMPLE_COLUMNS = {
    "{distance}, all": lambda test: test["distance"],
    "KID x 1000": lambda test: 1000 * test["kernel"][0],
    "{distance}, mean of clients": lambda test: test["distance_of_clients"],
    "classes that the backbone knows": lambda test: test["seen_classes"],
    "that it never saw": lambda test: test["unseen_classes"],
    "recall": lambda test: test["recall"],
    "diversity": lambda test: test["diversity"],
    "{measure}": lambda test: test["mean"],
}
"""Numbers of a model's samples, and the held-out number as the last."""
NARROW = (0, 1, 4, 5, 8, 9)
"""Columns of that table that a page shows at once."""


def samples(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a model: how far its samples lie from real images, its held-out number, its costs."""
    first = rows[0]
    names = {
        "distance": next(test["seen_by"] for test in first["test"].values()),
        "measure": first["measure"][0],
    }
    heads = ["model", *(head.format(**names) for head in SAMPLE_COLUMNS)]
    heads += ["sent by clients", "seconds of training"]
    body = []
    for line in read_lines(item):
        records = select_variant(rows, line.variant)
        tests = [row["test"][line.model] for row in records]
        cells = [spread([get(test) for test in tests]) for get in SAMPLE_COLUMNS.values()]
        cells += [size(fmean(test["bytes_up"] for test in tests))]
        cells += [f"{fmean(test['seconds'] for test in tests):.0f}"]
        body.append([link(line.name, item, records), *cells])
    training = first["training"]
    caption = (
        f"Dirichlet({first['alpha']}); {training['steps']} steps of {training['batch']} images a "
        f"round; {first['threads']} thread(s). {first['parameters']:,} weights, of which the "
        f"adapter has {first['adapter_parameters']:,}. Distances of classes are means over them; "
        f"never seen: {', '.join(first['unseen'])}."
    )
    return ["", caption, "", *make_table(heads, body, NARROW)]
