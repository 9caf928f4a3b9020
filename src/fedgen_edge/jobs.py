"""What a simulation's clients do with an order: train in a round, or personalise at the end.

Here is all that a client has and a server does not: its data, and what it remembers.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from fedgen_edge import leaves
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.receive import KEPT
from fedgen_edge.algorithms.variates import strides
from fedgen_edge.client import Judge, Patience, Recipe, descend, local_update, personalise
from fedgen_edge.data.batches import Budget, Shard, deal, interleave, stack, steps
from fedgen_edge.leaves import select
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import Task
from fedgen_edge.types import VARIATE, Batch, Leaves, Order, Update
from fedgen_edge.uplink.transform import decode, encode


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


class Tuned(NamedTuple):
    """One client's own adapter."""

    order: Order
    adapter: Leaves
    history: list[float]
    """Validation loss at the start, then after each epoch."""
    chosen: int
    """The epoch that it kept; 0 is the start."""


@runtime_checkable
class Job(Protocol):
    """What an engine has clients do; the engine decides who works together, and knows no method."""

    def steps(self, order: Order) -> int:
        """How long the order is."""
        ...

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update] | list[Tuned]:
        """Carry out the orders, none longer than the one before it; unstacked: just one."""
        ...


@runtime_checkable
class Training(Job, Protocol):
    """A round's job."""

    def members(self) -> int:
        """Clients that there are."""
        ...

    def strides(self, round_: int) -> Mapping[str, float]:
        """How far a gradient of one moves leaves with each batch, by the prefix of their phase."""
        ...

    def accepted(self, updates: Sequence[Update]) -> None:
        """Told that these count: only now do clients change what they remember."""
        ...


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

    def start(self, order: Order) -> Leaves:
        """What the order's client begins from: what it received, and what it has kept."""
        adapter = select(order.received, _not_told)
        return self.algorithm.receives(adapter, self.remembered(order))

    def told(self, order: Order) -> Leaves:
        """What corrections are made of: what the order's client was told, and what it learnt."""
        told = {k: v for k, v in order.received.items() if not _not_told(k)}
        return {**select(self.remembered(order), _not_in_start), **told}

    def remembered(self, order: Order) -> Leaves:
        """What the order's client has kept."""
        return self.memory.get(order.clients[0], {})

    def batches(self, order: Order, budget: Budget, purpose: str) -> Iterator[Batch]:
        """The order's batches, drawn, on the device."""
        streams = [
            deal(self.shards[c].train, budget, self.seed, purpose, order.round, c)
            for c in order.clients
        ]
        for at, batch in enumerate(interleave(streams)):
            rng = generator(self.seed, purpose, "draw", order.round, order.clients[0], at)
            yield {k: v.to(self.device) for k, v in self.task.draw(batch, rng).items()}

    def steps(self, order: Order, budget: Budget) -> int:
        """Optimiser steps that the order asks for."""
        return sum(steps(self.shards[c].train, budget) for c in order.clients)

    def together(
        self, orders: Sequence[Order], budget: Budget, purpose: str, *, stacked: bool
    ) -> tuple[Leaves, Leaves, Iterator[Batch]]:
        """Starts, memories and batches of some orders: one as it is, or many with a first axis."""
        streams = [self.batches(order, budget, purpose) for order in orders]
        starts = [self.place(self.start(order)) for order in orders]
        memories = [self.place(self.told(order)) for order in orders]
        if not stacked:
            return starts[0], memories[0], streams[0]
        return leaves.stack(starts), leaves.stack(leaves.filled(memories)), stack(streams)

    def place(self, values: Leaves) -> Leaves:
        """On the device."""
        return {k: v.to(self.device) for k, v in values.items()}


def _not_in_start(name: str) -> bool:
    return not name.startswith(KEPT)


def _not_told(name: str) -> bool:
    return not name.startswith(VARIATE)


@dataclass(frozen=True)
class Train:
    """Local updates of one round, encoded and decoded as on a network."""

    clients: Clients
    budget: Budget
    recipe: Callable[[int], Recipe]
    """For a round, since learning rates and trained leaves go by it."""

    def steps(self, order: Order) -> int:
        """Optimiser steps."""
        return self.clients.steps(order, self.budget)

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
        """Train, and return what the server gets; nothing is remembered yet."""
        return [arrived(sent) for sent in self.send(orders, stacked=stacked)]

    def send(self, orders: Sequence[Order], *, stacked: bool) -> list[Sent]:
        """Train, and return what leaves each client."""
        given = self.clients.together(orders, self.budget, "train", stacked=stacked)
        start, memory, batches = given
        recipe = self.recipe(orders[0].round)
        delta, loss = local_update(self.clients.task, start, memory, batches, recipe)
        losses = (loss.total / loss.count.clamp(min=1)).reshape(-1).tolist()
        rows = [{k: v[i] if stacked else v for k, v in delta.items()} for i in range(len(orders))]
        return [
            self._sent(order, {k: v.cpu() for k, v in own.items()}, mean)
            for order, own, mean in zip(orders, rows, losses, strict=True)
        ]

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

    def _sent(self, order: Order, delta: Leaves, loss: float) -> Sent:
        algorithm, start = self.clients.algorithm, self.clients.start(order)
        kept, steps = self.clients.remembered(order), self.steps(order)
        return Sent(
            order=order,
            payload=encode(algorithm.shared(delta, order.round)),
            memory={
                **algorithm.keeps(start, delta, kept),
                **algorithm.learns(order, delta, steps, kept),
            },
            weight=sum(self.clients.shards[c].weight for c in order.clients),
            loss=loss,
            steps=steps,
        )


def arrived(sent: Sent) -> Update:
    """The server's half: what it makes of a client's message."""
    return Update(
        order=sent.order,
        delta=decode(sent.payload),
        memory=sent.memory,
        weight=sent.weight,
        loss=sent.loss,
        steps=sent.steps,
        bytes_up=len(sent.payload),
    )


@dataclass(frozen=True)
class Personalise:
    """Each client's own tuning of the last global adapter."""

    clients: Clients
    budget: Budget
    recipe: Recipe
    patience: Patience

    def steps(self, order: Order) -> int:
        """Most optimiser steps."""
        return self.clients.steps(order, self.budget)

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Tuned]:
        """Tune, and return every client's own adapter, which goes nowhere."""
        given = self.clients.together(orders, self.budget, "personalise", stacked=stacked)
        start, memory, batches = given
        walk = descend(self.clients.task, start, memory, batches, self.recipe)
        starts = [self.clients.place(self.clients.start(order)) for order in orders]
        found = personalise(walk, starts, self._judge(orders), self.patience)
        return [
            Tuned(order, {k: v.cpu() for k, v in best.items()}, history, chosen)
            for order, (best, history, chosen) in zip(orders, found, strict=True)
        ]

    def _judge(self, orders: Sequence[Order]) -> Judge:
        task, shards = self.clients.task, self.clients.shards

        def judge(place: int, own: Leaves) -> float:
            held = self.clients.place(shards[orders[place].clients[0]].validation)
            return float(task.summary(task.evaluate(own, held))["loss"])

        return judge
