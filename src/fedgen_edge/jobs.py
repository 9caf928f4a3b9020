"""What a simulation's clients do with an order: train in a round, or personalise at the end.

Here is all that a client has and a server does not: its data, and what it remembers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from fedgen_edge import leaves
from fedgen_edge.adapters.ranks import of_rank, padded, truncated
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.clusters import CHOICE, alike, labelled, of, parts
from fedgen_edge.algorithms.variates import strides
from fedgen_edge.client import Recipe, local_update, preferred
from fedgen_edge.data.batches import (
    MARKS,
    Budget,
    Shard,
    deal,
    interleave,
    spaced,
    stack,
    steps,
)
from fedgen_edge.errors import TrainingError
from fedgen_edge.leaves import select
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import Ahead, Task
from fedgen_edge.types import VARIATE, Batch, Leaves, Order, Update
from fedgen_edge.uplink.wire import Wire, came_up, sent_up


@dataclass(frozen=True)
class Sent:
    """What a client sends for an order; and, beside it, what it keeps."""

    order: Order
    payload: bytes
    """The change of the leaves that are shared, as it travels."""
    memory: Leaves
    """Stays at the client, until it is told that its message counts."""
    weight: float
    """Training examples behind the change."""
    loss: float
    """Mean training loss."""
    steps: int
    """Optimiser steps taken."""
    cluster: int | None = None
    """The one of the server's adapters that it trained; none where there is but one."""


class Tuned(NamedTuple):
    """One client's own adapter."""

    order: Order
    adapter: Leaves
    history: list[float]
    """Validation loss at the start, then after each epoch."""
    chosen: int
    """The epoch that it kept; 0 is the start."""
    share: float | None = None
    """Of what layers put out, the tuned adapter's; none where there was no choice."""
    cluster: int | None = None
    """The one of the server's adapters that it began from; none where there is but one."""


@runtime_checkable
class Job(Protocol):
    """What an engine has clients do; the engine decides who works together, and knows no method."""

    def steps(self, order: Order) -> int:
        """How long the order is."""
        ...

    def kin(self, order: Order) -> int:
        """Orders of one number may be carried out together."""
        ...

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update] | list[Tuned]:
        """Carry out the orders, none longer than the one before it; unstacked: just one."""
        ...


@runtime_checkable
class Training(Job, Protocol):
    """A round's job."""

    @property
    def wire(self) -> Wire:
        """How leaves travel."""
        ...

    def members(self) -> int:
        """Clients that there are."""
        ...

    def strides(self, round_: int) -> Mapping[str, float]:
        """How far a gradient of one moves leaves with each batch, by the prefix of their phase."""
        ...

    def accepted(self, updates: Sequence[Update]) -> None:
        """Told that these count: only now do clients change what they remember."""
        ...


Engine = Callable[[Sequence[Order], Job], Iterator]
"""Has clients do a job; results come in any order, each with its own order in it."""


