"""How the server words a round: what each client receives, and what travels to it."""

from collections.abc import Callable, Sequence
from functools import cache

from fedgen_edge.adapters.ranks import get_rank_shapes, mask_rank, pad_ranks, truncate_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.ifca import select_cluster
from fedgen_edge.compression.wire import decode_broadcast, encode_broadcast, get_max_bytes_up
from fedgen_edge.config import Devices
from fedgen_edge.errors import TrainingError
from fedgen_edge.federation import schedule
from fedgen_edge.federation.jobs import TrainingJob
from fedgen_edge.federation.schedule import ClientLoad, ClientTiming, DeviceDraw
from fedgen_edge.leaves import shapes
from fedgen_edge.types import Leaves, Order, ServerState


def make_orders(
    algorithm: Algorithm, job: TrainingJob, state: ServerState, num_clients: int
) -> Callable[[Sequence[int]], Order]:
    """Makes the order of whoever trains together; clients of one rank receive the same.

    Args:
        algorithm: what the method changes.
        job: what clients do.
        state: after so many rounds; they train from it.
        num_clients: clients that train, drawn or not.

    Raises:
        TrainingError: by what it makes, when what is to go down cannot be written as the wire says.
    """
    strides = job.strides(state.round)

    @cache
    def encode_for_rank(rank: int | None) -> tuple[Leaves, bytes]:
        """With zeros beyond the rank; and what travels, without them."""
        shared = truncate_rank(algorithm.make_broadcast(state, num_clients), rank)
        try:
            payload = encode_broadcast(job.wire, shared, state.round)
        except TrainingError as error:
            raise TrainingError(f"round {state.round + 1}, to its clients: {error}") from None
        received = pad_ranks(
            decode_broadcast(job.wire, payload, shapes(shared)), shapes(state.adapter)
        )
        return {**mask_rank(state.adapter, rank), **received}, payload

    def order(group: Sequence[int]) -> Order:
        rank = algorithm.get_rank(group[0])
        return Order(tuple(group), state.round, *encode_for_rank(rank), rank, strides)

    return order


def simulate_order(
    algorithm: Algorithm, job: TrainingJob, devices: Devices, order: Order, device_draw: DeviceDraw
) -> ClientTiming:
    """What becomes of an order, from its client's device and luck."""
    return schedule.simulate_client(
        devices, order.clients[0], compute_load(algorithm, job, order), device_draw
    )


def compute_load(algorithm: Algorithm, job: TrainingJob, order: Order) -> ClientLoad:
    """What an order asks of its client; of bytes that zstd shortens, at most.

    A model of the client's own takes as many steps as the shared one.
    """
    adapter = select_cluster(
        order.received, 0 if algorithm.clusters else None
    )  # they are of one size
    shared = shapes(algorithm.select_shared(adapter, order.round))
    bytes_up = get_max_bytes_up(job.wire, get_rank_shapes(shared, order.rank))
    steps = job.steps(order) * (2 if algorithm.beside else 1)
    return ClientLoad(steps, len(order.payload), bytes_up)
