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
from fedgen_edge.algorithms import clusters, variates
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.effective import Moves, moves
from fedgen_edge.algorithms.factors import pairs
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.algorithms.products import errors, sizes
from fedgen_edge.algorithms.step import add
from fedgen_edge.config import Settings
from fedgen_edge.errors import CheckpointError, TrainingError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.checkpoint import Memory, commit, latest, prune
from fedgen_edge.jobs import Job, Training
from fedgen_edge.rounds import Engine, Roster, mean_loss, rounds
from fedgen_edge.types import Commit, Leaves, Order, ServerState, Update


@runtime_checkable
class Federated(Protocol):
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
    def train(self) -> Training:
        """What they do in a round."""
        ...

    def start(self) -> ServerState:
        """The server before the first round."""
        ...

    def remembering(self, memory: Memory) -> "Federated":
        """The same, with what its clients have kept."""
        ...

    def cohort(self, round_: int, losses: Tensor | None) -> list[int]:
        """Who takes part in a round."""
        ...

    def validation(self, state: ServerState) -> dict[str, Any] | None:
        """Held-out sums after a round, all together and client by client; none if unknown."""
        ...


def federate(experiment: Federated, folder: Path) -> Iterator[records.Line]:
    """Train from the last commit on; yields each round's record once it is on the disk.

    The record is written before the commit, and lines after the commit are cut off on the way
    back: so both agree, whenever the run was stopped.

    Raises:
        CheckpointError: no checkpoint is whole, or a committed round has no record.
        TrainingError: a loss is not finite; the last commit stands.
    """
    settings = experiment.settings
    state, memory, refused = latest(folder)
    prune(folder, memory, settings.evaluation.keep)
    state = state or experiment.start()
    experiment = experiment.remembering(memory)
    log = folder / "rounds.jsonl"
    records.truncate(log, state.round)
    _check_records(log, state.round)
    board = records.Board(folder) if settings.evaluation.tensorboard else None
    loop = rounds(
        state,
        experiment.algorithm,
        partial(_finite, experiment),
        experiment.train,
        settings.federation,
        Roster(experiment.cohort, settings.devices),
    )
    for message in refused:
        yield {"round": state.round, "refused": message}
    began, before = time.perf_counter(), state.adapter
    for done in loop:
        trained = time.perf_counter()
        line = _line(experiment, done, before)
        if _judged(settings, done.state.round):
            line["layers"] = layers(experiment.algorithm, done)
            line["validation"] = experiment.validation(done.state)
        line["seconds"] = round(trained - began, 3)
        line["evaluate_seconds"] = round(time.perf_counter() - trained, 3)
        records.append(log, line)
        commit(folder, done.state, memory, settings.evaluation.keep)
        if board:
            board.write(line)
        yield line
        began, before = time.perf_counter(), done.state.adapter


def _check_records(log: Path, committed: int) -> None:
    """Refuse to go on where a committed round has no record: one is written before each commit."""
    there = [line["round"] for line in records.each(log)]
    lost = [
        number
        for at, number in enumerate(range(1, committed + 1))
        if there[at : at + 1] != [number]
    ]
    if lost:
        raise CheckpointError(
            f"{log} lacks the record of round {lost[0]}, which is committed: restore the file, or "
            "begin another run"
        )


def _finite(experiment: Federated, orders: Sequence[Order], job: Job) -> Iterator[Update]:
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
        raise TrainingError(f"{error}: lower {_ways_out(experiment)}") from None


def _check_finite(update: Update, names: Sequence[str]) -> None:
    sizes = (update.loss, sent_norm(update), *map(_size, update.memory.values()))
    if not all(map(math.isfinite, sizes)):
        who = "+".join(names[c] for c in update.order.clients)
        raise TrainingError(
            f"round {update.order.round + 1}, client {who}: training left the finite numbers "
            f"(its loss was {update.loss})"
        )


