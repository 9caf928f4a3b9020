"""Held-out data, model by model and client by client, as sums that add up."""

import time
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment, Sums, beside
from fedgen_edge.experiments.checkpoint import last
from fedgen_edge.types import Leaves, ServerState


class Left(NamedTuple):
    """What a method left its clients."""

    model: str
    """Its name in the records."""
    experiment: Experiment
    """Of the method."""
    state: ServerState
    """After the last round, or before the first."""
    memory: Mapping[int, Leaves]
    """What clients have kept."""
    drawn: Set[str]
    """Clients that some round drew."""

    def adapter(self, client: int) -> Leaves:
        """What a client has: of this run's method the shared model, of a baseline its own."""
        memory = self.memory.get(client, {})
        shared = self.experiment.own(self.state, memory, client)
        return shared if self.model == "global" else self.experiment.algorithm.own(shared, memory)


def models(experiment: Experiment) -> list[str]:
    """What a run's rounds leave, in the order of its tables; personal models come after them."""
    shared = ["global"] if experiment.has_global else []
    return ["backbone", *experiment.settings.evaluation.baselines, *shared]


def left(experiment: Experiment, run: Path, model: str) -> Left:
    """What clients have of one of these models."""
    if model in experiment.settings.evaluation.baselines:
        folder = run / "baselines" / model
        return Left(model, beside(experiment, model), *last(folder), records.drawn(folder))
    if model == "backbone":
        untouched = ServerState(0, experiment.task.model.backbone())
        return Left(model, experiment, untouched, {}, records.drawn(run))
    return Left(model, experiment, *last(run), records.drawn(run))


def test(found: Left) -> Iterator[dict[str, Any]]:
    """Every client's test data under what a method left it."""
    shards, began = found.experiment.clients.shards, time.perf_counter()
    held = ((found.adapter(c), shard.test) for c, shard in enumerate(shards))
    for shard, added in zip(shards, found.experiment.sums_of(held), strict=True):
        seconds = round(time.perf_counter() - began, 3)
        yield {**tested(shard.name, found.model, added, found.drawn), "seconds": seconds}
        began = time.perf_counter()


def tested(client: str, model: str, found: Sums, drawn: Set[str]) -> dict[str, Any]:
    """A line of evaluation.jsonl."""
    return {"model": model, "client": client, "participated": client in drawn, **found}
