"""The loop, as in the paper's pseudo-code: a generator, so whoever iterates decides the rest."""

from collections.abc import Callable, Iterator, Sequence

import torch

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Federation
from fedgen_edge.errors import ConfigError
from fedgen_edge.jobs import Job, Training
from fedgen_edge.leaves import select
from fedgen_edge.seeds import generator
from fedgen_edge.types import Commit, Order, ServerState, Update
from fedgen_edge.uplink.transform import deliver

Engine = Callable[[Sequence[Order], Job], Iterator]
"""Has clients do a job; results come in any order, each with its own order in it."""


def cohort_size(federation: Federation, clients: int) -> int:
    """Clients that each round draws, of those that train.

    Raises:
        ConfigError: more than there are.
    """
    able = clients - federation.newcomers
    if able < 1:
        raise ConfigError(
            f"federation.newcomers={federation.newcomers} leaves none of {clients} clients to "
            "train: have fewer"
        )
    if federation.fraction is not None:
        return max(1, round(federation.fraction * able))
    size = able if federation.cohort is None else federation.cohort
    if size > able:
        raise ConfigError(
            f"federation.cohort={size} must be at most {able}, the clients that train: "
            "draw fewer, or have more clients"
        )
    return size


def sample(federation: Federation, clients: int, round_: int) -> list[int]:
    """The round's cohort, without replacement, in the clients' order."""
    rng = generator(federation.seed, "sample", round_)
    drawn = torch.randperm(clients - federation.newcomers, generator=rng)
    return sorted(drawn[: cohort_size(federation, clients)].tolist())


def rounds(
    state: ServerState,
    algorithm: Algorithm,
    engine: Engine,
    job: Training,
    federation: Federation,
) -> Iterator[Commit]:
    """Yield after each round until the federation's last.

    Args:
        state: where to go on from: `algorithm.init(task.init(...))`, or a checkpoint's.
        algorithm: what the method changes.
        engine: how clients run.
        job: what they do: `jobs.Train`.
        federation: who takes part; `clients` must be their number.
    """
    clients = federation.clients or 0
    for r in range(state.round, federation.rounds):
        cohort = sample(federation, clients, r)
        shared = algorithm.sends(list(state.adapter))
        arrived, size = deliver(select(state.adapter, shared.__contains__))
        received = {**state.adapter, **arrived}
        orders = [Order(group, r, received) for group in algorithm.groups(cohort)]
        updates = sorted(engine(orders, job), key=lambda update: update.order.clients)
        state = algorithm.step(state, updates)
        job.accepted(updates)
        yield Commit(state, updates, size * len(orders))


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss of a cohort, weighted by examples."""
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    losses = torch.tensor([u.loss for u in updates], dtype=torch.float64)
    return float((weights * losses).sum() / weights.sum())
