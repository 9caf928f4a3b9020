"""The loop, as in the paper's pseudo-code: a generator, so whoever iterates decides the rest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Devices, Federation
from fedgen_edge.federation import schedule
from fedgen_edge.federation.fedbuff import BufferedServer
from fedgen_edge.federation.jobs import Engine, TrainingJob
from fedgen_edge.federation.orders import make_orders, simulate_order
from fedgen_edge.federation.schedule import INSTANT, cohort_size, count_requested, uses_clock
from fedgen_edge.seeds import generator
from fedgen_edge.types import Commit, Order, ServerState, Timing, Update

Draw = Callable[[int, Tensor | None], list[int]]
"""Whom a round asks, in the clients' order, from its number and every client's last loss."""


class Roster(NamedTuple):
    """Who can be asked, and how fast they are."""

    draw: Draw | None = None
    """Whom each round asks; none is `sample`."""
    devices: Devices = INSTANT


ANYBODY = Roster()


def list_available(
    federation: Federation, clients: int, devices: Devices, round_: int
) -> list[int]:
    """Clients that can be drawn in a round, in the order of its draw."""
    seed = federation.seed
    rng = generator(seed, "sample", round_)
    order = torch.randperm(clients - federation.unseen_clients, generator=rng).tolist()
    return [c for c in order if schedule.is_available(devices, seed, round_, c)]


def sample_clients(
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
    drawn = torch.tensor(list_available(federation, clients, devices, round_), dtype=torch.long)
    size = count_requested(federation, cohort_size(federation, clients), clients)
    if federation.power_of_choice is not None and losses is not None:
        candidates = drawn[: federation.power_of_choice]
        drawn = candidates[losses[candidates].argsort(descending=True, stable=True)]
    return sorted(drawn[:size].tolist())


def record_losses(state: ServerState, updates: Sequence[Update], clients: int) -> ServerState:
    """The state with the cohort's training losses, by which a later cohort is chosen."""
    unknown = torch.full((clients,), torch.inf)
    losses = (unknown if state.losses is None else state.losses).clone()
    for update in updates:
        losses[list(update.order.clients)] = update.loss
    return replace(state, losses=losses)


def rounds(
    state: ServerState,
    algorithm: Algorithm,
    engine: Engine,
    job: TrainingJob,
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
        concurrency = cohort_size(federation, clients)
        available_clients = partial(list_available, federation, clients, roster.devices)
        server = BufferedServer(
            algorithm, engine, job, federation, roster.devices, concurrency, available_clients
        )
        yield from server.commits(state)
        return
    draw = roster.draw or partial(sample_clients, federation, clients, devices=roster.devices)
    for r in range(state.round, federation.rounds):
        requested = draw(r, state.losses)
        order = make_orders(algorithm, job, state, job.count_clients() - federation.unseen_clients)
        per_client = {client: order((client,)) for client in requested}
        cohort, timing = requested, None
        if uses_clock(roster.devices):
            requested_orders = [*per_client.values()]
            cohort, timing = _simulate_round(
                state, algorithm, job, federation, roster.devices, requested_orders
            )
        groups = algorithm.groups(cohort) if cohort else []
        orders = [order(group) for group in groups]
        updates = sorted(engine(orders, job), key=lambda update: update.order.clients)
        state = algorithm.step(state, updates) if updates else replace(state, round=r + 1)
        if federation.power_of_choice is not None:
            state = record_losses(state, updates, clients)
        bytes_down = sum(len(order.payload) for order in orders)
        if timing:
            state = replace(state, queue=state.queue._replace(clock=timing.clock))
            bytes_down += sum(len(per_client[client].payload) for client in timing.dropped)
        job.commit_updates(updates)
        yield Commit(state, updates, bytes_down, timing)


def _simulate_round(
    state: ServerState,
    algorithm: Algorithm,
    job: TrainingJob,
    federation: Federation,
    devices: Devices,
    orders: Sequence[Order],
) -> tuple[list[int], Timing]:
    """Who of those asked makes the cohort, and when: each client by itself, pooled data or not."""
    timings = [
        simulate_order(
            algorithm,
            job,
            devices,
            order,
            schedule.draw_device(federation.seed, order.round, order.clients[0]),
        )
        for order in orders
    ]
    target_size = cohort_size(federation, federation.clients or 0)
    outcome = schedule.simulate_round(timings, target_size, federation.deadline)
    clock = state.queue.clock + outcome.seconds
    return outcome.cohort, Timing(clock, outcome.dropped, outcome.bytes_up)


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss of a cohort, weighted by examples."""
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    losses = torch.tensor([u.loss for u in updates], dtype=torch.float64)
    return float((weights * losses).sum() / weights.sum())
