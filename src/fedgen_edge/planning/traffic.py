"""What travels in each round, in bytes, and how long a round lasts, without a model at hand.

Who is asked, who is late and what a payload holds follow from settings and shapes alone, so these
are the numbers that a run will write into its records; zstd's are the most that they can be. Only a
cohort chosen by its losses (`federation.candidates`) is not known before: others are taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedgen_edge import schedule
from fedgen_edge.adapters.ranks import of_rank, truncated
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.clusters import of
from fedgen_edge.config import Devices, Settings
from fedgen_edge.leaves import shapes
from fedgen_edge.rounds import present, sample
from fedgen_edge.schedule import Load, Queue, Trip, cohort_size
from fedgen_edge.types import Leaves, ServerState
from fedgen_edge.uplink.wire import Wire, made, most_down, most_up

Shapes = Mapping[str, Sequence[int]]


class Round(NamedTuple):
    """One round, or one commit of a server that has no rounds."""

    down: int
    """Bytes from the server."""
    up: int
    """Bytes to the server."""
    seconds: float
    """That it lasts, by the devices' speeds."""
    asked: int
    """Clients that began."""
    counted: int
    """Clients that are merged."""


class Parts(NamedTuple):
    """A client's seconds in one round."""

    down: float
    train: float
    up: float


@dataclass(frozen=True)
class Road:
    """What travels to a client and back, by its rank and the round."""

    algorithm: Algorithm
    wire: Wire
    leaves: Shapes
    """Of an adapter, before the method has it."""
    among: int
    """Clients that train."""

    @cached_property
    def state(self) -> ServerState:
        """The server before the first round, without values."""
        bare = {k: torch.empty(tuple(shape), device="meta") for k, shape in self.leaves.items()}
        return self.algorithm.init(bare)

    @cached_property
    def received(self) -> Leaves:
        """What travels down to a client of the highest rank."""
        return self.algorithm.worded(self.state, self.among)

    def down(self, client: int) -> int:
        """Bytes to a client."""
        told = truncated(self.received, self.algorithm.rank(client))
        return most_down(self.wire, shapes(told))

    def up(self, client: int, round_: int) -> int:
        """Bytes from a client in a round."""
        every = {**self.state.adapter, **self.received}
        one = of(every, 0 if self.algorithm.clusters else None)
        shared = shapes(self.algorithm.shared(one, round_))
        return most_up(self.wire, of_rank(shared, self.algorithm.rank(client)))

    def load(self, client: int, round_: int, steps: int) -> Load:
        """What a client is asked for; a model of its own takes as many steps again."""
        twice = 2 if self.algorithm.beside else 1
        return Load(twice * steps, self.down(client), self.up(client, round_))


def road(settings: Settings, algorithm: Algorithm, leaves: Shapes, clients: int) -> Road:
    """As settings say.

    Raises:
        MissingExtraError: zstd is not installed.
    """
    told = Wire() if algorithm.pools else made(settings.uplink, settings.downlink, 0, {})
    return Road(algorithm, told, leaves, clients - settings.federation.newcomers)


def rounds(settings: Settings, on: Road, clients: int, steps: int) -> Iterator[Round]:
    """Every round of a run.

    Args:
        settings: of the run; its devices have speeds, or take no time.
        on: what travels.
        clients: in the federation.
        steps: of one client in a round.
    """
    if on.algorithm.buffer:
        yield from _commits(settings, on, clients, steps)
        return
    federation, devices = settings.federation, settings.devices
    wanted = cohort_size(federation, clients)
    for r in range(federation.rounds):
        asked = sample(federation, clients, r, devices=devices)
        loads = {c: on.load(c, r, steps) for c in asked}
        if not schedule.take_time(devices):
            groups = [group[0] for group in on.algorithm.groups(asked)] if asked else []
            down, up = (sum(getattr(loads[c], way) for c in groups) for way in ("down", "up"))
            yield Round(down, up, 0.0, len(asked), len(asked))
            continue
        draws = {c: schedule.luck(federation.seed, r, c) for c in asked}
        stints = [schedule.stint(devices, c, loads[c], draws[c]) for c in asked]
        done = schedule.race(stints, wanted, federation.deadline)
        groups = [group[0] for group in on.algorithm.groups(done.cohort)] if done.cohort else []
        down = sum(loads[c].down for c in (*groups, *done.dropped))
        up = sum(loads[c].up for c in groups) + done.bytes_up
        yield Round(down, up, done.seconds, len(asked), len(done.cohort))


def _commits(settings: Settings, on: Road, clients: int, steps: int) -> Iterator[Round]:
    """Those of a server that waits for so many updates, whosever they are."""
    federation, devices = settings.federation, settings.devices
    at_once = cohort_size(federation, clients)
    queue = Queue()

    def begun(version: int, client: int, draw: int, clock: float) -> Trip:
        drawn = schedule.luck(federation.seed, draw, client)
        work = schedule.stint(devices, client, on.load(client, version, steps), drawn)
        return Trip(client, version, clock + work.ends, work.arrives, work.sent(work.ends))

    for version in range(federation.rounds):
        free = partial(present, federation, clients, devices)
        found = schedule.gather(queue, on.algorithm.buffer, at_once, free, partial(begun, version))
        up = sum(trip.sent for trip in (*found.buffer, *found.dropped))
        seconds = found.queue.clock - queue.clock
        down = found.started * on.down(0)
        yield Round(down, up, seconds, found.started, len(found.buffer))
        queue = found.queue


def parts(devices: Devices, client: int, load: Load) -> Parts:
    """What a client's round is made of, where nothing fails."""
    inf = float("inf")
    return Parts(
        load.down / schedule.of(devices.down, client, inf),
        load.steps / schedule.of(devices.steps_per_second, client, inf),
        load.up / schedule.of(devices.up, client, inf),
    )


def timed(devices: Devices, seconds: float | None) -> Devices:
    """The devices; where nobody said how fast they are, a step takes all so long."""
    if devices.steps_per_second or not seconds:
        return devices
    return replace(devices, steps_per_second=(1 / seconds,))


def server_bytes(on: Road, cohort: int) -> dict[str, int]:
    """What a server holds while it merges, by part.

    `adapter`, `state` (moments, variates: what the method's step keeps), `updates` (the cohort's
    changes as they came and as they are read), `checkpoint` (on its disk, in the same bytes as the
    first two). A method that multiplies factors out takes more for one layer at a time.
    """
    shared = on.algorithm.shared(of(on.state.adapter, 0 if on.algorithm.clusters else None))
    change: dict[str, Any] = {**on.state.adapter}
    kept = on.algorithm.steps(on.state, change).memory
    told = {k: v for k, v in on.received.items() if k not in on.state.adapter}
    own = _bytes(on.state.adapter)
    state = _bytes(kept) + _bytes(told)
    updates = cohort * (_bytes(shared) + on.up(0, 0))
    return {"adapter": own, "state": state, "updates": updates, "checkpoint": own + state}


def _bytes(values: Mapping[str, Any]) -> int:
    tensors = (v for v in values.values() if isinstance(v, Tensor))
    return sum(v.numel() * v.element_size() for v in tensors)
