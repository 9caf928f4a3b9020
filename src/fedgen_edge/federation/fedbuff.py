"""A server without rounds: it commits whenever a few updates have come, whoever sent them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Devices, Federation
from fedgen_edge.federation import schedule
from fedgen_edge.federation.jobs import Engine, TrainingJob
from fedgen_edge.federation.orders import make_orders, simulate_order
from fedgen_edge.types import Commit, Leaves, Order, RoundTrip, ServerState, Timing, Update


@dataclass(frozen=True)
class BufferedServer:
    """FedBuff's server, with as many clients at work as a cohort has.

    Who has finished is known before anything is trained, so clients are trained at the commit that
    takes their updates, from the version that they were given.

    Source: Nguyen et al. 2022, FedBuff (arXiv:2106.06639), algorithm 1.
    Differs: whose update waits in the buffer is not drawn again before the commit.
    """

    algorithm: Algorithm
    engine: Engine
    job: TrainingJob
    federation: Federation
    devices: Devices
    concurrency: int
    """Clients at work."""
    available_clients: Callable[[int], Sequence[int]]
    """Clients that can be drawn in a draw, in its order."""

    def commits(self, state: ServerState) -> Iterator[Commit]:
        """Yield after each commit until the federation's last."""
        while state.round < self.federation.rounds:
            make_order = self._make_orders(state)
            filled = schedule.fill_buffer(
                state.queue,
                self.algorithm.buffer,
                self.concurrency,
                self.available_clients,
                partial(self._start_client, make_order),
            )
            versions = {state.round: state.adapter, **state.versions}
            updates = self._train_clients(state, filled.buffer, versions)
            needed = {trip.version for trip in filled.queue.trips}
            older = {v: adapter for v, adapter in versions.items() if v in needed}
            state = self.algorithm.step(state, updates)
            state = replace(state, queue=filled.queue, versions=older)
            self.job.commit_updates(updates)
            bytes_down = filled.started * len(make_order((0,)).payload)
            yield Commit(state, updates, bytes_down, self._make_timing(filled))

    def _make_orders(self, state: ServerState) -> Callable[[Sequence[int]], Order]:
        """What clients are given of a version."""
        num_clients = self.job.count_clients() - self.federation.unseen_clients
        return make_orders(self.algorithm, self.job, state, num_clients)

    def _start_client(
        self, make_order: Callable[[Sequence[int]], Order], client: int, draw: int, clock: float
    ) -> RoundTrip:
        """What becomes of a client that begins."""
        order = make_order((client,))
        device_draw = schedule.draw_device(self.federation.seed, draw, client)
        timing = simulate_order(self.algorithm, self.job, self.devices, order, device_draw)
        return RoundTrip(
            client,
            order.round,
            clock + timing.end,
            timing.arrives,
            timing.count_sent_bytes(timing.end),
        )

    def _train_clients(
        self, state: ServerState, trips: Sequence[RoundTrip], versions: dict[int, Leaves]
    ) -> list[Update]:
        """Their updates; those of one version train together, as rates go by version."""
        updates: list[Update] = []
        by_version = sorted(trips, key=attrgetter("version"))
        for version, version_trips in groupby(by_version, key=attrgetter("version")):
            past_state = replace(state, round=version, adapter=versions[version])
            make_order = self._make_orders(past_state)
            updates += self.engine([make_order((trip.client,)) for trip in version_trips], self.job)
        return sorted(updates, key=lambda update: update.order.clients)

    def _make_timing(self, filled: schedule.FilledBuffer) -> Timing | None:
        if not schedule.uses_clock(self.devices):
            return None
        dropped = tuple(trip.client for trip in filled.dropped)
        return Timing(filled.queue.clock, dropped, sum(trip.bytes_sent for trip in filled.dropped))
