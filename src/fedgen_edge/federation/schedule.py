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

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Devices, Federation
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.types import Queue, RoundTrip

INSTANT = Devices()
"""Nobody takes time, is away or drops out: no clock is kept."""


class DeviceDraw(NamedTuple):
    """A client's random numbers of one round, from 0 to below 1."""

    available: float
    """Below the share of rounds in which it can be drawn, it can be drawn in this one."""
    fails: float
    """Below the chance that it drops out, it does."""
    lot: float
    """When it drops out, as a share of its time; else, who of those that finish together is first.
    """


def draw_device(seed: int, round_: int, client: int) -> DeviceDraw:
    """Equal for every method, so that methods beside each other meet the same devices."""
    rng = generator(seed, "devices", round_, client)
    return DeviceDraw(*torch.rand(3, generator=rng, dtype=torch.float64).tolist())


def get_device_value(values: Sequence[float], client: int, default: float) -> float:
    """A client's entry; where there are none, the other value."""
    return values[client % len(values)] if values else default


def is_available(devices: Devices, seed: int, round_: int, client: int) -> bool:
    """Whether a client can be drawn in a round."""
    if not devices.available:
        return True
    return draw_device(seed, round_, client).available < get_device_value(
        devices.available, client, 1.0
    )


def count_requested(federation: Federation, cohort: int, clients: int) -> int:
    """Clients that a round asks, of whom the cohort is to come: never more than there are."""
    # 1.07 times 100 is 107, whatever floats make of it
    num_requested = math.ceil(round(federation.over_selection * cohort, 9))
    return min(num_requested, clients - federation.unseen_clients)


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
    num_participants = clients - federation.unseen_clients
    if num_participants < 1:
        raise ConfigError(
            f"federation.unseen_clients={federation.unseen_clients} leaves none of {clients} "
            "clients to train: have fewer"
        )
    size = num_participants if federation.cohort is None else federation.cohort
    if federation.fraction is not None:
        size = max(1, round(federation.fraction * num_participants))
    if size > num_participants:
        raise ConfigError(
            f"federation.cohort={size} must be at most {num_participants}, the clients that train: "
            "draw fewer, or have more clients"
        )
    candidates, requested = federation.power_of_choice, count_requested(federation, size, clients)
    if candidates is not None and not requested <= candidates <= num_participants:
        raise ConfigError(
            f"federation.power_of_choice={candidates} must be from {requested}, those that a "
            "round asks, to "
            ""
            f"{num_participants}, the clients that train: set federation.cohort or "
            f"federation.over_selection below it"
        )
    return size


class ClientLoad(NamedTuple):
    """What a client is asked for."""

    steps: int
    """Optimiser steps."""
    down: int
    """Bytes that it receives."""
    up: int
    """Bytes that it sends."""


class ClientTiming(NamedTuple):
    """What becomes of it; seconds since the client was asked."""

    client: int
    upload_start: float
    """When it begins to send."""
    upload_end: float
    """When it would have sent all."""
    end: float
    """When it has sent all, or drops out before."""
    arrives: bool
    up: int
    """Bytes that it would send."""
    tie_breaker: float

    def count_sent_bytes(self, time: float) -> int:
        """Bytes that it has sent by then."""
        time = min(time, self.end)
        if self.arrives and time == self.end:
            return self.up
        if time <= self.upload_start:
            return 0
        return int(self.up * (time - self.upload_start) / (self.upload_end - self.upload_start))


def simulate_client(
    devices: Devices, client: int, load: ClientLoad, device_draw: DeviceDraw
) -> ClientTiming:
    """What becomes of a client's work, from its device and its luck."""
    upload_start = load.down / get_device_value(devices.down, client, math.inf)
    upload_start += load.steps / get_device_value(devices.steps_per_second, client, math.inf)
    upload_end = upload_start + load.up / get_device_value(devices.up, client, math.inf)
    has_dropped = device_draw.fails < get_device_value(devices.fails, client, 0.0)
    end = upload_end * device_draw.lot if has_dropped else upload_end
    return ClientTiming(
        client, upload_start, upload_end, end, not has_dropped, load.up, device_draw.lot
    )


