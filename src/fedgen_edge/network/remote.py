"""Sites as an engine: orders go out to other machines, and what comes back in time is judged."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fedgen_edge.adapters.ranks import pad_ranks, truncate_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.scaffold import compute_strides
from fedgen_edge.compression.wire import Wire
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.federation.jobs import Job
from fedgen_edge.leaves import shapes
from fedgen_edge.network.bounds import Bounds
from fedgen_edge.network.gate import ExpectedReply, Gate, OpenRound, get_event_name
from fedgen_edge.network.messages import Carrier, Reply, Terms, WorkRequest, digest
from fedgen_edge.types import Leaves, Order, Update


@runtime_checkable
class EventRecorder(Protocol):
    """Writes a line of the audit log."""

    def __call__(self, event: str, *, why: str = "", **fields: str | int) -> None:
        """Say what happened: to whom, when, and the hash of what they sent.

        Why is for the operator's eyes, and not kept: a site may have worded it.
        """
        ...


@dataclass(frozen=True)
class RoundRequest:
    """One attempt at a round: who was asked for what, and what was sent to whom."""

    orders: Mapping[str, Order]
    work: Mapping[str, WorkRequest]
    gates: Mapping[int | None, Gate]
    """By the rank of the adapters that pass."""
    record_event: EventRecorder
    client_states: Mapping[int, Leaves]
    """What the method has each site remember, by its number."""

    def accept_reply(self, reply: Reply) -> Update | None:
        """What a reply counts for: none where it is refused, or said before, or failed."""
        order = self.orders.get(reply.site)
        gate = self.gates[order.rank] if order else next(iter(self.gates.values()))
        expected = gate.open_round.expected
        event_fields = {"site": reply.site, "round": expected.round, "attempt": expected.attempt}
        if reply.failed is not None:
            self.record_event("failed", why=reply.failed, **event_fields)
            return None
        try:
            accepted = gate.accept(reply)
        except RefusedError as error:
            payload = digest(reply.payload)
            self.record_event(
                get_event_name(error),
                why=str(error),
                code=error.code,
                payload=payload,
                **event_fields,
            )
            return None
        if accepted is None:
            return None
        self.record_event("accepted", payload=accepted.sha256, **event_fields)
        order = self.orders[reply.site]
        return Update(
            order=order,
            delta=pad_ranks(accepted.leaves, shapes(order.received)),
            memory={},
            weight=float(accepted.weight),
            loss=accepted.loss,
            steps=accepted.steps,
            bytes_up=len(reply.payload),
            lost_memory=self.client_states.get(order.clients[0], {})
            if accepted.lost_memory
            else {},
        )


@dataclass(frozen=True)
class RemoteTraining:
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
    accepted_digests: Callable[[int], Mapping[str, str]]
    """SHA-256 of each site's last payload that counts, after so many rounds."""
    record_event: EventRecorder
    wire: Wire = field(default_factory=Wire)
    """How leaves travel."""
    client_states: MutableMapping[int, Leaves] = field(default_factory=dict)
    """What the method has each site remember, as far as the server can work it out as well."""

    def steps(self, order: Order) -> int:
        """Unknown here, and the same for all."""
        del order
        return 0

    def get_stack_group(self, order: Order) -> int:
        """The same: sites are never together."""
        del order
        return 0

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
        """Never done on this machine."""
        raise NotImplementedError("sites do this job: the engine is Remote")

    def count_clients(self) -> int:
        """Sites that have joined."""
        return len(self.weights())

    def strides(self, round_: int) -> Mapping[str, float]:
        """By the settings that sites have too."""
        bounds = self.bounds(round_)
        return compute_strides(bounds.phases, bounds.rate)

    def commit_updates(self, updates: Sequence[Update]) -> None:
        """Work out what these sites learnt; they themselves are told with the work that follows."""
        for update in updates:
            client, done = update.order.clients[0], (update.order, update.delta, update.steps)
            before = {} if update.lost_memory else self.client_states.get(client, {})
            if learnt := self.algorithm.learns(*done, before):
                self.client_states[client] = {**before, **learnt}

    def make_request(self, orders: Sequence[Order]) -> RoundRequest:
        """Word a round's orders; the attempt is on the record before anybody is asked."""
        first_order = orders[0]
        attempt = self.attempt(first_order.round)
        gates = {order.rank: Gate(self._make_open_round(order, attempt)) for order in orders}
        self.record_event("opened", round=first_order.round, attempt=attempt)
        digests = self.accepted_digests(first_order.round)
        names = self.names()
        orders_by_site = {names[order.clients[0]]: order for order in orders}
        work = {
            name: WorkRequest("train", self.terms, order.clients[0], first_order.round, attempt,
                       digests.get(name), order.payload)
            for name, order in orders_by_site.items()
        }  # fmt: skip
        return RoundRequest(orders_by_site, work, gates, self.record_event, self.client_states)

    def _make_open_round(self, order: Order, attempt: int) -> OpenRound:
        """What the answer of an order's site must be, and of all others of its rank."""
        expected = ExpectedReply("train", self.terms, order.round, attempt, digest(order.payload))
        start = truncate_rank(order.received, order.rank)
        schema = shapes(self.algorithm.select_shared(start, order.round))
        site_numbers = {name: number for number, name in enumerate(self.names())}
        bounds, weights = self.bounds(order.round), self.weights()
        clusters = self.algorithm.clusters.number if self.algorithm.clusters else 0
        return OpenRound(
            expected, schema, start, bounds, weights, self.wire, site_numbers, clusters
        )


@dataclass(frozen=True)
class Remote:
    """An engine whose clients are sites: it waits for as many as are wanted, and not for ever."""

    carrier: Carrier
    target_updates: int
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
        if not isinstance(job, RemoteTraining):
            raise TypeError("sites do a Distant job, and no other")
        request, num_updates = job.make_request(orders), 0
        with closing(self.carrier.exchange(request.work, self.seconds)) as replies:
            for reply in replies:
                update = request.accept_reply(reply)
                if update is not None:
                    num_updates += 1
                    yield update
                if num_updates == self.target_updates:
                    break
        if num_updates < self.quorum:
            raise QuorumError(
                f"round {orders[0].round + 1} had {num_updates} of the {self.quorum} "
                "updates that it "
                f"needs, from {len(orders)} sites asked"
            )
