"""What one client, or a stack of clients, does with the adapter that it received.

A stack's leaves have a first axis of clients. No trained leaf is shared between clients, so the
gradient of their summed losses is the stack of their gradients, and `torch.optim`'s elementwise
optimisers work on stacks as they are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgen_edge import leaves
from fedgen_edge.algorithms.algorithm import Algorithm, Corrects
from fedgen_edge.algorithms.correct import unchanged
from fedgen_edge.algorithms.receive import KEPT
from fedgen_edge.data.batches import Budget, Shard, deal, interleave, stack, steps
from fedgen_edge.leaves import row, select
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import Task
from fedgen_edge.types import Batch, Leaves, Order, PerClient, Phase, Update
from fedgen_edge.uplink.transform import deliver

Factory = Callable[[Sequence[Tensor]], Optimizer]
Judge = Callable[[int, Leaves], float]
"""Validation loss of one client (its place in the stack) with one adapter."""


def _not_kept(name: str) -> bool:
    """Leaves that a client keeps are in its start already."""
    return not name.startswith(KEPT)


def _every(name: str, epoch: int) -> bool:
    del name, epoch
    return True


@dataclass(frozen=True)
class Recipe:
    """How leaves are trained."""

    optimiser: Factory
    """An elementwise one: SGD, AdamW and their kin."""
    clip: float = 0.0
    """Largest norm of a client's gradient; 0 does not clip."""
    trains: Callable[[str, int], bool] = _every
    """Whether a leaf is trained in an epoch."""
    corrects: Corrects = unchanged


class Step(NamedTuple):
    """Where training stands after a batch."""

    now: Leaves
    """Overwritten by the next step: copy what is to be kept."""
    loss: PerClient
    """Of the clients that the batch held."""
    last: Tensor
    """Whether an epoch ended for them."""


def descend(
    task: Task, start: Leaves, memory: Leaves, batches: Iterable[Batch], recipe: Recipe
) -> Iterator[Step]:
    """Train a copy of the received leaves, batch by batch.

    A stack's batches hold the clients that still have some, which are its first ones; the rows of
    the others are put back after each step, since AdamW moves them even at zero gradient.

    Args:
        task: whose loss is lowered: each client's sum over its count.
        start: the received leaves, `[*clients, *shape]` each.
        memory: what the clients keep, for `corrects`.
        batches: `[*clients, batch, ...]` each.
        recipe: optimiser, clipping and corrections.
    """
    now = {k: v.detach().clone().requires_grad_() for k, v in start.items()}
    optimisers = {
        phase.prefix: recipe.optimiser([v for k, v in now.items() if k.startswith(phase.prefix)])
        for phase in task.phases
    }
    for batch in batches:
        axes = batch["epoch"].ndim
        seen = len(batch["epoch"]) if axes else None
        loss = None
        for phase in (p for p in task.phases for _ in range(p.repeats)):
            names = _trained(now, batch, phase, recipe)
            view = {k: v[:seen] if axes else v for k, v in now.items()}
            loss = task.loss(view, batch, phase.prefix)
            if names:
                mean = (loss.total / loss.count.clamp(min=1)).sum()
                slopes = torch.autograd.grad(mean, [now[k] for k in names])
                grads = dict(zip(names, slopes, strict=True))
                with torch.no_grad():
                    grads = recipe.corrects(grads, now, start, memory)
                    _apply(optimisers[phase.prefix], now, clipped(grads, recipe.clip, axes), seen)
        assert loss is not None
        bare = {k: v.detach() for k, v in now.items()}
        yield Step(bare, PerClient(loss.total.detach(), loss.count), batch["last"])


def _trained(now: Leaves, batch: Batch, phase: Phase, recipe: Recipe) -> list[str]:
    epochs = set(batch["epoch"].flatten().tolist())
    chosen = [
        [k for k in now if k.startswith(phase.prefix) and recipe.trains(k, epoch)]
        for epoch in epochs
    ]
    if any(names != chosen[0] for names in chosen):
        raise ValueError("clients of one stack must train the same leaves: stack equal epochs")
    return chosen[0]


def clipped(grads: Leaves, limit: float, axes: int) -> Leaves:
    """The gradients, each client's scaled down to a norm of at most the limit (0: as they are)."""
    if not limit:
        return grads
    factor = (limit / (leaves.norm(grads, axes) + 1e-6)).clamp(max=1)
    return {k: g * factor.reshape(-1, *[1] * (g.ndim - 1)) if axes else g * factor
            for k, g in grads.items()}  # fmt: skip


def _apply(optimiser: Optimizer, now: Leaves, grads: Leaves, seen: int | None) -> None:
    finished = {k: v[seen:].clone() for k, v in now.items()} if seen is not None else {}
    for name, leaf in now.items():
        leaf.grad = grads.get(name)
    optimiser.step()
    for name, rows in finished.items():
        if len(rows):
            now[name][seen:] = rows


def local_update(
    task: Task, start: Leaves, memory: Leaves, batches: Iterable[Batch], recipe: Recipe
) -> tuple[Leaves, PerClient]:
    """Train on all the batches.

    Returns:
        How the leaves changed; and the training loss, summed over all steps, with its count.
    """
    now: Leaves = start
    totals: list[PerClient] = []
    for step in descend(task, start, memory, batches, recipe):
        now = step.now
        totals.append(step.loss)
    delta = {k: now[k].detach() - start[k] for k in start}
    return delta, _added(totals)


