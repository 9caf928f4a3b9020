"""One client at a time: the reference that every other engine must agree with."""

from collections.abc import Iterator, Sequence

from fedgen_edge.federation.jobs import Job, TuningResult
from fedgen_edge.types import Order, Update


def run_serially(orders: Sequence[Order], job: Job) -> Iterator[Update | TuningResult]:
    """Do the job for each order in turn."""
    for order in orders:
        yield from job([order], stacked=False)
