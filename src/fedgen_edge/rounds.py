"""The loop, as in the paper's pseudo-code: a generator, so whoever iterates decides the rest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Federation
from fedgen_edge.errors import ConfigError
from fedgen_edge.jobs import Job, Training
from fedgen_edge.seeds import generator
from fedgen_edge.types import Commit, Order, ServerState, Update
from fedgen_edge.uplink.transform import decode, encode

LOSSES = "losses"
"""Where the server keeps every client's last training loss."""
Engine = Callable[[Sequence[Order], Job], Iterator]
"""Has clients do a job; results come in any order, each with its own order in it."""
Draw = Callable[[int, Tensor | None], list[int]]
"""The cohort of a round, in the clients' order, from its number and every client's last loss."""


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
    size = able if federation.cohort is None else federation.cohort
    if federation.fraction is not None:
        size = max(1, round(federation.fraction * able))
    if size > able:
        raise ConfigError(
            f"federation.cohort={size} must be at most {able}, the clients that train: "
            "draw fewer, or have more clients"
        )
    few = federation.candidates
    if few is not None and not size <= few <= able:
        raise ConfigError(
            f"federation.candidates={few} must be from {size}, the cohort, to {able}, the clients "
            "that train: set federation.cohort below it"
        )
    return size


def sample(
    federation: Federation, clients: int, round_: int, losses: Tensor | None = None
) -> list[int]:
    """The round's cohort, without replacement, in the clients' order.

    Args:
        federation: who takes part; where it names candidates, the cohort is those of them whose
            loss is highest.
        clients: how many there are.
        round_: counted from 0.
        losses: each client's last training loss, `[clients]`, infinite of one that never trained;
            none is before the first round.

    Source: of candidates, Cho et al. 2020, Power-of-Choice (arXiv:2010.01243), the variant whose
    losses are those of clients' last rounds, so that nothing more is sent.
    Differs: candidates are drawn evenly, not by their share of the data.
    """
    rng = generator(federation.seed, "sample", round_)
    drawn = torch.randperm(clients - federation.newcomers, generator=rng)
    size = cohort_size(federation, clients)
    if federation.candidates is not None and losses is not None:
        few = drawn[: federation.candidates]
        drawn = few[losses[few].argsort(descending=True, stable=True)]
    return sorted(drawn[:size].tolist())


def remembered(state: ServerState, updates: Sequence[Update], clients: int) -> ServerState:
    """The state with the cohort's training losses, by which a later cohort is chosen."""
    losses = state.memory.get(LOSSES, torch.full((clients,), torch.inf)).clone()
    for update in updates:
        losses[list(update.order.clients)] = update.loss
    return replace(state, memory={**state.memory, LOSSES: losses})


def rounds(
    state: ServerState,
    algorithm: Algorithm,
    engine: Engine,
    job: Training,
    federation: Federation,
    draw: Draw | None = None,
) -> Iterator[Commit]:
    """Yield after each round until the federation's last.

    Args:
        state: where to go on from: `algorithm.init(task.init(...))`, or a checkpoint's.
        algorithm: what the method changes.
        engine: how clients run.
        job: what they do: `jobs.Train`.
        federation: who takes part; `clients` must be their number.
        draw: each round's cohort, where it is not `sample`'s.

    Raises:
        QuorumError: the engine had too few answers; the last commit stands.
    """
    clients = federation.clients or 0
    draw = draw or partial(sample, federation, clients)
    for r in range(state.round, federation.rounds):
        cohort = draw(r, state.memory.get(LOSSES))
        among, strides = job.members() - federation.newcomers, job.strides(r)
        payload = encode(algorithm.worded(state, among))
        received = {**state.adapter, **decode(payload)}
        groups = algorithm.groups(cohort)
        orders = [Order(group, r, received, payload, among, strides) for group in groups]
        updates = sorted(engine(orders, job), key=lambda update: update.order.clients)
        state = algorithm.step(state, updates)
        if federation.candidates is not None:
            state = remembered(state, updates, clients)
        job.accepted(updates)
        yield Commit(state, updates, sum(len(order.payload) for order in orders))


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss of a cohort, weighted by examples."""
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    losses = torch.tensor([u.loss for u in updates], dtype=torch.float64)
    return float((weights * losses).sum() / weights.sum())
