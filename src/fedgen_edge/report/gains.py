"""What each client has of a run, and its gains as a distribution over clients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from fedgen_edge.report.summary import (
    BACKBONE,
    GLOBAL,
    LOCAL,
    PERSONAL,
    Number,
    RunFiles,
    by_client,
    by_model,
    select_common_rows,
    tenth,
)
from fedgen_edge.runs.formatting import number

MODEL_PAIRS = (
    (PERSONAL, BACKBONE),
    (PERSONAL, LOCAL),
    (PERSONAL, GLOBAL),
    (GLOBAL, BACKBONE),
    (GLOBAL, LOCAL),
)
"""A model, and what a client would have without it."""
MIN_GAIN = 0.01
"""Percent: a gain or loss of less is the arithmetic's."""


@dataclass(frozen=True)
class ClientRow:
    """One client: what it has, and each model's number on its test data."""

    client: str
    train: int
    items: int
    newcomer: bool
    test_results: dict[str, float]


@dataclass(frozen=True)
class Gain:
    """What a model gains its clients over another, as a distribution over them."""

    model: str
    reference: str
    newcomers: bool
    """Whether its clients are those that never took part."""
    gain_by_client: dict[str, float]
    """Percent by which a client's number lies below the reference's, the least gain first."""

    @property
    def mean(self) -> float:
        """Of the clients' gains: each counts the same."""
        return fmean(self.gain_by_client.values())

    @property
    def worst_decile(self) -> float:
        """Mean over the tenth of the clients that gain least (at least one)."""
        return fmean(list(self.gain_by_client.values())[: tenth(len(self.gain_by_client))])

    @property
    def worst_client(self) -> str:
        """Who gains least."""
        return next(iter(self.gain_by_client))

    @property
    def share_gained(self) -> float:
        """Share of the clients whose number is lower than the reference's."""
        return fmean(gain > MIN_GAIN for gain in self.gain_by_client.values())

    @property
    def share_lost(self) -> float:
        """Share of the clients whose number is higher, or no number."""
        return fmean(not gain >= -MIN_GAIN for gain in self.gain_by_client.values())


def gains(run: RunFiles) -> list[Gain]:
    """Every pair of models that the run has, for clients that took part, then for newcomers."""
    all_gains = []
    for newcomers in (False, True):
        models = {
            m: by_client(run.measure, rows)
            for m, rows in select_common_rows(run, newcomers).items()
        }
        all_gains += [
            Gain(model, reference, newcomers, _compute_gains(models[model], models[reference]))
            for model, reference in MODEL_PAIRS
            if {model, reference} <= models.keys()
        ]
    return all_gains


def gains_over(run: RunFiles, reference: str, newcomers: bool = False) -> dict[str, Gain]:
    """Every other model's gain over one, by model; none where the run lacks that one."""
    models = {
        m: by_client(run.measure, rows) for m, rows in select_common_rows(run, newcomers).items()
    }
    return {
        model: Gain(model, reference, newcomers, _compute_gains(own, models[reference]))
        for model, own in models.items()
        if reference in models and model != reference
    }


def _compute_gains(
    values: Mapping[str, float], reference_values: Mapping[str, float]
) -> dict[str, float]:
    """Percent by client; a client with a broken model has gained least."""
    percents = {c: _percent(values[c], reference_values[c]) for c in values}
    ascending = sorted(
        percents, key=lambda c: -math.inf if math.isnan(percents[c]) else percents[c]
    )
    return {client: percents[client] for client in ascending}


def _percent(value: float, reference: float) -> float:
    return 100 * (reference - value) / abs(reference) if reference else math.nan


def format_signed(value: Number) -> str:
    """A difference to read."""
    return ("+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "") + number(abs(value))


def make_client_rows(run: RunFiles) -> list[ClientRow]:
    """A row a client, in the run's order."""
    models = {model: by_client(run.measure, rows) for model, rows in by_model(run).items()}
    return [
        ClientRow(name, row["train"], row["items"], row.get("newcomer", False), found)
        for row in run.clients
        for name in [row["client"]]
        for found in [{m: each[name] for m, each in models.items() if name in each}]
    ]