def _added(losses: Sequence[PerClient]) -> PerClient:
    """Sums over steps; later steps may lack the last clients."""
    if not losses:
        return PerClient(torch.zeros(1), torch.zeros(1))
    total, count = losses[0].total.clone(), losses[0].count.clone()
    for loss in losses[1:]:
        seen = slice(len(loss.total)) if loss.total.ndim else ...
        total[seen] += loss.total
        count[seen] += loss.count
    return PerClient(total, count)


@dataclass(frozen=True)
class Patience:
    """When a client stops tuning, and what it keeps."""

    epochs: int = 1
    """Epochs without a better validation loss."""
    fallback: bool = True
    """Keep the start where no epoch was better."""


@dataclass
class _Tuner:
    """One client's best leaves so far."""

    best: Leaves | None
    history: list[float]
    chosen: int = 0

    def look(self, now: Leaves, loss: float) -> None:
        """Take note of an epoch's end."""
        lowest = self.history[self.chosen] if self.best is not None else math.inf
        self.history.append(loss)
        if self.best is None or loss < lowest:
            self.best = {k: v.detach().clone() for k, v in now.items()}
            self.chosen = len(self.history) - 1

    def stopped(self, patience: Patience) -> bool:
        """Whether it has waited long enough."""
        return len(self.history) - 1 - self.chosen >= patience.epochs and len(self.history) > 1


class Tuned(NamedTuple):
    """One client's own adapter."""

    order: Order
    adapter: Leaves
    history: list[float]
    """Validation loss at the start, then after each epoch."""
    chosen: int
    """The epoch that it kept; 0 is the start."""


def personalise(
    steps: Iterable[Step], start: Sequence[Leaves], judge: Judge, patience: Patience
) -> list[tuple[Leaves, list[float], int]]:
    """Each client's best leaves on its own validation data, with early stopping.

    Args:
        steps: of a descent from the start.
        start: each client's leaves before tuning.
        judge: validation loss of a client with some leaves.
        patience: when to stop, and whether the start may be kept.
    """
    tuners = [
        _Tuner(own if patience.fallback else None, [judge(i, own)]) for i, own in enumerate(start)
    ]
    for step in steps:
        for i, ended in enumerate(step.last.reshape(-1).tolist()):
            if ended and not tuners[i].stopped(patience):
                own = row(step.now, i) if step.last.ndim else step.now
                tuners[i].look(own, judge(i, own))
        if all(tuner.stopped(patience) for tuner in tuners):
            break
    return [
        (t.best if t.best is not None else own, t.history, t.chosen)
        for t, own in zip(tuners, start, strict=True)
    ]


@dataclass(frozen=True)
class Clients:
    """The clients of a simulation: their data, and what they do with an order."""

    task: Task
    shards: Sequence[Shard]
    seed: int
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))

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
        starts = [self.place(order.start) for order in orders]
        memories = [self.place(select(order.memory, _not_kept)) for order in orders]
        if not stacked:
            return starts[0], memories[0], streams[0]
        return leaves.stack(starts), leaves.stack(leaves.filled(memories)), stack(streams)

    def place(self, values: Leaves) -> Leaves:
        """On the device."""
        return {k: v.to(self.device) for k, v in values.items()}


@runtime_checkable
class Job(Protocol):
    """What an engine has clients do; it decides who works together, and knows no method."""

    def steps(self, order: Order) -> int:
        """How long the order is."""
        ...

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update] | list[Tuned]:
        """Carry out the orders, none longer than the one before it; unstacked: just one."""
        ...


@dataclass(frozen=True)
class Train:
    """Local updates of one round, encoded and decoded as on a network."""

    clients: Clients
    algorithm: Algorithm
    budget: Budget
    recipe: Callable[[int], Recipe]
    """For a round, since learning rates and trained leaves go by it."""

    def steps(self, order: Order) -> int:
        """Optimiser steps."""
        return self.clients.steps(order, self.budget)

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
        """Train, and return what the server gets."""
        given = self.clients.together(orders, self.budget, "train", stacked=stacked)
        start, memory, batches = given
        delta, loss = local_update(
            self.clients.task, start, memory, batches, self.recipe(orders[0].round)
        )
        losses = (loss.total / loss.count.clamp(min=1)).reshape(-1).tolist()
        rows = [{k: v[i] if stacked else v for k, v in delta.items()} for i in range(len(orders))]
        return [
            self._update(order, {k: v.cpu() for k, v in own.items()}, mean)
            for order, own, mean in zip(orders, rows, losses, strict=True)
        ]

    def _update(self, order: Order, delta: Leaves, loss: float) -> Update:
        shared = self.algorithm.sends(list(delta))
        sent, size = deliver(select(delta, shared.__contains__))
        return Update(
            order=order,
            delta=sent,
            memory=self.algorithm.keeps(leaves.add(order.start, delta)),
            weight=sum(self.clients.shards[c].weight for c in order.clients),
            loss=loss,
            steps=self.steps(order),
            bytes_up=size,
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
        starts = [self.clients.place(order.start) for order in orders]
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
