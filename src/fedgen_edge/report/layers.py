"""How well clients' updates agree, and what happens to each layer, from the rounds' records."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from fedgen_edge.report.summary import Number, Row, RunFiles

LAYERS = {
    "error": ("aggregation error", max),
    "rank": ("effective rank", min),
    "a": ("norm of A", max),
    "b": ("norm of B", max),
}
"""Measurements of each layer: the name, and which end of its range matters."""


class Spread(NamedTuple):
    """Numbers of one round: their middle, and their range."""

    round: int
    middle: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class LayerRow:
    """One measurement of the layers, in the first and the last round that have it."""

    name: str
    first: Spread
    last: Spread
    layer: str
    """The layer at the end of the range that matters, in the last round."""
    value: Number
    """The layer's value there."""


def by_layer(row: Row, what: str) -> dict[str, Number]:
    """Return a measurement of every layer in one round; empty if the round was not measured."""
    layers: Mapping[str, Row] = row.get("layers") or {}
    values = {layer: each.get(what, math.nan) for layer, each in layers.items()}
    return {layer: value for layer, value in values.items() if math.isfinite(value)}


def over_layers(rounds: Iterable[Row], what: str) -> list[Spread]:
    """Return the median and range over layers for each measured round."""
    per_round = [(row["round"], by_layer(row, what).values()) for row in rounds]
    return [Spread(at, median(found), min(found), max(found)) for at, found in per_round if found]


def drifts(rounds: Iterable[Row]) -> list[Spread]:
    """Return the mean and range over clients of their updates' norms, if they sent them."""
    per_round = [
        (row["round"], [c["drift"] for c in row["clients"]])
        for row in rounds
        if _has_update_norms(row)
    ]
    finite_rounds = [
        (at, found) for at, found in per_round if found and all(map(math.isfinite, found))
    ]
    return [Spread(at, fmean(found), min(found), max(found)) for at, found in finite_rounds]


def layer_rows(run: RunFiles) -> list[LayerRow]:
    """Return every measurement in the run's rounds, with the layer that is worst by it."""
    rows = []
    for what, (name, worse) in LAYERS.items():
        if over := over_layers(run.rounds, what):
            last = next(row for row in run.rounds if row["round"] == over[-1].round)
            per_layer = by_layer(last, what)
            layer = worse(per_layer, key=per_layer.__getitem__)
            rows.append(LayerRow(name, over[0], over[-1], layer, per_layer[layer]))
    return rows


def agreement(row: Row) -> Number | None:
    """Return the mean cosine between two clients' updates, from norms alone; None if unknown.

    |sum w d|^2 is sum w^2 |d|^2 plus the products of pairs, so the difference is the pairs' part.
    """
    if not _has_update_norms(row):
        return None
    total = sum(c["weight"] for c in row["clients"]) or 1.0
    pulls = [c["weight"] / total * c["drift"] for c in row["clients"]]
    alone = sum(pull * pull for pull in pulls)
    pairs = sum(pulls) ** 2 - alone
    return (row["mean_norm"] ** 2 - alone) / pairs if pairs > 1e-9 * alone else None


def _has_update_norms(row: Row) -> bool:
    """Whether the round has updates whose norms are known."""
    return bool(row["bytes_up"]) and row.get("mean_norm") is not None
