"""Compute the bytes sent in each round, and how long a round lasts, without a model.

The cohorts, the stragglers and the payloads follow from settings and shapes alone, so these are the
numbers that a run will record; with zstd they are upper bounds. Only a cohort chosen by its losses
(`federation.power_of_choice`) is not known beforehand: another cohort stands in for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedgen_edge.adapters.ranks import get_rank_shapes, truncate_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.ifca import select_cluster
from fedgen_edge.compression.wire import Wire, get_max_bytes_down, get_max_bytes_up, make_wire
from fedgen_edge.config import Devices, Settings
from fedgen_edge.federation import schedule
from fedgen_edge.federation.rounds import list_available, sample_clients
from fedgen_edge.federation.schedule import ClientLoad, cohort_size
from fedgen_edge.leaves import shapes
from fedgen_edge.types import Leaves, Queue, RoundTrip, ServerState

Shapes = Mapping[str, Sequence[int]]


class RoundTraffic(NamedTuple):
    """One round, or one commit of a server that has no rounds."""

    bytes_down: int
    """Bytes from the server."""
    bytes_up: int
    """Bytes to the server."""
    seconds: float
    """Duration, by the devices' speeds."""
    started: int
    """Clients that started."""
    merged: int
    """Clients whose updates are merged."""


class ClientSeconds(NamedTuple):
    """A client's seconds in one round."""

    down: float
    train: float
    up: float


@dataclass(frozen=True)
class ClientTraffic:
    """Traffic to a client and back, by its rank and the round."""

    algorithm: Algorithm
    wire: Wire
    leaves: Shapes
    """Shapes of an adapter, before the method changes it."""
    num_clients: int
    """Clients that train."""

    @cached_property
    def initial_state(self) -> ServerState:
        """Return the server's state before the first round, without values."""
        empty_leaves = {
            k: torch.empty(tuple(shape), device="meta") for k, shape in self.leaves.items()
        }
        return self.algorithm.init(empty_leaves)

    @cached_property
    def broadcast_leaves(self) -> Leaves:
        """Return the leaves broadcast to a client of the highest rank."""
        return self.algorithm.make_broadcast(self.initial_state, self.num_clients)

    def count_down_bytes(self, client: int) -> int:
        """Count the bytes to a client."""
        sent_leaves = truncate_rank(self.broadcast_leaves, self.algorithm.get_rank(client))
        return get_max_bytes_down(self.wire, shapes(sent_leaves))

    def count_up_bytes(self, client: int, round_: int) -> int:
        """Count the bytes from a client in a round."""
        all_leaves = {**self.initial_state.adapter, **self.broadcast_leaves}
        cluster_leaves = select_cluster(all_leaves, 0 if self.algorithm.clusters else None)
        shared = shapes(self.algorithm.select_shared(cluster_leaves, round_))
        return get_max_bytes_up(self.wire, get_rank_shapes(shared, self.algorithm.get_rank(client)))

    def compute_load(self, client: int, round_: int, steps: int) -> ClientLoad:
        """Return a client's load; a personal model takes as many steps again."""
        num_models = 2 if self.algorithm.beside else 1
        return ClientLoad(
            num_models * steps, self.count_down_bytes(client), self.count_up_bytes(client, round_)
        )


def make_client_traffic(
    settings: Settings, algorithm: Algorithm, leaves: Shapes, clients: int
) -> ClientTraffic:
    """Make the traffic model that the settings describe.

    Raises:
        MissingExtraError: zstd is not installed.
    """
    wire = Wire() if algorithm.pools_data else make_wire(settings.uplink, settings.downlink, 0, {})
    return ClientTraffic(algorithm, wire, leaves, clients - settings.federation.unseen_clients)


