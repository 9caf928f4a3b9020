"""What one client, or a stack of clients, does with the adapter that it received.

A stack's leaves have a first axis of clients. No trained leaf is shared between clients, so the
gradient of their summed losses is the stack of their gradients, and `torch.optim`'s elementwise
optimisers work on stacks as they are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from fedgen_edge import leaves
from fedgen_edge.algorithms.algorithm import Algorithm, Corrects
from fedgen_edge.algorithms.correct import unchanged
from fedgen_edge.config import Settings, Training, learning_rate
from fedgen_edge.leaves import row
from fedgen_edge.tasks.task import Task
from fedgen_edge.types import RESIDUAL, Batch, Leaves, PerClient, Phase

Factory = Callable[[Sequence[Tensor]], Optimizer]
Judge = Callable[[int, Leaves], float]
"""Validation loss of one client (its place in the stack) with one adapter."""


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
    surveys: bool = False
    """Whether gradients are summed, and nothing is trained."""

    @property
    def rate(self) -> float:
        """Learning rate, as the optimiser has it."""
        return self.optimiser([torch.zeros(1)]).defaults["lr"]


def rate_of(settings: Settings, algorithm: Algorithm, round_: int) -> float:
    """The learning rate of a round, counted from 0."""
    t = settings.training
    if algorithm.adapts == "full" and t.lr_full is not None:
        t = replace(t, lr=t.lr_full)
    return learning_rate(t, round_, settings.federation.rounds)


def optimiser(settings: Training, rate: float) -> Factory:
    """A factory of torch's optimisers; AdamW's fused one reads a stack's leaves but once a step."""
    if settings.optimiser == "sgd":
        decay, momentum = settings.weight_decay, settings.momentum
        return partial(SGD, lr=rate, momentum=momentum, weight_decay=decay)
    betas, decay = settings.betas, settings.weight_decay
    return partial(AdamW, lr=rate, betas=betas, weight_decay=decay, fused=True)


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
    now = {
        k: v
        if k.startswith(RESIDUAL)
        else v.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for k, v in start.items()
    }
    optimisers = {phase.prefix: _optimiser(now, phase, recipe) for phase in task.phases}
    for batch in batches:
        axes = batch["epoch"].ndim
        seen = len(batch["epoch"]) if axes else None
        loss, view = None, now
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
        with torch.no_grad():
            for name, value in task.settle(view).items():
                view[name].copy_(value)
        bare = {k: v.detach() for k, v in now.items()}
        yield Step(bare, PerClient(loss.total.detach(), loss.count), batch["last"])


def _optimiser(now: Leaves, phase: Phase, recipe: Recipe) -> Optimizer:
    made = recipe.optimiser([v for k, v in now.items() if _of(phase, k)])
    for group in made.param_groups:
        group["lr"] *= phase.rate
    return made


def _of(phase: Phase, name: str) -> bool:
    return name.startswith(phase.prefix) and not name.startswith(RESIDUAL)


def _trained(now: Leaves, batch: Batch, phase: Phase, recipe: Recipe) -> list[str]:
    epochs = set(batch["epoch"].flatten().tolist())
    chosen = [[k for k in now if _of(phase, k) and recipe.trains(k, epoch)] for epoch in epochs]
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
    moving = {k: v for k, v in now.items() if v.requires_grad}
    finished = {k: v[seen:].clone() for k, v in moving.items()} if seen is not None else {}
    for name, leaf in moving.items():
        grad = grads.get(name)
        # fused steps go by places in memory, and a gradient may lie transposed
        leaf.grad = None if grad is None else grad.contiguous()
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
    if recipe.surveys:
        return surveyed(task, start, batches, recipe)
    now: Leaves = start
    totals: list[PerClient] = []
    for step in descend(task, start, memory, batches, recipe):
        now = step.now
        totals.append(step.loss)
    delta = {k: now[k].detach() - start[k] for k in start}
    return delta, _added(totals)


def surveyed(
    task: Task, start: Leaves, batches: Iterable[Batch], recipe: Recipe
) -> tuple[Leaves, PerClient]:
    """The sum of all batches' gradients at the start, as one clipped step down it.

    It is the direction that counts, and a step is judged by its size: so a clip of 0, or above 1,
    is one of 1 here, and no value moves by more than a step of AdamW would move it.
    """
    sums: Leaves = {}

    def sum_up(grads: Leaves, now: Leaves, start: Leaves, memory: Leaves) -> Leaves:
        del now, start, memory
        sums.update({k: sums[k] + g if k in sums else g for k, g in grads.items()})
        return grads

    still = replace(recipe, optimiser=partial(SGD, lr=0.0), clip=0.0, corrects=sum_up)
    losses = [step.loss for step in descend(task, start, {}, batches, still)]
    axes = losses[0].total.ndim if losses else 0
    down = leaves.scale(clipped(sums, min(recipe.clip or 1.0, 1.0), axes), -recipe.rate)
    none = {k: torch.zeros_like(v) for k, v in start.items()}
    return {**none, **down}, _added(losses)


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


def preferred(task: Task, adapters: Sequence[Leaves], examples: Batch) -> int:
    """Under which of these adapters the examples have the lowest loss; of equal ones the first."""
    losses = [float(task.summary(task.evaluate(own, examples))["loss"]) for own in adapters]
    return losses.index(min(losses))


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
        lowest = math.inf if math.isnan(lowest) else lowest
        self.history.append(loss)
        if self.best is None or loss < lowest:
            self.best = {k: v.detach().clone() for k, v in now.items()}
            self.chosen = len(self.history) - 1

    def stopped(self, patience: Patience) -> bool:
        """Whether it has waited long enough."""
        return len(self.history) - 1 - self.chosen >= patience.epochs and len(self.history) > 1


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
