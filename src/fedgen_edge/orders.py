"""How the server words a round: what each client receives, and what travels to it."""

from collections.abc import Callable, Sequence
from functools import cache

from fedgen_edge import schedule
from fedgen_edge.adapters.ranks import cut, of_rank, padded, truncated
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.clusters import of
from fedgen_edge.config import Devices
from fedgen_edge.errors import TrainingError
from fedgen_edge.jobs import Training
from fedgen_edge.leaves import shapes
from fedgen_edge.schedule import Load, Luck, Stint
from fedgen_edge.types import Leaves, Order, ServerState
from fedgen_edge.uplink.wire import came_down, most_up, sent_down


def wording(
    algorithm: Algorithm, job: Training, state: ServerState, among: int
) -> Callable[[Sequence[int]], Order]:
    """Makes the order of whoever trains together; clients of one rank receive the same.

    Args:
        algorithm: what the method changes.
        job: what clients do.
        state: after so many rounds; they train from it.
        among: clients that train, drawn or not.

    Raises:
        TrainingError: by what it makes, when what is to go down cannot be written as the wire says.
    """
    strides = job.strides(state.round)

    @cache
    def addressed(rank: int | None) -> tuple[Leaves, bytes]:
        """With zeros beyond the rank; and what travels, without them."""
        shared = truncated(algorithm.worded(state, among), rank)
        try:
            payload = sent_down(job.wire, shared, state.round)
        except TrainingError as error:
            raise TrainingError(f"round {state.round + 1}, to its clients: {error}") from None
        found = padded(came_down(job.wire, payload, shapes(shared)), shapes(state.adapter))
        return {**cut(state.adapter, rank), **found}, payload

    def order(group: Sequence[int]) -> Order:
        rank = algorithm.rank(group[0])
        return Order(tuple(group), state.round, *addressed(rank), rank, strides)

    return order


def stint(
    algorithm: Algorithm, job: Training, devices: Devices, order: Order, drawn: Luck
) -> Stint:
    """What becomes of an order, from its client's device and luck."""
    return schedule.stint(devices, order.clients[0], load(algorithm, job, order), drawn)


def load(algorithm: Algorithm, job: Training, order: Order) -> Load:
    """What an order asks of its client; of bytes that zstd shortens, at most.

    A model of the client's own takes as many steps as the shared one.
    """
    one = of(order.received, 0 if algorithm.clusters else None)  # they are of one size
    shared = shapes(algorithm.shared(one, order.round))
    up = most_up(job.wire, of_rank(shared, order.rank))
    steps = job.steps(order) * (2 if algorithm.beside else 1)
    return Load(steps, len(order.payload), up)
