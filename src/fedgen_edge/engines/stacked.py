"""Many clients at once: their batches go through the shared backbone as one batch."""

from collections.abc import Iterator, Sequence

from fedgen_edge.jobs import Job, Tuned
from fedgen_edge.rounds import Engine
from fedgen_edge.types import Order, Update


def stacked(size: int) -> Engine:
    """An engine whose stacks hold at most so many clients.

    Longest orders come first, so that clients of like length share a stack and a finished client
    costs nothing.
    """

    def run(orders: Sequence[Order], job: Job) -> Iterator[Update | Tuned]:
        for stack in stacks(orders, job, size):
            yield from job(stack, stacked=True)

    return run


def stacks(orders: Sequence[Order], job: Job, size: int) -> Iterator[list[Order]]:
    """Who is together: kin alone, and at most so many of them."""
    ranked = sorted(orders, key=job.steps, reverse=True)
    for kin in dict.fromkeys(map(job.kin, ranked)):
        alike = [order for order in ranked if job.kin(order) == kin]
        for at in range(0, len(alike), size):
            yield alike[at : at + size]
