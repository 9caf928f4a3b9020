"""Who finishes when, by a virtual clock: known before anything is trained, and without waiting.

A client that is asked receives, trains and sends, one after the other, at the speeds of its
device. Who drops out, or comes too late, is never trained.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Devices, Federation
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

INSTANT = Devices()
"""Nobody takes time, is away or drops out: no clock is kept."""


class Luck(NamedTuple):
    """A client's random numbers of one round, from 0 to below 1."""

    available: float
    """Below the share of rounds in which it can be drawn, it can be drawn in this one."""
    fails: float
    """Below the chance that it drops out, it does."""
    lot: float
    """When it drops out, as a share of its time; else, who of those that finish together is first.
    """


def luck(seed: int, round_: int, client: int) -> Luck:
    """Equal for every method, so that methods beside each other meet the same devices."""
    rng = generator(seed, "devices", round_, client)
    return Luck(*torch.rand(3, generator=rng, dtype=torch.float64).tolist())


def of(values: Sequence[float], client: int, otherwise: float) -> float:
    """A client's entry; where there are none, the other value."""
    return values[client % len(values)] if values else otherwise


def available(devices: Devices, seed: int, round_: int, client: int) -> bool:
    """Whether a client can be drawn in a round."""
    if not devices.available:
        return True
    return luck(seed, round_, client).available < of(devices.available, client, 1.0)


def asked_size(federation: Federation, cohort: int, clients: int) -> int:
    """Clients that a round asks, of whom the cohort is to come: never more than there are."""
    # 0.07 of 100 is 7, whatever floats make of it
    more = math.ceil(round(federation.over * cohort, 9))
    return min(cohort + more, clients - federation.newcomers)


def cohort_size(federation: Federation, clients: int) -> int:
    """Clients that each round draws, of those that train.

    Raises:
        ConfigError: more than there are.
    """
    if clients < 1:
        raise ConfigError(
            "federation.clients is missing, and the rounds need the number of clients: set it to "
            "as many as the partition has (as build() does)"
        )
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
    few, asked = federation.candidates, asked_size(federation, size, clients)
    if few is not None and not asked <= few <= able:
        raise ConfigError(
            f"federation.candidates={few} must be from {asked}, those that a round asks, to "
            f"{able}, the clients that train: set federation.cohort or federation.over below it"
        )
    return size


class Load(NamedTuple):
    """What a client is asked for."""

    steps: int
    """Optimiser steps."""
    down: int
    """Bytes that it receives."""
    up: int
    """Bytes that it sends."""


class Stint(NamedTuple):
    """What becomes of it; seconds since the client was asked."""

    client: int
    uploads: float
    """When it begins to send."""
    whole: float
    """When it would have sent all."""
    ends: float
    """When it has sent all, or drops out before."""
    arrives: bool
    up: int
    """Bytes that it would send."""
    lot: float

    def sent(self, at: float) -> int:
        """Bytes that it has sent by then."""
        at = min(at, self.ends)
        if self.arrives and at == self.ends:
            return self.up
        if at <= self.uploads:
            return 0
        return int(self.up * (at - self.uploads) / (self.whole - self.uploads))


def stint(devices: Devices, client: int, load: Load, drawn: Luck) -> Stint:
    """What becomes of a client's work, from its device and its luck."""
    uploads = load.down / of(devices.down, client, math.inf)
    uploads += load.steps / of(devices.steps_per_second, client, math.inf)
    whole = uploads + load.up / of(devices.up, client, math.inf)
    fails = drawn.fails < of(devices.fails, client, 0.0)
    ends = whole * drawn.lot if fails else whole
    return Stint(client, uploads, whole, ends, not fails, load.up, drawn.lot)


class Race(NamedTuple):
    """What became of a round."""

    cohort: list[int]
    """Clients that count, in their order."""
    dropped: tuple[int, ...]
    """Those that do not."""
    seconds: float
    """That it took."""
    bytes_up: int
    """What the dropped had sent by its end."""


def race(stints: Sequence[Stint], wanted: int, deadline: float | None) -> Race:
    """The first to finish, by lot where they finish together.

    A round ends once so many have finished as are wanted, or all have finished or dropped out, or
    at its deadline. One that asked nobody lasts until its deadline, or no time.
    """
    limit = math.inf if deadline is None else deadline
    able = [s for s in stints if s.arrives and s.ends <= limit]
    first = sorted(able, key=lambda s: (s.ends, s.lot))[:wanted]
    if len(first) == wanted:
        seconds = first[-1].ends
    else:
        seconds = min(limit, max((s.ends for s in stints), default=limit))
    cohort = {s.client for s in first}
    late = [s for s in stints if s.client not in cohort]
    return Race(
        sorted(cohort),
        tuple(s.client for s in late),
        seconds if seconds < math.inf else 0.0,
        sum(s.sent(seconds) for s in late),
    )