class RoundOutcome(NamedTuple):
    """What became of a round."""

    cohort: list[int]
    """Clients that count, in their order."""
    dropped: tuple[int, ...]
    """Those that do not."""
    seconds: float
    """That it took."""
    bytes_up: int
    """What the dropped had sent by its end."""


def simulate_round(
    timings: Sequence[ClientTiming], target_size: int, deadline: float | None
) -> RoundOutcome:
    """The first to finish, by lot where they finish together.

    A round ends once so many have finished as are wanted, or all have finished or dropped out, or
    at its deadline. One that asked nobody lasts until its deadline, or no time.
    """
    limit = math.inf if deadline is None else deadline
    arriving = [s for s in timings if s.arrives and s.end <= limit]
    fastest = sorted(arriving, key=lambda s: (s.end, s.tie_breaker))[:target_size]
    if len(fastest) == target_size:
        seconds = fastest[-1].end
    else:
        seconds = min(limit, max((s.end for s in timings), default=limit))
    cohort = {s.client for s in fastest}
    dropped = [s for s in timings if s.client not in cohort]
    return RoundOutcome(
        sorted(cohort),
        tuple(s.client for s in dropped),
        seconds if seconds < math.inf else 0.0,
        sum(s.count_sent_bytes(seconds) for s in dropped),
    )


class FilledBuffer(NamedTuple):
    """What came until a buffer was full."""

    queue: Queue
    buffer: list[RoundTrip]
    """Those that arrived, the first one first."""
    dropped: list[RoundTrip]
    started: int
    """Clients that were given the server's adapter meanwhile."""


def fill_buffer(
    queue: Queue,
    buffer_size: int,
    concurrency: int,
    draw: Callable[[int], Iterable[int]],
    start: Callable[[int, int, float], RoundTrip],
) -> FilledBuffer:
    """Fill a buffer: whenever a client has finished or dropped out, another begins.

    Whose update waits in the buffer is not drawn: it would train on the same batches from the same
    version. Where nobody is free, fewer are at work until the commit. Who finish together come in
    the order in which they began.

    Args:
        queue: who is at work.
        buffer_size: updates that fill the buffer; no more than there are clients.
        concurrency: clients at work.
        draw: from the number of a draw, clients that can be drawn, in its order.
        start: what becomes of a client, from the number of its draw and the time.
    """
    clock, draws, trips = queue.clock, queue.draws, [*queue.trips]
    buffer: list[RoundTrip] = []
    dropped: list[RoundTrip] = []
    started = 0
    while len(buffer) < buffer_size:
        if len(trips) < concurrency:
            busy = {trip.client for trip in (*trips, *buffer)}
            free = (client for client in draw(draws) if client not in busy)
            new_trips = [start(c, draws, clock) for c in islice(free, concurrency - len(trips))]
            draws, started, trips = draws + 1, started + len(new_trips), trips + new_trips
        if trips:
            finished = min(trips, key=lambda trip: trip.end)
            trips.remove(finished)
            clock = finished.end
            (buffer if finished.arrives else dropped).append(finished)
    return FilledBuffer(Queue(clock, draws, tuple(trips)), buffer, dropped, started)


def uses_clock(devices: Devices) -> bool:
    """Whether there is anything for the clock to tell."""
    return replace(devices, memory=()) != INSTANT


def check(
    federation: Federation, devices: Devices, algorithms: Sequence[Algorithm], clients: int
) -> None:
    """Refuse now what no round could keep to.

    Raises:
        ConfigError: names the setting.
    """
    has_clock = uses_clock(devices)
    over_selection = federation.over_selection if federation.over_selection > 1 else None
    clock_settings = {"over_selection": over_selection, "deadline": federation.deadline}
    for name, value in clock_settings.items():
        if value is not None and not has_clock:
            raise ConfigError(
                f"federation.{name}={value} needs clients that take time: describe them by "
                "devices.steps_per_second, up and down"
            )
    num_participants = clients - federation.unseen_clients
    for algorithm in algorithms:
        if algorithm.buffer > num_participants:
            raise ConfigError(
                f"method.buffer={algorithm.buffer} must be at most {num_participants}, "
                f"the clients that train"
            )
        if algorithm.buffer and federation.power_of_choice is not None:
            raise ConfigError(
                f"federation.power_of_choice={federation.power_of_choice} chooses the cohort of "
                "a round, and method.name='fedbuff' has no rounds: leave it out"
            )
