"""The loop, as in the paper's pseudo-code: a generator, so whoever iterates decides the rest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedgen_edge import schedule
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.buffered import Buffered
from fedgen_edge.config import Devices, Federation
from fedgen_edge.jobs import Engine, Training
from fedgen_edge.orders import stint, wording
from fedgen_edge.schedule import INSTANT, asked_size, cohort_size, take_time
from fedgen_edge.seeds import generator
from fedgen_edge.types import Commit, Order, ServerState, Timing, Update

LOSSES = "losses"
"""Where the server keeps every client's last training loss."""
Draw = Callable[[int, Tensor | None], list[int]]
"""Whom a round asks, in the clients' order, from its number and every client's last loss."""


class Roster(NamedTuple):
    """Who can be asked, and how fast they are."""

    draw: Draw | None = None
    """Whom each round asks; none is `sample`."""
    devices: Devices = INSTANT


ANYBODY = Roster()


def present(federation: Federation, clients: int, devices: Devices, round_: int) -> list[int]:
    """Clients that can be drawn in a round, in the order of its draw."""
    seed = federation.seed
    rng = generator(seed, "sample", round_)
    order = torch.randperm(clients - federation.newcomers, generator=rng).tolist()
    return [c for c in order if schedule.available(devices, seed, round_, c)]


def sample(
    federation: Federation,
    clients: int,
    round_: int,
    losses: Tensor | None = None,
    devices: Devices = INSTANT,
) -> list[int]:
    """Whom the round asks, without replacement, in the clients' order.

    Args:
        federation: who takes part; where it names candidates, those of them whose loss is highest
            are asked.
        clients: how many there are.
        round_: counted from 0.
        losses: each client's last training loss, `[clients]`, infinite of one that never trained;
            none is before the first round.
        devices: how often clients can be drawn.

    Source: of candidates, Cho et al. 2020, Power-of-Choice (arXiv:2010.01243), the variant whose
    losses are those of clients' last rounds, so that nothing more is sent.
    Differs: candidates are drawn evenly, not by their share of the data.
    """
    drawn = torch.tensor(present(federation, clients, devices, round_), dtype=torch.long)
    size = asked_size(federation, cohort_size(federation, clients), clients)
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
    roster: Roster = ANYBODY,
) -> Iterator[Commit]:
    """Yield after each round until the federation's last.

    A round that nobody finishes changes nothing but the time.

    Args:
        state: where to go on from: `algorithm.init(task.init(...))`, or a checkpoint's.
        algorithm: what the method changes.
        engine: how clients run.
        job: what they do: `jobs.Train`.
        federation: who takes part; `clients` must be their number.
        roster: whom each round asks, and their devices.

    Raises:
        QuorumError: the engine had too few answers; the last commit stands.
    """
    clients = federation.clients or 0
    if algorithm.buffer:
        at_once = cohort_size(federation, clients)
        free = partial(present, federation, clients, roster.devices)
        server = Buffered(algorithm, engine, job, federation, roster.devices, at_once, free)
        yield from server.commits(state)
        return
    draw = roster.draw or partial(sample, federation, clients, devices=roster.devices)
    for r in range(state.round, federation.rounds):
        asked = draw(r, state.memory.get(LOSSES))
        order = wording(algorithm, job, state, job.members() - federation.newcomers)
        each = {client: order((client,)) for client in asked}
        cohort, timing = asked, None
        if take_time(roster.devices):
            racing = [*each.values()]
            cohort, timing = _raced(state, algorithm, job, federation, roster.devices, racing)
        groups = algorithm.groups(cohort) if cohort else []
        orders = [order(group) for group in groups]
        updates = sorted(engine(orders, job), key=lambda update: update.order.clients)
        state = algorithm.step(state, updates) if updates else replace(state, round=r + 1)
        if federation.candidates is not None:
            state = remembered(state, updates, clients)
        down = sum(len(order.payload) for order in orders)
        if timing:
            state = replace(state, memory=schedule.ticked(state.memory, timing.clock))
            down += sum(len(each[client].payload) for client in timing.dropped)
        job.accepted(updates)
        yield Commit(state, updates, down, timing)


def _raced(
    state: ServerState,
    algorithm: Algorithm,
    job: Training,
    federation: Federation,
    devices: Devices,
    orders: Sequence[Order],
) -> tuple[list[int], Timing]:
    """Who of those asked makes the cohort, and when: each client by itself, pooled data or not."""
    stints = [
        stint(
            algorithm,
            job,
            devices,
            order,
            schedule.luck(federation.seed, order.round, order.clients[0]),
        )
        for order in orders
    ]
    wanted = cohort_size(federation, federation.clients or 0)
    done = schedule.race(stints, wanted, federation.deadline)
    clock = schedule.clock_of(state.memory) + done.seconds
    return done.cohort, Timing(clock, done.dropped, done.bytes_up)


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss of a cohort, weighted by examples."""
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    losses = torch.tensor([u.loss for u in updates], dtype=torch.float64)
    return float((weights * losses).sum() / weights.sum())