@dataclass(frozen=True)
class Clients:
    """The clients of a simulation."""

    task: Task
    algorithm: Algorithm
    shards: Sequence[Shard]
    seed: int
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    memory: MutableMapping[int, Leaves] = field(default_factory=dict)
    """What each client has kept; of one that has kept nothing there is no entry."""
    wire: Wire = field(default_factory=Wire)
    """How leaves travel."""

    def start(self, order: Order) -> Leaves:
        """What the order's client begins from: what it received, and what it has kept."""
        adapter = select(order.received, _not_told)
        return self.algorithm.receives(adapter, self.remembered(order))

    def told(self, order: Order) -> Leaves:
        """What corrections are made of: what the order's client was told, and what it learnt."""
        told = {k: v for k, v in order.received.items() if not _not_told(k)}
        return {**select(self.remembered(order), _of_no_model), **told}

    def choosing(self, orders: Sequence[Order]) -> "Clients":
        """The same, whose clients remember what they choose of what these orders bring them."""
        if self.algorithm.clusters is None:
            return self
        clients = {order.clients[0]: order for order in orders}
        memory = {
            c: self.chosen(c, order.received, self.remembered(order))
            for c, order in clients.items()
        }
        return replace(self, memory=memory)

    def chosen(self, client: int, adapter: Leaves, memory: Leaves) -> Leaves:
        """The client's memory, with its choice among an adapter's clusters where it has some."""
        told, there = self.algorithm.clusters, parts(adapter)
        if told is None or not there:
            return memory
        held = self.place(spaced(self.shards[client].train, told.examples))
        each = [self.place(own) for own in there.values()]
        found = 0 if alike(adapter) else preferred(self.task, each, held)
        return {**memory, CHOICE: torch.tensor(float(found))}

    def choice(self, order: Order) -> int | None:
        """The cluster that the order's client remembers; none where it chose none."""
        memory = self.remembered(order)
        return int(memory[CHOICE]) if CHOICE in memory else None

    def own(self, order: Order) -> Leaves:
        """What the order's client begins from with its own model."""
        return self.algorithm.own(self.start(order), self.remembered(order))

    def remembered(self, order: Order) -> Leaves:
        """What the order's client has kept."""
        return self.memory.get(order.clients[0], {})

    def batches(
        self, order: Order, budget: Budget, purpose: str, train: Mapping[int, Batch]
    ) -> Iterator[Batch]:
        """The order's batches, drawn, of its clients' examples."""
        streams = [
            deal(train[c], budget, self.seed, purpose, order.round, c) for c in order.clients
        ]
        for at, batch in enumerate(interleave(streams)):
            rng = generator(self.seed, purpose, "draw", order.round, order.clients[0], at)
            yield self.task.draw(batch, rng)

    def train(self, orders: Sequence[Order], budget: Budget) -> dict[int, Batch]:
        """Examples of these orders' clients; done ahead what can be, if they are met again."""
        held = {c: self.shards[c].train for order in orders for c in order.clients}
        met, once = (
            sum(steps(own, told) for own in held.values())
            for told in (budget, Budget(budget.batch))
        )
        done = self.ahead(held.values()) if met >= 2 * once else None
        return dict(zip(held, done, strict=True)) if done else held

    def ahead(self, each: Iterable[Batch]) -> list[Batch] | None:
        """These examples with the work done that is the same whenever they are met, if any is."""
        return self.task.ahead(each) if isinstance(self.task, Ahead) else None

    def steps(self, order: Order, budget: Budget) -> int:
        """Optimiser steps that the order asks for."""
        return sum(steps(self.shards[c].train, budget) for c in order.clients)

    def together(
        self,
        orders: Sequence[Order],
        budget: Budget,
        purpose: str,
        *,
        stacked: bool,
        own: bool = False,
    ) -> tuple[Leaves, Leaves, Iterator[Batch]]:
        """Starts, memories and batches of some orders: one as it is, or many with a first axis.

        Of clients' own models, if the method has any, starts of the shared one take the memories'
        place.
        """
        begins = self.own if own else self.start
        noted = self.start if own and self.algorithm.beside else self.told
        train = self.train(orders, budget)
        streams = [self.batches(order, budget, purpose, train) for order in orders]
        starts, memories = ([self.place(of(o)) for o in orders] for of in (begins, noted))
        if not stacked:
            return starts[0], memories[0], map(self.fed, streams[0])
        members = leaves.stack(leaves.filled(memories))
        return leaves.stack(starts), members, map(self.fed, stack(streams))

    def fed(self, batch: Batch) -> Batch:
        """A batch on the device but for its marks, which decide what is done with it.

        An accelerator goes on with the step before meanwhile, and is never asked for anything.
        """
        if self.device.type != "cuda":
            return {k: v if k in MARKS else v.to(self.device) for k, v in batch.items()}
        return {
            k: v if k in MARKS else v.pin_memory().to(self.device, non_blocking=True)
            for k, v in batch.items()
        }

    def place(self, values: Leaves) -> Leaves:
        """On the device."""
        return {k: v.to(self.device) for k, v in values.items()}


def _of_no_model(name: str) -> bool:
    """Whether training sees it: what is kept for another purpose has that in its name."""
    return ":" not in name


def _not_told(name: str) -> bool:
    return not name.startswith(VARIATE)


