"""Held-out data, model by model and client by client, as sums that add up."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

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
    experiment: Experiment, name: str, state: ServerState, memory: Mapping[int, Leaves]
) -> Iterator[dict[str, Any]]:
    """Every client's test data under what a method left it."""
    for c, shard in enumerate(experiment.clients.shards):
        began = time.perf_counter()
        found = sums(experiment, experiment.own(state, memory.get(c, {})), shard.test)
        seconds = round(time.perf_counter() - began, 3)
        yield {**tested(experiment, name, c, found), "seconds": seconds}


def tested(experiment: Experiment, model: str, client: int, found: Sums) -> dict[str, Any]:
    """A line of evaluation.jsonl."""
    name = experiment.clients.shards[client].name
    took_part = client in experiment.participants
    return {"model": model, "client": name, "participated": took_part, **found}
