"""What each client has of a run, and its gains as a distribution over clients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from fedgen_edge.experiments.summary import (
    BACKBONE,
    GLOBAL,
    LOCAL,
    PERSONAL,
    Number,
    RunFiles,
    by_client,
    by_model,
    number,
    shared,
    tenth,
)

PAIRS = (
    (PERSONAL, BACKBONE),
    (PERSONAL, LOCAL),
    (PERSONAL, GLOBAL),
    (GLOBAL, BACKBONE),
    (GLOBAL, LOCAL),
)
"""A model, and what a client would have without it."""
ROUNDING = 0.01
"""Percent: a gain or loss of less is the arithmetic's."""


@dataclass(frozen=True)
class ClientRow:
    """One client: what it has, and each model's number on its test data."""

    client: str
    train: int
    items: int
    newcomer: bool
    tested: dict[str, float]


@dataclass(frozen=True)
class Gain:
    """What a model gains its clients over another, as a distribution over them."""

    model: str
    reference: str
    newcomers: bool
    """Whether its clients are those that never took part."""
    each: dict[str, float]
    """Percent by which a client's number lies below the reference's, the least gain first."""

    @property
    def mean(self) -> float:
        """Of the clients' gains: each counts the same."""
        return fmean(self.each.values())

    @property
    def worst_decile(self) -> float:
        """Mean over the tenth of the clients that gain least (at least one)."""
        return fmean(list(self.each.values())[: tenth(len(self.each))])

    @property
    def worst_client(self) -> str:
        """Who gains least."""
        return next(iter(self.each))

    @property
    def gained(self) -> float:
        """Share of the clients whose number is lower than the reference's."""
        return fmean(gain > ROUNDING for gain in self.each.values())

    @property
    def lost(self) -> float:
        """Share of the clients whose number is higher, or no number."""
        return fmean(not gain >= -ROUNDING for gain in self.each.values())


def gains(run: RunFiles) -> list[Gain]:
    """Every pair of models that the run has, for clients that took part, then for newcomers."""
    found = []
    for newcomers in (False, True):
        models = {m: by_client(run.measure, rows) for m, rows in shared(run, newcomers).items()}
        found += [
            Gain(model, reference, newcomers, _each(models[model], models[reference]))
            for model, reference in PAIRS
            if {model, reference} <= models.keys()
        ]
    return found


def gains_over(run: RunFiles, reference: str, newcomers: bool = False) -> dict[str, Gain]:
    """Every other model's gain over one, by model; none where the run lacks that one."""
    models = {m: by_client(run.measure, rows) for m, rows in shared(run, newcomers).items()}
    return {
        model: Gain(model, reference, newcomers, _each(own, models[reference]))
        for model, own in models.items()
        if reference in models and model != reference
    }


def _each(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Percent by client; a client with a broken model has gained least."""
    found = {c: _percent(ours[c], theirs[c]) for c in ours}
    least = sorted(found, key=lambda c: -math.inf if math.isnan(found[c]) else found[c])
    return {client: found[client] for client in least}


def _percent(ours: float, theirs: float) -> float:
    return 100 * (theirs - ours) / abs(theirs) if theirs else math.nan


def signed(value: Number) -> str:
    """A difference to read."""
    return ("+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "") + number(abs(value))


def per_client(run: RunFiles) -> list[ClientRow]:
    """A row a client, in the run's order."""
    models = {model: by_client(run.measure, rows) for model, rows in by_model(run).items()}
    return [
        ClientRow(name, row["train"], row["items"], row.get("newcomer", False), found)
        for row in run.clients
        for name in [row["client"]]
        for found in [{m: each[name] for m, each in models.items() if name in each}]
    ]