class Trip(NamedTuple):
    """A client at work, or done: of a server that has no rounds."""

    client: int
    version: int
    """Commits before the adapter that it was given."""
    ends: float
    """Seconds since the start of training."""
    arrives: bool
    sent: int
    """Bytes that it has sent by its end."""


class Queue(NamedTuple):
    """Who is at work, between two commits."""

    clock: float = 0.0
    draws: int = 0
    """How often clients were drawn so far: seeds the next draw."""
    trips: tuple[Trip, ...] = ()
    """In the order in which they began."""


class Gathered(NamedTuple):
    """What came until a buffer was full."""

    queue: Queue
    buffer: list[Trip]
    """Those that arrived, the first one first."""
    dropped: list[Trip]
    started: int
    """Clients that were given the server's adapter meanwhile."""


def gather(
    queue: Queue,
    wanted: int,
    at_once: int,
    draw: Callable[[int], Iterable[int]],
    start: Callable[[int, int, float], Trip],
) -> Gathered:
    """Fill a buffer: whenever a client has finished or dropped out, another begins.

    Whose update waits in the buffer is not drawn: it would train on the same batches from the same
    version. Where nobody is free, fewer are at work until the commit. Who finish together come in
    the order in which they began.

    Args:
        queue: who is at work.
        wanted: updates that fill the buffer; no more than there are clients.
        at_once: clients at work.
        draw: from the number of a draw, clients that can be drawn, in its order.
        start: what becomes of a client, from the number of its draw and the time.
    """
    clock, draws, trips = queue.clock, queue.draws, [*queue.trips]
    buffer: list[Trip] = []
    dropped: list[Trip] = []
    started = 0
    while len(buffer) < wanted:
        if len(trips) < at_once:
            busy = {trip.client for trip in (*trips, *buffer)}
            free = (client for client in draw(draws) if client not in busy)
            new = [start(c, draws, clock) for c in islice(free, at_once - len(trips))]
            draws, started, trips = draws + 1, started + len(new), trips + new
        if trips:
            done = min(trips, key=lambda trip: trip.ends)
            trips.remove(done)
            clock = done.ends
            (buffer if done.arrives else dropped).append(done)
    return Gathered(Queue(clock, draws, tuple(trips)), buffer, dropped, started)


CLOCK, DRAWS, TRIPS = "clock", "draws", "trips"
"""Names, in the server's memory, of the virtual time and of a `Queue`."""


def clock_of(memory: Leaves) -> float:
    """Virtual seconds since the start of training."""
    return float(memory[CLOCK]) if CLOCK in memory else 0.0


def ticked(memory: Leaves, clock: float) -> Leaves:
    """The memory at another time."""
    return {**memory, CLOCK: _exact(clock)}


def queue_of(memory: Leaves) -> Queue:
    """Who is at work, as the memory has it."""
    if TRIPS not in memory:
        return Queue()
    rows = memory[TRIPS].tolist()
    trips = [Trip(int(c), int(v), ends, bool(a), int(sent)) for c, v, ends, a, sent in rows]
    return Queue(clock_of(memory), int(memory[DRAWS]), tuple(trips))


def queued(memory: Leaves, queue: Queue) -> Leaves:
    """The memory with these at work."""
    rows = _exact(queue.trips).reshape(-1, len(Trip._fields))
    return {**ticked(memory, queue.clock), DRAWS: torch.tensor(queue.draws), TRIPS: rows}


def _exact(values: object) -> Tensor:
    """float64 holds seconds, and whole numbers up to 2^53."""
    return torch.tensor(values, dtype=torch.float64)


def take_time(devices: Devices) -> bool:
    """Whether there is anything for the clock to tell."""
    return replace(devices, memory=()) != INSTANT


def check(
    federation: Federation, devices: Devices, algorithms: Sequence[Algorithm], clients: int
) -> None:
    """Refuse now what no round could keep to.

    Raises:
        ConfigError: names the setting.
    """
    timed = take_time(devices)
    for name, said in (("over", federation.over or None), ("deadline", federation.deadline)):
        if said is not None and not timed:
            raise ConfigError(
                f"federation.{name}={said} needs clients that take time: describe them by "
                "devices.steps_per_second, up and down"
            )
    able = clients - federation.newcomers
    for algorithm in algorithms:
        if algorithm.buffer > able:
            raise ConfigError(
                f"method.buffer={algorithm.buffer} must be at most {able}, the clients that train"
            )
        if algorithm.buffer and federation.candidates is not None:
            raise ConfigError(
                f"federation.candidates={federation.candidates} chooses the cohort of a round, and "
                "method.name='fedbuff' has no rounds: leave it out"
            )
