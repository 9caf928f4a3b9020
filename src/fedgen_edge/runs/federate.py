"""The rounds of a run, on the disk: a record and a commit each, wherever its clients are."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fedgen_edge import leaves
from fedgen_edge.algorithms import ifca, scaffold
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.drift import ClientDrift, measure_drift
from fedgen_edge.algorithms.low_rank import find_pairs
from fedgen_edge.algorithms.merge_products import measure_errors, measure_sizes
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.algorithms.server_optimizers import add
from fedgen_edge.config import Settings
from fedgen_edge.errors import CheckpointError, TrainingError
from fedgen_edge.federation.jobs import Job, TrainingJob
from fedgen_edge.federation.rounds import Engine, Roster, mean_loss, rounds
from fedgen_edge.runs import records
from fedgen_edge.runs.checkpoint import ClientStateStore, commit, find_latest, prune
from fedgen_edge.types import Commit, Leaves, Order, ServerState, Update


@runtime_checkable
class FederatedExperiment(Protocol):
    """What the rounds need to know: an experiment on this machine, or sites on many."""

    @property
    def settings(self) -> Settings:
        """Resolved."""
        ...

    @property
    def algorithm(self) -> Algorithm:
        """What the method changes."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The clients', by their numbers."""
        ...

    @property
    def engine(self) -> Engine:
        """How clients run."""
        ...

    @property
    def train(self) -> TrainingJob:
        """What they do in a round."""
        ...

    def start(self) -> ServerState:
        """The server before the first round."""
        ...

    def with_client_states(self, memory: ClientStateStore) -> "FederatedExperiment":
        """The same, with what its clients have kept."""
        ...

    def cohort(self, round_: int, losses: Tensor | None) -> list[int]:
        """Who takes part in a round."""
        ...

    def validation(self, state: ServerState) -> dict[str, Any] | None:
        """Held-out sums after a round, all together and client by client; none if unknown."""
        ...


def federate(experiment: FederatedExperiment, folder: Path) -> Iterator[records.Line]:
    """Train from the last commit on; yields each round's record once it is on the disk.

    The record is written before the commit, and lines after the commit are cut off on the way
    back: so both agree, whenever the run was stopped.

    Raises:
        CheckpointError: no checkpoint is whole, or a committed round has no record.
        TrainingError: a loss is not finite; the last commit stands.
    """
    settings = experiment.settings
    state, memory, problems = find_latest(folder)
    prune(folder, memory, settings.checkpoints.keep)
    state = state or experiment.start()
    experiment = experiment.with_client_states(memory)
    log = folder / "rounds.jsonl"
    records.truncate(log, state.round)
    _check_records(log, state.round)
    tensorboard = records.TensorBoardWriter(folder) if settings.evaluation.tensorboard else None
    round_commits = rounds(
        state,
        experiment.algorithm,
        partial(_check_updates, experiment),
        experiment.train,
        settings.federation,
        Roster(experiment.cohort, settings.devices),
    )
    for message in problems:
        yield {"round": state.round, "refused": message}
    start_time, previous_adapter = time.perf_counter(), state.adapter
    for round_commit in round_commits:
        train_end = time.perf_counter()
        record = _make_round_record(experiment, round_commit, previous_adapter)
        if _is_evaluation_round(settings, round_commit.state.round):
            record["layers"] = measure_layers(experiment.algorithm, round_commit)
            record["validation"] = experiment.validation(round_commit.state)
        record["seconds"] = round(train_end - start_time, 3)
        record["evaluate_seconds"] = round(time.perf_counter() - train_end, 3)
        records.append(log, record)
        commit(folder, round_commit.state, memory, settings.checkpoints.keep)
        if tensorboard:
            tensorboard.write(record)
        yield record
        start_time, previous_adapter = time.perf_counter(), round_commit.state.adapter


def _check_records(log: Path, committed: int) -> None:
    """Refuse to go on where a committed round has no record: one is written before each commit."""
    recorded = [line["round"] for line in records.iter_lines(log)]
    missing = [
        number
        for at, number in enumerate(range(1, committed + 1))
        if recorded[at : at + 1] != [number]
    ]
    if missing:
        raise CheckpointError(
            f"{log} lacks the record of round {missing[0]}, which is committed: restore "
            "the file, or "
            "begin another run"
        )


def _check_updates(
    experiment: FederatedExperiment, orders: Sequence[Order], job: Job
) -> Iterator[Update]:
    """The engine's updates, each looked at before anything is made of it.

    Raises:
        TrainingError: a client's loss, change or memory is not finite.
    """
    updates: Iterator[Update] = experiment.engine(orders, job)
    try:
        for update in updates:
            _check_finite(update, experiment.names)
            yield update
    except TrainingError as error:
        raise TrainingError(f"{error}: lower {_list_remedies(experiment)}") from None


def _check_finite(update: Update, names: Sequence[str]) -> None:
    magnitudes = (
        update.loss,
        get_update_norm(update),
        *map(_sum_magnitudes, update.memory.values()),
    )
    if not all(map(math.isfinite, magnitudes)):
        client_names = "+".join(names[c] for c in update.order.clients)
        raise TrainingError(
            f"round {update.order.round + 1}, client {client_names}: training left the "
            "finite numbers "
            f"(its loss was {update.loss})"
        )


