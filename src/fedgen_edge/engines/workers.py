"""Work that is shared out among workers, and what is said of it; how they are reached is beside it.

A worker builds its jobs itself, so an order travels without its adapter, which all of them share,
and results without their orders. Leaves travel as payloads; what a client remembers goes with its
order, and comes back only where there is any.
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
"""A worker's job, by the method's name, of clients who remember what they are given to remember."""


@runtime_checkable
class WorkerPool(Protocol):
    """Workers of a run."""

    def engine(self, method: str, stack: int | None, *, sums: bool) -> Engine:
        """The engine of a method.

        Args:
            method: its name, as the workers' jobs know it.
            stack: most clients in a stack; none is one client at a time.
            sums: whether a worker sends the mean of its clients' changes, not every change.
        """
        ...

    def close(self) -> None:
        """Let the workers go; another order brings new ones."""
        ...


class WorkerBatch(NamedTuple):
    """What a worker is asked for at once."""

    method: str
    kind: JobType
    stacks: Sequence[Sequence[tuple[Order, int]]]
    """Orders without their adapters, and which of the payloads beside them is each one's."""
    memory: Mapping[int, bytes]
    """What clients remember, of those who do."""
    stacked: bool
    sums: bool


class WorkerResult(NamedTuple):
    """A result without its order and leaves."""

    clients: tuple[int, ...]
    """Whose order it was."""
    bare_result: Update | TuningResult
    leaves: dict[str, bytes]
    """By the result's fields."""


NO_ORDER = Order((), 0, {})
"""In the place of an order that its giver has."""


def run_batch(
    make_job: JobFactory, work: WorkerBatch, adapter_payloads: Sequence[bytes]
) -> list[list[WorkerResult]]:
    """Carry out what is asked, at a worker: stack by stack, as an engine of one machine does."""
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
    """What to ask of one worker, and the adapters that its orders received, each once."""
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
    """The result whole, with the order that it was given."""
    order, leaves = orders[result.clients], {k: decode(v) for k, v in result.leaves.items()}
    if isinstance(result.bare_result, Update):
        return replace(result.bare_result, order=order, **leaves)
    return result.bare_result._replace(order=order, **leaves)


def assign_loads(loads: Sequence[int], workers: int) -> list[list[int]]:
    """Places of the loads for each worker: the next one goes to who has least to do so far.

    It is known before anything is done, so that sums are the same whoever is quick.
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    for place, _ in enumerate(loads):
        lightest = min(shares, key=lambda share: sum(loads[at] for at in share))
        lightest.append(place)
    return shares


def _strip_result(result: Update | TuningResult, payloads: dict[int, bytes]) -> WorkerResult:
    """What is said of a result; leaves that results have in common are one payload."""
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
