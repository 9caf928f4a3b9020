"""A server without rounds: it commits whenever a few updates have come, whoever sent them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter

from fedgen_edge import leaves, schedule
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Devices, Federation
from fedgen_edge.jobs import Engine, Training
from fedgen_edge.orders import stint, wording
from fedgen_edge.schedule import Trip
from fedgen_edge.types import Commit, Leaves, Order, ServerState, Timing, Update

VERSION = "version/"
"""Begins, in the server's memory, the names of an older adapter on which somebody is at work."""


@dataclass(frozen=True)
class Buffered:
    """FedBuff's server, with as many clients at work as a cohort has.

    Who has finished is known before anything is trained, so clients are trained at the commit that
    takes their updates, from the version that they were given.

    Source: Nguyen et al. 2022, FedBuff (arXiv:2106.06639), algorithm 1.
    Differs: whose update waits in the buffer is not drawn again before the commit.
    """

    algorithm: Algorithm
    engine: Engine
    job: Training
    federation: Federation
    devices: Devices
    at_once: int
    """Clients at work."""
    free: Callable[[int], Sequence[int]]
    """Clients that can be drawn in a draw, in its order."""

    def commits(self, state: ServerState) -> Iterator[Commit]:
        """Yield after each commit until the federation's last."""
        while state.round < self.federation.rounds:
            now = self._worded(state)
            found = schedule.gather(
                schedule.queue_of(state.memory),
                self.algorithm.buffer,
                self.at_once,
                self.free,
                partial(self._begun, now),
            )
            versions = {state.round: state.adapter, **_versions(state.memory)}
            updates = self._trained(state, found.buffer, versions)
            needed = {trip.version for trip in found.queue.trips}
            older = {v: adapter for v, adapter in versions.items() if v in needed}
            state = self.algorithm.step(state, updates)
            memory = schedule.queued(_with(state.memory, older), found.queue)
            state = replace(state, memory=memory)
            self.job.accepted(updates)
            down = found.started * len(now((0,)).payload)
            yield Commit(state, updates, down, self._timing(found))

    def _worded(self, state: ServerState) -> Callable[[Sequence[int]], Order]:
        """What clients are given of a version."""
        among = self.job.members() - self.federation.newcomers
        return wording(self.algorithm, self.job, state, among)

    def _begun(
        self, now: Callable[[Sequence[int]], Order], client: int, draw: int, clock: float
    ) -> Trip:
        """What becomes of a client that begins."""
        order = now((client,))
        luck = schedule.luck(self.federation.seed, draw, client)
        work = stint(self.algorithm, self.job, self.devices, order, luck)
        return Trip(client, order.round, clock + work.ends, work.arrives, work.sent(work.ends))

    def _trained(
        self, state: ServerState, trips: Sequence[Trip], versions: dict[int, Leaves]
    ) -> list[Update]:
        """Their updates; those of one version train together, as rates go by version."""
        found: list[Update] = []
        by_version = sorted(trips, key=attrgetter("version"))
        for version, some in groupby(by_version, key=attrgetter("version")):
            then = replace(state, round=version, adapter=versions[version])
            order = self._worded(then)
            found += self.engine([order((trip.client,)) for trip in some], self.job)
        return sorted(found, key=lambda update: update.order.clients)

    def _timing(self, found: schedule.Gathered) -> Timing | None:
        if not schedule.take_time(self.devices):
            return None
        dropped = tuple(trip.client for trip in found.dropped)
        return Timing(found.queue.clock, dropped, sum(trip.sent for trip in found.dropped))


def _versions(memory: Leaves) -> dict[int, Leaves]:
    """Older adapters by version."""
    found: dict[int, Leaves] = {}
    for name, leaf in memory.items():
        if name.startswith(VERSION):
            version, _, own = name.removeprefix(VERSION).partition("/")
            found.setdefault(int(version), {})[own] = leaf
    return found


def _with(memory: Leaves, versions: dict[int, Leaves]) -> Leaves:
    """The memory with these older adapters, and no others."""
    others = leaves.select(memory, lambda name: not name.startswith(VERSION))
    named = {f"{VERSION}{v}/{k}": leaf for v, own in versions.items() for k, leaf in own.items()}
    return {**others, **named}