def _ways_out(experiment: Federated) -> str:
    """The settings that keep training finite, of those that the method has."""
    settings, training = experiment.settings, experiment.settings.training
    clipping = replace(settings, training=replace(training, clip=1.0))
    ways = {
        f"training.lr={training.lr}": True,
        "or method.server_lr": experiment.algorithm.steps not in {add, variates.steps},
        "or clip by training.clip": METHODS[settings.method.name].needs(clipping) is None,
    }
    return ", ".join(way for way, there in ways.items() if there)


def sent_norm(update: Update) -> float:
    """How large a client's change is, leaf by leaf as it was sent."""
    if update.moved is not None:
        return update.moved
    return float(leaves.norm(update.delta)) if update.delta else 0.0


def _judged(settings: Settings, done: int) -> bool:
    return done % settings.evaluation.every == 0 or done == settings.federation.rounds


def _line(experiment: Federated, done: Commit, before: Leaves) -> records.Line:
    """What rounds.jsonl says of a round."""
    names, t = experiment.names, done.timing
    algorithm = experiment.algorithm
    taken = clusters.taken(before, done.updates) if algorithm.clusters and done.updates else None
    moved = drifts(algorithm, done, before)
    own = moved.own if moved else [None] * len(done.updates)
    clients = [
        {
            "client": "+".join(names[c] for c in u.order.clients),
            "loss": u.loss,
            "steps": u.steps,
            "weight": u.weight,
            "bytes_up": u.bytes_up,
            "norm": sent_norm(u),
            "drift": own[at],
            **({"rank": u.order.rank} if u.order.rank else {}),
            **({"cluster": taken[at]} if taken else {}),
        }
        for at, u in enumerate(done.updates)
    ]
    change = leaves.norm(leaves.subtract(done.state.adapter, before))
    return {
        **_timed(experiment, done),
        "round": done.state.round,
        "cohort": [names[c] for u in done.updates for c in u.order.clients],
        "loss": mean_loss(done.updates) if done.updates else None,
        "validation": None,
        "bytes_up": sum(u.bytes_up for u in done.updates) + (t.bytes_up if t else 0),
        "bytes_down": done.bytes_down,
        "clients": clients,
        "update_norm": float(change),
        "mean_norm": moved and moved.together,
    }


def _timed(experiment: Federated, done: Commit) -> records.Line:
    """What the virtual clock says of a round, where there is one."""
    if done.timing is None:
        return {}
    dropped = [experiment.names[c] for c in done.timing.dropped]
    return {"clock": done.timing.clock, "dropped": dropped}


def layers(algorithm: Algorithm, done: Commit) -> dict[str, dict[str, float]]:
    """Of each layer's product: how large, and how far from the clients' mean one if they sent both.

    A layer of which clients keep a factor of their own is left out: the server's product is
    nobody's. Of updates that began from older versions the mean is no adapter's aim, and of
    clusters it is none's. Workers that send means alone do not tell the products.
    """
    sent, adapter = [update for update in done.updates if update.delta], done.state.adapter
    if not sent:
        return {}
    round_ = done.state.round - 1
    own = _own(algorithm, adapter, round_)
    fresh = all(u.order.round == round_ and u.moved is None for u in sent)
    fresh = fresh and not algorithm.clusters
    missed = errors(sent, adapter) if fresh and pairs(sent[0].delta) else {}
    found = sizes(adapter)
    whole = {p.layer for p in pairs(adapter) if not own & {*p}} & found.keys()
    return {
        layer: {**({"error": missed[layer]} if layer in missed else {}), **found[layer]._asdict()}
        for layer in sorted(whole)
    }


def drifts(algorithm: Algorithm, done: Commit, before: Leaves) -> Moves | None:
    """How far the round's clients moved in effective weights; none where nobody can tell."""
    if not done.updates:
        return None
    own = _own(algorithm, before, done.state.round - 1)
    known = leaves.select(before, lambda name: name not in own)
    return moves([clusters.bare(update) for update in done.updates], known)


def _own(algorithm: Algorithm, adapter: Leaves, round_: int) -> set[str]:
    """Leaves that each client trains and keeps: the server's are nobody's."""
    shared = algorithm.sends(list(adapter), None)
    return {k for k in adapter if k not in shared and algorithm.trains(k, round_, 0)}


def _size(leaf: Tensor) -> float:
    return float(leaf.abs().sum())