@dataclass(frozen=True)
class Train:
    """Local updates of one round, encoded and decoded as on a network."""

    clients: Clients
    budget: Budget
    recipe: Callable[[int], Recipe]
    """For a round, since learning rates and trained leaves go by it."""

    @property
    def wire(self) -> Wire:
        """How leaves travel."""
        return self.clients.wire

    def steps(self, order: Order) -> int:
        """Optimiser steps."""
        return self.clients.steps(order, self.budget)

    def kin(self, order: Order) -> int:
        """Steps in an epoch, where it says which leaves are trained."""
        if not self.clients.algorithm.head_epochs:
            return 0
        return self.budget.each(self.clients.shards[order.clients[0]].train)

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
        """Train, and return what the server gets; nothing is remembered yet."""
        return [self._arrived(sent) for sent in self.send(orders, stacked=stacked)]

    def send(self, orders: Sequence[Order], *, stacked: bool) -> list[Sent]:
        """Choose where there is a choice, train, and return what leaves each client."""
        return replace(self, clients=self.clients.choosing(orders))._send(orders, stacked)

    def _send(self, orders: Sequence[Order], stacked: bool) -> list[Sent]:
        given = self.clients.together(orders, self.budget, "train", stacked=stacked)
        start, memory, batches = given
        recipe = self.recipe(orders[0].round)
        delta, loss = local_update(self.clients.task, start, memory, batches, recipe)
        losses = (loss.total / loss.count.clamp(min=1)).reshape(-1).tolist()
        rows = [{k: v[i] if stacked else v for k, v in delta.items()} for i in range(len(orders))]
        found = [
            self._sent(order, {k: v.cpu() for k, v in own.items()}, mean)
            for order, own, mean in zip(orders, rows, losses, strict=True)
        ]
        return found if self.clients.algorithm.beside is None else self._beside(found, stacked)

    def members(self) -> int:
        """Clients that there are."""
        return len(self.clients.shards)

    def strides(self, round_: int) -> Mapping[str, float]:
        """Of this round's recipe."""
        return strides(self.clients.task.phases, self.recipe(round_).rate)

    def accepted(self, updates: Sequence[Update]) -> None:
        """Remember what each of these clients kept."""
        for update in updates:
            if update.memory:
                self.clients.memory[update.order.clients[0]] = update.memory

    def _beside(self, sent: list[Sent], stacked: bool) -> list[Sent]:
        """The same, and the clients' own models trained and kept."""
        clients, orders = self.clients, [each.order for each in sent]
        beside = clients.algorithm.beside
        assert beside is not None
        start, shared, batches = clients.together(
            orders, self.budget, "train", stacked=stacked, own=True
        )
        recipe = replace(self.recipe(orders[0].round), corrects=beside.corrects)
        delta, _ = local_update(clients.task, start, shared, batches, recipe)
        now = {k: v.cpu() for k, v in leaves.add(start, delta).items()}
        rows = [leaves.row(now, i) if stacked else now for i in range(len(sent))]
        return [
            replace(one, memory=one.memory | beside.keeps(row, clients.start(one.order)))
            for one, row in zip(sent, rows, strict=True)
        ]

    def _sent(self, order: Order, delta: Leaves, loss: float) -> Sent:
        algorithm, start = self.clients.algorithm, self.clients.start(order)
        steps = self.steps(order)
        before = self.clients.remembered(order)
        shared = truncated(algorithm.shared(delta, order.round), order.rank)
        cluster = self.clients.choice(order)
        shared = shared if cluster is None else labelled(shared, cluster)
        try:
            payload, left = sent_up(self.wire, shared, before, order.round, order.clients[0])
        except TrainingError as error:
            who = "+".join(self.clients.shards[c].name for c in order.clients)
            raise TrainingError(f"round {order.round + 1}, client {who}: {error}") from None
        return Sent(
            order=order,
            payload=payload,
            memory={
                **algorithm.keeps(start, delta, before),
                **algorithm.learns(order, delta, steps, before),
                **left,
            },
            weight=sum(self.clients.shards[c].weight for c in order.clients),
            loss=loss,
            steps=steps,
            cluster=cluster,
        )

    def _arrived(self, sent: Sent) -> Update:
        """The server's half: what it makes of a client's message."""
        order = sent.order
        received = of(order.received, sent.cluster)
        whole = leaves.shapes(self.clients.algorithm.shared(received, order.round))
        sent_of = of_rank(whole, order.rank)
        delta = came_up(self.wire, sent.payload, sent_of, order.round, order.clients[0])
        return Update(
            order=order,
            delta=padded(delta, whole),
            memory=sent.memory,
            weight=sent.weight,
            loss=sent.loss,
            steps=sent.steps,
            bytes_up=len(sent.payload),
        )
