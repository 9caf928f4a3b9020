"""Held-out data, model by model and client by client, as sums that add up."""

import time
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment
from fedgen_edge.types import Batch, Leaves, ServerState

Sums = dict[str, float]


def sums(experiment: Experiment, adapter: Leaves, examples: Batch) -> Sums:
    """A task's statistics of one client's examples under one adapter."""
    clients = experiment.clients
    found = experiment.task.evaluate(clients.place(adapter), clients.place(examples))
    return {k: float(v) for k, v in found.items()}


def validation(
    experiment: Experiment, state: ServerState, memory: Mapping[int, Leaves]
) -> dict[str, Any]:
    """Every training client's validation data under its own model, after a round."""
    able = len(experiment.holdings) - experiment.settings.federation.newcomers
    each = {
        shard.name: sums(experiment, experiment.own(state, memory.get(c, {})), shard.validation)
        for c, shard in enumerate(experiment.clients.shards[:able])
    }
    names = dict.fromkeys(k for own in each.values() for k in own)
    total = {k: sum(own[k] for own in each.values()) for k in names}
    return {**total, "clients": {name: s["total"] / s["count"] for name, s in each.items()}}


def test(
    experiment: Experiment,
    name: str,
    state: ServerState,
    memory: Mapping[int, Leaves],
    drawn: Set[str],
) -> Iterator[dict[str, Any]]:
    """Every client's test data under what a method left it.

    Args:
        experiment: of the method.
        name: of the model, in the record.
        state: after the last round, or before the first.
        memory: what clients have kept.
        drawn: those that some round drew.
    """
    for c, shard in enumerate(experiment.clients.shards):
        began = time.perf_counter()
        found = sums(experiment, experiment.own(state, memory.get(c, {})), shard.test)
        seconds = round(time.perf_counter() - began, 3)
        yield {**tested(shard.name, name, found, drawn), "seconds": seconds}


def tested(client: str, model: str, found: Sums, drawn: Set[str]) -> dict[str, Any]:
    """A line of evaluation.jsonl."""
    return {"model": model, "client": client, "participated": client in drawn, **found}


def drawn(folder: Path) -> set[str]:
    """Clients that some round of these drew."""
    return {name for line in records.lines(folder / "rounds.jsonl") for name in line["cohort"]}
