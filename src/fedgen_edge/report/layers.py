"""What rounds say of merging: how clients' changes agree, and what became of each layer."""

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
"""What is measured of each layer: its name, and which end of its range is to be looked at."""


class Spread(NamedTuple):
    """Numbers of one round: their middle, and from where to where they go."""

    round: int
    middle: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class LayerRow:
    """One measurement of the layers, in the first round that has it and in the last."""

    name: str
    first: Spread
    last: Spread
    layer: str
    """The one at the end of the range that is to be looked at, in the last round."""
    value: Number
    """Its number there."""


def by_layer(row: Row, what: str) -> dict[str, Number]:
    """A measurement of every layer in one round; none where the round was not judged."""
    layers: Mapping[str, Row] = row.get("layers") or {}
    values = {layer: each.get(what, math.nan) for layer, each in layers.items()}
    return {layer: value for layer, value in values.items() if math.isfinite(value)}


def over_layers(rounds: Iterable[Row], what: str) -> list[Spread]:
    """Median and range over the layers, where a round was judged."""
    per_round = [(row["round"], by_layer(row, what).values()) for row in rounds]
    return [Spread(at, median(found), min(found), max(found)) for at, found in per_round if found]


def drifts(rounds: Iterable[Row]) -> list[Spread]:
    """Mean and range over clients of how far they moved, where they sent it."""
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
    """Every measurement that the run's rounds have, and the layer that is worst by it."""
    rows = []
    for what, (name, worse) in LAYERS.items():
        if over := over_layers(run.rounds, what):
            last = next(row for row in run.rounds if row["round"] == over[-1].round)
            per_layer = by_layer(last, what)
            layer = worse(per_layer, key=per_layer.__getitem__)
            rows.append(LayerRow(name, over[0], over[-1], layer, per_layer[layer]))
    return rows


def agreement(row: Row) -> Number | None:
    """Mean cosine between two clients' updates, from norms alone; none where nobody can tell.

    |sum w d|^2 is sum w^2 |d|^2 plus the products of pairs, so the rest is the pairs' share.
    """
    if not _has_update_norms(row):
        return None
    total = sum(c["weight"] for c in row["clients"]) or 1.0
    pulls = [c["weight"] / total * c["drift"] for c in row["clients"]]
    alone = sum(pull * pull for pull in pulls)
    pairs = sum(pulls) ** 2 - alone
    return (row["mean_norm"] ** 2 - alone) / pairs if pairs > 1e-9 * alone else None


def _has_update_norms(row: Row) -> bool:
    """Whether changes were sent, of which one knows how far they go."""
    return bool(row["bytes_up"]) and row.get("mean_norm") is not None