def estimate_rounds(
    settings: Settings, client_traffic: ClientTraffic, clients: int, steps: int
) -> Iterator[RoundTraffic]:
    """Yield the traffic of every round of a run.

    Args:
        settings: settings of the run; devices without speeds take no time.
        client_traffic: traffic of each client.
        clients: clients in the federation.
        steps: steps of one client in a round.
    """
    if client_traffic.algorithm.buffer:
        yield from _estimate_commits(settings, client_traffic, clients, steps)
        return
    federation, devices = settings.federation, settings.devices
    target_size = cohort_size(federation, clients)
    for r in range(federation.rounds):
        requested = sample_clients(federation, clients, r, devices=devices)
        loads = {c: client_traffic.compute_load(c, r, steps) for c in requested}
        if not schedule.uses_clock(devices):
            groups = (
                [group[0] for group in client_traffic.algorithm.groups(requested)]
                if requested
                else []
            )
            bytes_down, bytes_up = (
                sum(getattr(loads[c], way) for c in groups) for way in ("down", "up")
            )
            yield RoundTraffic(bytes_down, bytes_up, 0.0, len(requested), len(requested))
            continue
        device_draws = {c: schedule.draw_device(federation.seed, r, c) for c in requested}
        timings = [
            schedule.simulate_client(devices, c, loads[c], device_draws[c]) for c in requested
        ]
        outcome = schedule.simulate_round(timings, target_size, federation.deadline)
        groups = (
            [group[0] for group in client_traffic.algorithm.groups(outcome.cohort)]
            if outcome.cohort
            else []
        )
        bytes_down = sum(loads[c].down for c in (*groups, *outcome.dropped))
        bytes_up = sum(loads[c].up for c in groups) + outcome.bytes_up
        yield RoundTraffic(
            bytes_down, bytes_up, outcome.seconds, len(requested), len(outcome.cohort)
        )


def _estimate_commits(
    settings: Settings, client_traffic: ClientTraffic, clients: int, steps: int
) -> Iterator[RoundTraffic]:
    """Yield the commits of a buffered asynchronous server, which waits for a number of updates."""
    federation, devices = settings.federation, settings.devices
    concurrency = cohort_size(federation, clients)
    queue = Queue()

    def start_client(version: int, client: int, draw: int, clock: float) -> RoundTrip:
        device_draw = schedule.draw_device(federation.seed, draw, client)
        timing = schedule.simulate_client(
            devices, client, client_traffic.compute_load(client, version, steps), device_draw
        )
        return RoundTrip(
            client, version, clock + timing.end, timing.arrives, timing.count_sent_bytes(timing.end)
        )

    for version in range(federation.rounds):
        available_clients = partial(list_available, federation, clients, devices)
        filled = schedule.fill_buffer(
            queue,
            client_traffic.algorithm.buffer,
            concurrency,
            available_clients,
            partial(start_client, version),
        )
        bytes_up = sum(trip.bytes_sent for trip in (*filled.buffer, *filled.dropped))
        seconds = filled.queue.clock - queue.clock
        bytes_down = filled.started * client_traffic.count_down_bytes(0)
        yield RoundTraffic(bytes_down, bytes_up, seconds, filled.started, len(filled.buffer))
        queue = filled.queue


def estimate_client_seconds(devices: Devices, client: int, load: ClientLoad) -> ClientSeconds:
    """Estimate the seconds of a client's round, by part, if nothing fails."""
    inf = float("inf")
    return ClientSeconds(
        load.down / schedule.get_device_value(devices.down, client, inf),
        load.steps / schedule.get_device_value(devices.steps_per_second, client, inf),
        load.up / schedule.get_device_value(devices.up, client, inf),
    )


def set_step_time(devices: Devices, seconds: float | None) -> Devices:
    """Return the devices; if they have no speed, a step takes this long on each."""
    if devices.steps_per_second or not seconds:
        return devices
    return replace(devices, steps_per_second=(1 / seconds,))


def estimate_server_bytes(client_traffic: ClientTraffic, cohort: int) -> dict[str, int]:
    """Estimate a server's bytes while it merges, by part.

    The parts are `adapter`, `state` (moments, control variates: what the method's step stores),
    `updates` (the cohort's payloads and the decoded updates) and `checkpoint` (on disk, as large as
    the first two). A method that multiplies factors needs more, for one layer at a time.
    """
    shared = client_traffic.algorithm.select_shared(
        select_cluster(
            client_traffic.initial_state.adapter, 0 if client_traffic.algorithm.clusters else None
        )
    )
    change: dict[str, Any] = {**client_traffic.initial_state.adapter}
    stepped = client_traffic.algorithm.steps(client_traffic.initial_state, change)
    remembered = (stepped.first_moment, stepped.second_moment, stepped.method)
    correction_state = {
        k: v
        for k, v in client_traffic.broadcast_leaves.items()
        if k not in client_traffic.initial_state.adapter
    }
    adapter_bytes = _count_bytes(client_traffic.initial_state.adapter)
    state_bytes = sum(map(_count_bytes, (*remembered, correction_state)))
    update_bytes = cohort * (_count_bytes(shared) + client_traffic.count_up_bytes(0, 0))
    return {
        "adapter": adapter_bytes,
        "state": state_bytes,
        "updates": update_bytes,
        "checkpoint": adapter_bytes + state_bytes,
    }


def _count_bytes(values: Mapping[str, Any]) -> int:
    tensors = (v for v in values.values() if isinstance(v, Tensor))
    return sum(v.numel() * v.element_size() for v in tensors)
