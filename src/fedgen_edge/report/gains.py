"""What each client gains from a run, and the distribution of gains over clients."""

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
"""Pairs of a model and the reference that a client would have without it."""
MIN_GAIN = 0.01
"""Percent: a smaller gain or loss is rounding error."""


@dataclass(frozen=True)
class ClientRow:
    """One client: its examples, and each model's metric on its test data."""

    client: str
    train: int
    items: int
    newcomer: bool
    test_results: dict[str, float]


@dataclass(frozen=True)
class Gain:
    """A model's gains over a reference, as a distribution over clients."""

    model: str
    reference: str
    newcomers: bool
    """Whether the clients are held-out ones, which never took part."""
    gain_by_client: dict[str, float]
    """Percent by which a client's metric lies below the reference's, the smallest gain first."""

    @property
    def mean(self) -> float:
        """Mean of the clients' gains, unweighted."""
        return fmean(self.gain_by_client.values())

    @property
    def worst_decile(self) -> float:
        """Mean over the tenth of the clients with the smallest gains (at least one)."""
        return fmean(list(self.gain_by_client.values())[: tenth(len(self.gain_by_client))])

    @property
    def worst_client(self) -> str:
        """The client with the smallest gain."""
        return next(iter(self.gain_by_client))

    @property
    def share_gained(self) -> float:
        """Fraction of the clients whose metric is lower than the reference's."""
        return fmean(gain > MIN_GAIN for gain in self.gain_by_client.values())

    @property
    def share_lost(self) -> float:
        """Fraction of the clients whose metric is higher, or nan."""
        return fmean(not gain >= -MIN_GAIN for gain in self.gain_by_client.values())


def gains(run: RunFiles) -> list[Gain]:
    """List every pair of models that the run has, for participants, then for held-out clients."""
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
    """Return every other model's gain over the reference; empty if the run lacks it."""
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
    """Return the percent gained by client; a client with a broken model has the smallest gain."""
    percents = {c: _percent(values[c], reference_values[c]) for c in values}
    ascending = sorted(
        percents, key=lambda c: -math.inf if math.isnan(percents[c]) else percents[c]
    )
    return {client: percents[client] for client in ascending}


def _percent(value: float, reference: float) -> float:
    return 100 * (reference - value) / abs(reference) if reference else math.nan


def format_signed(value: Number) -> str:
    """Format a difference with its sign."""
    return ("+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "") + number(abs(value))


def make_client_rows(run: RunFiles) -> list[ClientRow]:
    """Make a row per client, in the run's order."""
    models = {model: by_client(run.measure, rows) for model, rows in by_model(run).items()}
    return [
        ClientRow(name, row["train"], row["items"], row.get("newcomer", False), found)
        for row in run.clients
        for name in [row["client"]]
        for found in [{m: each[name] for m, each in models.items() if name in each}]
    ]
