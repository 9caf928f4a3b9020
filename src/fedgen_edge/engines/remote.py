"""Sites as an engine: orders go out to other machines, and what comes back in time is judged."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fedgen_edge.adapters.ranks import padded, truncated
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.variates import strides
from fedgen_edge.engines.bounds import Bounds
from fedgen_edge.engines.exchange import Carrier, Reply, Terms, Work, digest
from fedgen_edge.engines.gate import Asked, Gate, Open, event_of
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.jobs import Job
from fedgen_edge.leaves import shapes
from fedgen_edge.types import Leaves, Order, Update
from fedgen_edge.uplink.wire import Wire


@runtime_checkable
class Note(Protocol):
    """Writes a line of the audit log."""

    def __call__(self, event: str, *, why: str = "", **fields: str | int) -> None:
        """Say what happened: to whom, when, and the hash of what they sent.

        Why is for the operator's eyes, and not kept: a site may have worded it.
        """
        ...


@dataclass(frozen=True)
class Called:
    """One attempt at a round: who was asked for what, and what was sent to whom."""

    orders: Mapping[str, Order]
    work: Mapping[str, Work]
    gates: Mapping[int | None, Gate]
    """By the rank of the adapters that pass."""
    note: Note
    known: Mapping[int, Leaves]
    """What the method has each site remember, by its number."""

    def update(self, reply: Reply) -> Update | None:
        """What a reply counts for: none where it is refused, or said before, or failed."""
        order = self.orders.get(reply.site)
        gate = self.gates[order.rank] if order else next(iter(self.gates.values()))
        asked = gate.open.asked
        said = {"site": reply.site, "round": asked.round, "attempt": asked.attempt}
        if reply.failed is not None:
            self.note("failed", why=reply.failed, **said)
            return None
        try:
            taken = gate.take(reply)
        except RefusedError as error:
            payload = digest(reply.payload)
            self.note(event_of(error), why=str(error), code=error.code, payload=payload, **said)
            return None
        if taken is None:
            return None
        self.note("accepted", payload=taken.sha256, **said)
        order = self.orders[reply.site]
        return Update(
            order=order,
            delta=padded(taken.leaves, shapes(order.received)),
            memory={},
            weight=float(taken.weight),
            loss=taken.loss,
            steps=taken.steps,
            bytes_up=len(reply.payload),
            forgot=self.known.get(order.clients[0], {}) if taken.lost else {},
        )


@dataclass(frozen=True)
class Distant:
    """A round's job, done by sites: how it is put to them, and what their answers must be."""

    algorithm: Algorithm
    terms: Terms
    names: Callable[[], Sequence[str]]
    """Sites by their numbers."""
    weights: Callable[[], Mapping[str, int]]
    """Training examples of each site that has joined."""
    bounds: Callable[[int], Bounds]
    """Of a round."""
    attempt: Callable[[int], int]
    """Which attempt at a round this is, counted from 0."""
    counted: Callable[[int], Mapping[str, str]]
    """SHA-256 of each site's last payload that counts, after so many rounds."""
    note: Note
    wire: Wire = field(default_factory=Wire)
    """How leaves travel."""
    known: MutableMapping[int, Leaves] = field(default_factory=dict)
    """What the method has each site remember, as far as the server can work it out as well."""

    def steps(self, order: Order) -> int:
        """Unknown here, and the same for all."""
        del order
        return 0

    def kin(self, order: Order) -> int:
        """The same: sites are never together."""
        del order
        return 0

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
        """Never done on this machine."""
        raise NotImplementedError("sites do this job: the engine is Remote")

    def members(self) -> int:
        """Sites that have joined."""
        return len(self.weights())

    def strides(self, round_: int) -> Mapping[str, float]:
        """By the settings that sites have too."""
        bounds = self.bounds(round_)
        return strides(bounds.phases, bounds.rate)

    def accepted(self, updates: Sequence[Update]) -> None:
        """Work out what these sites learnt; they themselves are told with the work that follows."""
        for update in updates:
            client, done = update.order.clients[0], (update.order, update.delta, update.steps)
            before = {} if update.forgot else self.known.get(client, {})
            if learnt := self.algorithm.learns(*done, before):
                self.known[client] = {**before, **learnt}

    def call(self, orders: Sequence[Order]) -> Called:
        """Word a round's orders; the attempt is on the record before anybody is asked."""
        first = orders[0]
        attempt = self.attempt(first.round)
        gates = {order.rank: Gate(self._open(order, attempt)) for order in orders}
        self.note("opened", round=first.round, attempt=attempt)
        counted = self.counted(first.round)
        names = self.names()
        by_name = {names[order.clients[0]]: order for order in orders}
        work = {
            name: Work("train", self.terms, order.clients[0], first.round, attempt,
                       counted.get(name), order.payload)
            for name, order in by_name.items()
        }  # fmt: skip
        return Called(by_name, work, gates, self.note, self.known)

    def _open(self, order: Order, attempt: int) -> Open:
        """What the answer of an order's site must be, and of all others of its rank."""
        asked = Asked("train", self.terms, order.round, attempt, digest(order.payload))
        start = truncated(order.received, order.rank)
        schema = shapes(self.algorithm.shared(start, order.round))
        numbers = {name: number for number, name in enumerate(self.names())}
        bounds, weights = self.bounds(order.round), self.weights()
        clusters = self.algorithm.clusters.number if self.algorithm.clusters else 0
        return Open(asked, schema, start, bounds, weights, self.wire, numbers, clusters)


@dataclass(frozen=True)
class Remote:
    """An engine whose clients are sites: it waits for as many as are wanted, and not for ever."""

    carrier: Carrier
    wanted: int
    """Updates after which nobody is waited for."""
    quorum: int
    """Updates without which the round is abandoned."""
    seconds: float
    """That a round waits."""

    def __call__(self, orders: Sequence[Order], job: Job) -> Iterator[Update]:
        """Yield what counts.

        Raises:
            QuorumError: it is too little; nothing counts, and the model is as it was.
        """
        if not isinstance(job, Distant):
            raise TypeError("sites do a Distant job, and no other")
        called, came = job.call(orders), 0
        with closing(self.carrier.exchange(called.work, self.seconds)) as replies:
            for reply in replies:
                update = called.update(reply)
                if update is not None:
                    came += 1
                    yield update
                if came == self.wanted:
                    break
        if came < self.quorum:
            raise QuorumError(
                f"round {orders[0].round + 1} had {came} of the {self.quorum} updates that it "
                f"needs, from {len(orders)} sites asked"
            )
