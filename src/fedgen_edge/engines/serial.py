"""One client at a time: the reference that every other engine agrees with."""

from collections.abc import Iterator, Sequence

from fedgen_edge.jobs import Job, Tuned
from fedgen_edge.types import Order, Update


def serial(orders: Sequence[Order], job: Job) -> Iterator[Update | Tuned]:
    """Do the job for each order in turn."""
    for order in orders:
        yield from job([order], stacked=False)
