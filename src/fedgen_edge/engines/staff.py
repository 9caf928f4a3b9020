"""Work that is shared out among workers, and what is said of it; how they are reached is beside it.

A worker builds its jobs itself, so an order travels without its adapter, which all of them share,
and results without their orders. Leaves travel as payloads; what a client remembers goes with its
order, and comes back only where there is any.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.merge import in_common
from fedgen_edge.jobs import Engine, Job, Train, Tuned
from fedgen_edge.personal import Personalise
from fedgen_edge.types import Leaves, Order, Update
from fedgen_edge.uplink.transform import decode, encode

Kind = type[Train] | type[Personalise]
Jobs = Callable[[str, Kind, MutableMapping[int, Leaves]], Job]
"""A worker's job, by the method's name, of clients who remember what they are given to remember."""


@runtime_checkable
class Staff(Protocol):
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


class Work(NamedTuple):
    """What a worker is asked for at once."""

    method: str
    kind: Kind
    stacks: Sequence[Sequence[tuple[Order, int]]]
    """Orders without their adapters, and which of the payloads beside them is each one's."""
    memory: Mapping[int, bytes]
    """What clients remember, of those who do."""
    stacked: bool
    sums: bool


class Said(NamedTuple):
    """A result without its order and leaves."""

    clients: tuple[int, ...]
    """Whose order it was."""
    bare: Update | Tuned
    leaves: dict[str, bytes]
    """By the result's fields."""


BARE = Order((), 0, {})
"""In the place of an order that its giver has."""


def done(jobs: Jobs, work: Work, received: Sequence[bytes]) -> list[list[Said]]:
    """Carry out what is asked, at a worker: stack by stack, as an engine of one machine does."""
    adapters = [decode(payload) for payload in received]
    memory = {client: decode(payload) for client, payload in work.memory.items()}
    job = jobs(work.method, work.kind, memory)
    found = [
        job([replace(order, received=adapters[at]) for order, at in stack], stacked=work.stacked)
        for stack in work.stacks
    ]
    if work.sums and isinstance(job, Train):
        found = _in_common(found, job.clients.algorithm)
    payloads: dict[int, bytes] = {}
    return [[_said(result, payloads) for result in results] for results in found]


def asked(
    method: str,
    job: Train | Personalise,
    stacks: Sequence[Sequence[Order]],
    *,
    stacked: bool,
    sums: bool,
) -> tuple[Work, list[Leaves]]:
    """What to ask of one worker, and the adapters that its orders received, each once."""
    orders = [order for stack in stacks for order in stack]
    adapters = {id(order.received): order.received for order in orders}
    places = {key: at for at, key in enumerate(adapters)}
    bare = [
        [(replace(o, received={}, payload=b""), places[id(o.received)]) for o in stack]
        for stack in stacks
    ]
    held = job.clients.memory
    memory = {c: encode(held[c]) for c in dict.fromkeys(o.clients[0] for o in orders) if c in held}
    work = Work(method, type(job), bare, memory, stacked, sums)
    return work, [*adapters.values()]


def heard(said: Said, orders: Mapping[tuple[int, ...], Order]) -> Update | Tuned:
    """The result whole, with the order that it was given."""
    order, found = orders[said.clients], {k: decode(v) for k, v in said.leaves.items()}
    if isinstance(said.bare, Update):
        return replace(said.bare, order=order, **found)
    return said.bare._replace(order=order, **found)


def dealt(loads: Sequence[int], workers: int) -> list[list[int]]:
    """Places of the loads for each worker: the next one goes to who has least to do so far.

    It is known before anything is done, so that sums are the same whoever is quick.
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    for place, _ in enumerate(loads):
        least = min(shares, key=lambda share: sum(loads[at] for at in share))
        least.append(place)
    return shares


def _said(result: Update | Tuned, payloads: dict[int, bytes]) -> Said:
    """What is said of a result; leaves that results have in common are one payload."""
    clients = result.order.clients
    if isinstance(result, Update):
        bare = replace(result, order=BARE, delta={}, memory={})
        found = {"delta": result.delta, "memory": result.memory}
    else:
        bare, found = result._replace(order=BARE, adapter={}), {"adapter": result.adapter}
    for leaves in found.values():
        if id(leaves) not in payloads:
            payloads[id(leaves)] = encode(leaves)
    return Said(clients, bare, {k: payloads[id(v)] for k, v in found.items()})


def _in_common(found: list[list], algorithm: Algorithm) -> list[list]:
    assert algorithm.sums, "sums are asked of methods that have some"
    updates = iter(in_common([u for results in found for u in results], algorithm.sums))
    return [[next(updates) for _ in results] for results in found]
