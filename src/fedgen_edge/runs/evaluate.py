"""Held-out data, model by model and client by client, as sums that add up."""

import time
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from fedgen_edge.runs import records
from fedgen_edge.runs.build import Experiment, Sums, with_method
from fedgen_edge.runs.checkpoint import load_latest
from fedgen_edge.types import Leaves, ServerState


class MethodResult(NamedTuple):
    """What a method left its clients."""

    model: str
    """Its name in the records."""
    experiment: Experiment
    """Of the method."""
    state: ServerState
    """After the last round, or before the first."""
    memory: Mapping[int, Leaves]
    """What clients have kept."""
    cohort_members: Set[str]
    """Clients that some round drew."""

    def adapter(self, client: int) -> Leaves:
        """What a client has: of this run's method the shared model, of a baseline its own."""
        memory = self.memory.get(client, {})
        received = self.experiment.get_client_model(self.state, memory, client)
        return (
            received
            if self.model == "global"
            else self.experiment.algorithm.get_personal_model(received, memory)
        )


def list_models(experiment: Experiment) -> list[str]:
    """What a run's rounds leave, in the order of its tables; personal models come after them."""
    shared = ["global"] if experiment.has_global else []
    return ["backbone", *experiment.settings.evaluation.baselines, *shared]


def load_method_result(experiment: Experiment, run: Path, model: str) -> MethodResult:
    """What clients have of one of these models."""
    if model in experiment.settings.evaluation.baselines:
        folder = run / "baselines" / model
        return MethodResult(
            model,
            with_method(experiment, model),
            *load_latest(folder),
            records.list_cohort_members(folder),
        )
    if model == "backbone":
        initial_state = ServerState(0, experiment.task.model.get_backbone_leaves())
        return MethodResult(model, experiment, initial_state, {}, records.list_cohort_members(run))
    return MethodResult(model, experiment, *load_latest(run), records.list_cohort_members(run))


def test(result: MethodResult) -> Iterator[dict[str, Any]]:
    """Every client's test data under what a method left it."""
    shards, start_time = result.experiment.clients.shards, time.perf_counter()
    model_batches = ((result.adapter(c), shard.test) for c, shard in enumerate(shards))
    for shard, sums in zip(shards, result.experiment.evaluate_clients(model_batches), strict=True):
        seconds = round(time.perf_counter() - start_time, 3)
        yield {
            **make_test_record(shard.name, result.model, sums, result.cohort_members),
            "seconds": seconds,
        }
        start_time = time.perf_counter()


def make_test_record(
    client: str, model: str, sums: Sums, cohort_members: Set[str]
) -> dict[str, Any]:
    """A line of evaluation.jsonl."""
    return {"model": model, "client": client, "participated": client in cohort_members, **sums}
