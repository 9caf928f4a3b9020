"""Many clients at once: their batches go through the shared backbone as one batch."""

from collections.abc import Iterator, Sequence

from fedgen_edge.federation.jobs import Job, TuningResult
from fedgen_edge.federation.rounds import Engine
from fedgen_edge.types import Order, Update


def make_stacked_engine(size: int) -> Engine:
    """Make an engine whose stacks hold at most `size` clients.

    The longest orders come first, so that clients of similar length share a stack and a finished
    client costs nothing.
    """

    def run(orders: Sequence[Order], job: Job) -> Iterator[Update | TuningResult]:
        for stack in make_stacks(orders, job, size):
            yield from job(stack, stacked=True)

    return run


def make_stacks(orders: Sequence[Order], job: Job, size: int) -> Iterator[list[Order]]:
    """Yield the orders of each stack: at most `size`, and only ones that can share a stack."""
    sorted_orders = sorted(orders, key=job.steps, reverse=True)
    for group in dict.fromkeys(map(job.get_stack_group, sorted_orders)):
        group_orders = [order for order in sorted_orders if job.get_stack_group(order) == group]
        for start in range(0, len(group_orders), size):
            yield group_orders[start : start + size]
