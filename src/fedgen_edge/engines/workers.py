"""Distribute work to workers and collect the results; `ray.py` is how to reach the workers.

A worker builds its jobs itself. Orders are sent without their adapter, which many of them share,
and results without their orders. Leaves are sent as payloads; a client's memory goes with its
order, and comes back only if it is not empty.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.merge import aggregate_partially
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.federation.jobs import Engine, Job, Train, TuningResult
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.types import Leaves, Order, Update

JobType = type[Train] | type[Personalize]
JobFactory = Callable[[str, JobType, MutableMapping[int, Leaves]], Job]
"""Makes a worker's job from a method's name, the type of job, and the clients' memory."""


@runtime_checkable
class WorkerPool(Protocol):
    """The workers of a run."""

    def engine(self, method: str, stack: int | None, *, sums: bool) -> Engine:
        """Return the engine of a method.

        Args:
            method: its name, as the workers' jobs know it.
            stack: maximum clients in a stack; None means one client at a time.
            sums: whether a worker sends the mean of its clients' updates, not every update.
        """
        ...

    def close(self) -> None:
        """Stop the workers; the next order starts new ones."""
        ...


class WorkerBatch(NamedTuple):
    """The work that a worker receives at once."""

    method: str
    kind: JobType
    stacks: Sequence[Sequence[tuple[Order, int]]]
    """Orders without their adapters, each with the index of its adapter's payload."""
    memory: Mapping[int, bytes]
    """The memory of the clients that have some."""
    stacked: bool
    sums: bool


class WorkerResult(NamedTuple):
    """A result without its order and leaves."""

    clients: tuple[int, ...]
    """The clients of its order."""
    bare_result: Update | TuningResult
    leaves: dict[str, bytes]
    """Payloads by the result's fields."""


NO_ORDER = Order((), 0, {})
"""Placeholder for an order that the caller already has."""


def run_batch(
    make_job: JobFactory, work: WorkerBatch, adapter_payloads: Sequence[bytes]
) -> list[list[WorkerResult]]:
    """Carry out a batch at a worker, stack by stack, as an engine on one machine does."""
    adapters = [decode(payload) for payload in adapter_payloads]
    memory = {client: decode(payload) for client, payload in work.memory.items()}
    job = make_job(work.method, work.kind, memory)
    stack_results = [
        job([replace(order, received=adapters[at]) for order, at in stack], stacked=work.stacked)
        for stack in work.stacks
    ]
    if work.sums and isinstance(job, Train):
        stack_results = _sum_updates(stack_results, job.clients.algorithm)
    payloads: dict[int, bytes] = {}
    return [[_strip_result(result, payloads) for result in results] for results in stack_results]


def make_batch(
    method: str,
    job: Train | Personalize,
    stacks: Sequence[Sequence[Order]],
    *,
    stacked: bool,
    sums: bool,
) -> tuple[WorkerBatch, list[Leaves]]:
    """Return the work for one worker, and the distinct adapters that its orders received."""
    orders = [order for stack in stacks for order in stack]
    adapters = {id(order.received): order.received for order in orders}
    places = {key: at for at, key in enumerate(adapters)}
    bare_stacks = [
        [(replace(o, received={}, payload=b""), places[id(o.received)]) for o in stack]
        for stack in stacks
    ]
    client_states = job.clients.memory
    memory = {
        c: encode(client_states[c])
        for c in dict.fromkeys(o.clients[0] for o in orders)
        if c in client_states
    }
    work = WorkerBatch(method, type(job), bare_stacks, memory, stacked, sums)
    return work, [*adapters.values()]


def restore_result(
    result: WorkerResult, orders: Mapping[tuple[int, ...], Order]
) -> Update | TuningResult:
    """Return the complete result, with its order."""
    order, leaves = orders[result.clients], {k: decode(v) for k, v in result.leaves.items()}
    if isinstance(result.bare_result, Update):
        return replace(result.bare_result, order=order, **leaves)
    return result.bare_result._replace(order=order, **leaves)


def assign_loads(loads: Sequence[int], workers: int) -> list[list[int]]:
    """Assign loads to workers, by index: the next load goes to the worker with the least so far.

    The assignment is fixed in advance, so that sums do not depend on who is quick.
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    for place, _ in enumerate(loads):
        lightest = min(shares, key=lambda share: sum(loads[at] for at in share))
        lightest.append(place)
    return shares


def _strip_result(result: Update | TuningResult, payloads: dict[int, bytes]) -> WorkerResult:
    """Return a result without its order; leaves that results share become one payload."""
    clients = result.order.clients
    if isinstance(result, Update):
        bare_result = replace(result, order=NO_ORDER, delta={}, memory={})
        leaf_fields = {"delta": result.delta, "memory": result.memory}
    else:
        bare_result, leaf_fields = (
            result._replace(order=NO_ORDER, adapter={}),
            {"adapter": result.adapter},
        )
    for leaves in leaf_fields.values():
        if id(leaves) not in payloads:
            payloads[id(leaves)] = encode(leaves)
    return WorkerResult(clients, bare_result, {k: payloads[id(v)] for k, v in leaf_fields.items()})


def _sum_updates(stack_results: list[list], algorithm: Algorithm) -> list[list]:
    assert algorithm.partial_aggregation, "sums are asked of methods that have some"
    updates = iter(
        aggregate_partially(
            [u for results in stack_results for u in results], algorithm.partial_aggregation
        )
    )
    return [[next(updates) for _ in results] for results in stack_results]