def _list_remedies(experiment: FederatedExperiment) -> str:
    """The settings that keep training finite, of those that the method has."""
    settings, training = experiment.settings, experiment.settings.training
    clipping = replace(settings, training=replace(training, clip=1.0))
    remedies = {
        f"training.lr={training.lr}": True,
        "or method.server_lr": experiment.algorithm.steps not in {add, scaffold.steps},
        "or clip by training.clip": METHODS[settings.method.name].find_conflict(clipping) is None,
    }
    return ", ".join(way for way, there in remedies.items() if there)


def get_update_norm(update: Update) -> float:
    """How large a client's change is, leaf by leaf as it was sent."""
    if update.client_norm is not None:
        return update.client_norm
    return float(leaves.norm(update.delta)) if update.delta else 0.0


def _is_evaluation_round(settings: Settings, round_: int) -> bool:
    return round_ % settings.evaluation.every_rounds == 0 or round_ == settings.federation.rounds


def _make_round_record(
    experiment: FederatedExperiment, round_commit: Commit, previous_adapter: Leaves
) -> records.Line:
    """What rounds.jsonl says of a round."""
    names, timing = experiment.names, round_commit.timing
    algorithm = experiment.algorithm
    cluster_choices = (
        ifca.assign_clusters(previous_adapter, round_commit.updates)
        if algorithm.clusters and round_commit.updates
        else None
    )
    drift = measure_round_drift(algorithm, round_commit, previous_adapter)
    client_drifts = drift.client_norms if drift else [None] * len(round_commit.updates)
    clients = [
        {
            "client": "+".join(names[c] for c in u.order.clients),
            "loss": u.loss,
            "steps": u.steps,
            "weight": u.weight,
            "bytes_up": u.bytes_up,
            "norm": get_update_norm(u),
            "drift": client_drifts[at],
            **({"rank": u.order.rank} if u.order.rank else {}),
            **({"cluster": cluster_choices[at]} if cluster_choices else {}),
        }
        for at, u in enumerate(round_commit.updates)
    ]
    change = leaves.norm(leaves.subtract(round_commit.state.adapter, previous_adapter))
    return {
        **_make_timing_record(experiment, round_commit),
        "round": round_commit.state.round,
        "cohort": [names[c] for u in round_commit.updates for c in u.order.clients],
        "loss": mean_loss(round_commit.updates) if round_commit.updates else None,
        "validation": None,
        "bytes_up": sum(u.bytes_up for u in round_commit.updates)
        + (timing.bytes_up if timing else 0),
        "bytes_down": round_commit.bytes_down,
        "clients": clients,
        "update_norm": float(change),
        "mean_norm": drift and drift.mean_norm,
    }


def _make_timing_record(experiment: FederatedExperiment, round_commit: Commit) -> records.Line:
    """What the virtual clock says of a round, where there is one."""
    if round_commit.timing is None:
        return {}
    dropped = [experiment.names[c] for c in round_commit.timing.dropped]
    return {"clock": round_commit.timing.clock, "dropped": dropped}


def measure_layers(algorithm: Algorithm, round_commit: Commit) -> dict[str, dict[str, float]]:
    """Of each layer's product: how large, and how far from the clients' mean one if they sent both.

    A layer of which clients keep a factor of their own is left out: the server's product is
    nobody's. Of updates that began from older versions the mean is no adapter's aim, and of
    clusters it is none's. Workers that send means alone do not tell the products.
    """
    sent_updates, adapter = (
        [update for update in round_commit.updates if update.delta],
        round_commit.state.adapter,
    )
    if not sent_updates:
        return {}
    round_ = round_commit.state.round - 1
    local_leaves = _list_local_leaves(algorithm, adapter, round_)
    has_common_start = all(u.order.round == round_ and u.client_norm is None for u in sent_updates)
    has_common_start = has_common_start and not algorithm.clusters
    merge_errors = (
        measure_errors(sent_updates, adapter)
        if has_common_start and find_pairs(sent_updates[0].delta)
        else {}
    )
    layer_sizes = measure_sizes(adapter)
    layer_names = {
        p.layer for p in find_pairs(adapter) if not local_leaves & {*p}
    } & layer_sizes.keys()
    return {
        layer: {
            **({"error": merge_errors[layer]} if layer in merge_errors else {}),
            **layer_sizes[layer]._asdict(),
        }
        for layer in sorted(layer_names)
    }


def measure_round_drift(
    algorithm: Algorithm, round_commit: Commit, previous_adapter: Leaves
) -> ClientDrift | None:
    """How far the round's clients moved in effective weights; none where nobody can tell."""
    if not round_commit.updates:
        return None
    local_leaves = _list_local_leaves(algorithm, previous_adapter, round_commit.state.round - 1)
    shared_leaves = leaves.select(previous_adapter, lambda name: name not in local_leaves)
    return measure_drift(
        [ifca.strip_update_prefix(update) for update in round_commit.updates], shared_leaves
    )


def _list_local_leaves(algorithm: Algorithm, adapter: Leaves, round_: int) -> set[str]:
    """Leaves that each client trains and keeps: the server's are nobody's."""
    sent_names = algorithm.sends(list(adapter), None)
    return {k for k in adapter if k not in sent_names and algorithm.trains(k, round_, 0)}


def _sum_magnitudes(leaf: Tensor) -> float:
    return float(leaf.abs().sum())
