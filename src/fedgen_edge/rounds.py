"""The loop, as in the paper's pseudo-code: a generator, so whoever iterates decides the rest."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence

import torch

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.client import Job
from fedgen_edge.config import Federation
from fedgen_edge.errors import ConfigError
from fedgen_edge.leaves import select
from fedgen_edge.seeds import generator
from fedgen_edge.types import Commit, Leaves, Order, ServerState, Update
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
    job: Job,
    federation: Federation,
    memory: MutableMapping[int, Leaves],
) -> Iterator[Commit]:
    """Yield after each round until the federation's last.

    Args:
        state: where to go on from: `algorithm.init(task.init(...))`, or a checkpoint's.
        algorithm: what the method changes.
        engine: how clients run.
        job: what they do: `client.Train`.
        federation: who takes part; `clients` must be their number.
        memory: what each client keeps, `{}` where it has kept nothing yet; written here.
    """
    clients = federation.clients or 0
    for r in range(state.round, federation.rounds):
        cohort = sample(federation, clients, r)
        shared, size = deliver(
            select(state.adapter, algorithm.sends(list(state.adapter)).__contains__)
        )
        received = {**state.adapter, **shared}
        orders = [
            _order(algorithm, received, memory, group, r) for group in algorithm.groups(cohort)
        ]
        updates = sorted(engine(orders, job), key=lambda update: update.order.clients)
        state = algorithm.step(state, updates)
        for update in updates:
            if update.memory:
                memory[update.order.clients[0]] = update.memory
        yield Commit(state, updates, size * len(orders))


def _order(
    algorithm: Algorithm,
    received: Leaves,
    memory: MutableMapping[int, Leaves],
    group: tuple[int, ...],
    round_: int,
) -> Order:
    own = memory.get(group[0], {})
    return Order(group, round_, algorithm.receives(received, own), own)


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss of a cohort, weighted by examples."""
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    losses = torch.tensor([u.loss for u in updates], dtype=torch.float64)
    return float((weights * losses).sum() / weights.sum())
