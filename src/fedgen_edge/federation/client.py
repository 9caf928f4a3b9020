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
from fedgen_edge.algorithms.local_corrections import keep_gradients
from fedgen_edge.config import Settings, Training, learning_rate
from fedgen_edge.leaves import row
from fedgen_edge.tasks.task import Task
from fedgen_edge.types import RESIDUAL, Batch, Leaves, PerClient, Phase

OptimizerFactory = Callable[[Sequence[Tensor]], Optimizer]
ValidationLoss = Callable[[int, Leaves], float]
"""Validation loss of one client (its place in the stack) with one adapter."""


def _train_every(name: str, epoch: int) -> bool:
    del name, epoch
    return True


@dataclass(frozen=True)
class Recipe:
    """How leaves are trained."""

    optimizer: OptimizerFactory
    """An elementwise one: SGD, AdamW and their kin."""
    clip: float = 0.0
    """Largest norm of a client's gradient; 0 does not clip."""
    trains: Callable[[str, int], bool] = _train_every
    """Whether a leaf is trained in an epoch."""
    corrects: Corrects = keep_gradients
    sums_gradients: bool = False
    """Whether gradients are summed, and nothing is trained."""

    @property
    def rate(self) -> float:
        """Learning rate, as the optimiser has it."""
        return self.optimizer([torch.zeros(1)]).defaults["lr"]


def get_learning_rate(settings: Settings, algorithm: Algorithm, round_: int) -> float:
    """The learning rate of a round, counted from 0."""
    t = settings.training
    if algorithm.adapts == "full" and t.lr_full is not None:
        t = replace(t, lr=t.lr_full)
    return learning_rate(t, round_, settings.federation.rounds)


def make_optimizer_factory(settings: Training, rate: float) -> OptimizerFactory:
    """A factory of torch's optimisers; AdamW's fused one reads a stack's leaves but once a step."""
    if settings.optimizer == "sgd":
        decay, momentum = settings.weight_decay, settings.momentum
        return partial(SGD, lr=rate, momentum=momentum, weight_decay=decay)
    betas, decay = settings.betas, settings.weight_decay
    return partial(AdamW, lr=rate, betas=betas, weight_decay=decay, fused=True)


class TrainingStep(NamedTuple):
    """Where training stands after a batch."""

    current: Leaves
    """Overwritten by the next step: copy what is to be kept."""
    loss: PerClient
    """Of the clients that the batch held."""
    epoch_ended: Tensor
    """Whether an epoch ended for them."""


def descend(
    task: Task, start: Leaves, memory: Leaves, batches: Iterable[Batch], recipe: Recipe
) -> Iterator[TrainingStep]:
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
    optimizers = {phase.prefix: _make_optimizer(now, phase, recipe) for phase in task.phases}
    for batch in batches:
        axes = batch["epoch"].ndim
        active = len(batch["epoch"]) if axes else None
        loss, view = None, now
        for phase in (p for p in task.phases for _ in range(p.repeats)):
            names = _list_trained(now, batch, phase, recipe)
            view = {k: v[:active] if axes else v for k, v in now.items()}
            loss = task.loss(view, batch, phase.prefix)
            if names:
                mean = (loss.total / loss.count.clamp(min=1)).sum()
                gradients = torch.autograd.grad(mean, [now[k] for k in names])
                grads = dict(zip(names, gradients, strict=True))
                with torch.no_grad():
                    grads = recipe.corrects(grads, now, start, memory)
                    _apply(
                        optimizers[phase.prefix],
                        now,
                        clip_gradients(grads, recipe.clip, axes),
                        active,
                    )
        assert loss is not None
        with torch.no_grad():
            for name, value in task.settle(view).items():
                view[name].copy_(value)
        detached = {k: v.detach() for k, v in now.items()}
        yield TrainingStep(detached, PerClient(loss.total.detach(), loss.count), batch["last"])


def _make_optimizer(now: Leaves, phase: Phase, recipe: Recipe) -> Optimizer:
    optimizer = recipe.optimizer([v for k, v in now.items() if _is_in_phase(phase, k)])
    for group in optimizer.param_groups:
        group["lr"] *= phase.rate
    return optimizer


def _is_in_phase(phase: Phase, name: str) -> bool:
    return name.startswith(phase.prefix) and not name.startswith(RESIDUAL)


def _list_trained(now: Leaves, batch: Batch, phase: Phase, recipe: Recipe) -> list[str]:
    epochs = set(batch["epoch"].flatten().tolist())
    names_per_epoch = [
        [k for k in now if _is_in_phase(phase, k) and recipe.trains(k, epoch)] for epoch in epochs
    ]
    if any(names != names_per_epoch[0] for names in names_per_epoch):
        raise ValueError("clients of one stack must train the same leaves: stack equal epochs")
    return names_per_epoch[0]


def clip_gradients(grads: Leaves, limit: float, axes: int) -> Leaves:
    """The gradients, each client's scaled down to a norm of at most the limit (0: as they are)."""
    if not limit:
        return grads
    factor = (limit / (leaves.norm(grads, axes) + 1e-6)).clamp(max=1)
    return {k: g * factor.reshape(-1, *[1] * (g.ndim - 1)) if axes else g * factor
            for k, g in grads.items()}  # fmt: skip


def _apply(optimizer: Optimizer, now: Leaves, grads: Leaves, active: int | None) -> None:
    trainable = {k: v for k, v in now.items() if v.requires_grad}
    finished = {k: v[active:].clone() for k, v in trainable.items()} if active is not None else {}
    for name, leaf in trainable.items():
        grad = grads.get(name)
        # fused steps go by places in memory, and a gradient may lie transposed
        leaf.grad = None if grad is None else grad.contiguous()
    optimizer.step()
    for name, rows in finished.items():
        if len(rows):
            now[name][active:] = rows


def local_update(
    task: Task, start: Leaves, memory: Leaves, batches: Iterable[Batch], recipe: Recipe
) -> tuple[Leaves, PerClient]:
    """Train on all the batches.

    Returns:
        How the leaves changed; and the training loss, summed over all steps, with its count.
    """
    if recipe.sums_gradients:
        return sum_gradients(task, start, batches, recipe)
    now: Leaves = start
    totals: list[PerClient] = []
    for step in descend(task, start, memory, batches, recipe):
        now = step.current
        totals.append(step.loss)
    delta = {k: now[k].detach() - start[k] for k in start}
    return delta, _sum_losses(totals)


def sum_gradients(
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

    frozen_recipe = replace(recipe, optimizer=partial(SGD, lr=0.0), clip=0.0, corrects=sum_up)
    losses = [step.loss for step in descend(task, start, {}, batches, frozen_recipe)]
    axes = losses[0].total.ndim if losses else 0
    clipped_step = leaves.scale(
        clip_gradients(sums, min(recipe.clip or 1.0, 1.0), axes), -recipe.rate
    )
    zeros = {k: torch.zeros_like(v) for k, v in start.items()}
    return {**zeros, **clipped_step}, _sum_losses(losses)


def _sum_losses(losses: Sequence[PerClient]) -> PerClient:
    """Sums over steps; later steps may lack the last clients."""
    if not losses:
        return PerClient(torch.zeros(1), torch.zeros(1))
    total, count = losses[0].total.clone(), losses[0].count.clone()
    for loss in losses[1:]:
        active = slice(len(loss.total)) if loss.total.ndim else ...
        total[active] += loss.total
        count[active] += loss.count
    return PerClient(total, count)


def choose_adapter(task: Task, adapters: Sequence[Leaves], examples: Batch) -> int:
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

    def observe(self, now: Leaves, loss: float) -> None:
        """Take note of an epoch's end."""
        lowest = self.history[self.chosen] if self.best is not None else math.inf
        lowest = math.inf if math.isnan(lowest) else lowest
        self.history.append(loss)
        if self.best is None or loss < lowest:
            self.best = {k: v.detach().clone() for k, v in now.items()}
            self.chosen = len(self.history) - 1

    def should_stop(self, patience: Patience) -> bool:
        """Whether it has waited long enough."""
        return len(self.history) - 1 - self.chosen >= patience.epochs and len(self.history) > 1


def personalize(
    steps: Iterable[TrainingStep],
    start: Sequence[Leaves],
    validate: ValidationLoss,
    patience: Patience,
) -> list[tuple[Leaves, list[float], int]]:
    """Each client's best leaves on its own validation data, with early stopping.

    Args:
        steps: of a descent from the start.
        start: each client's leaves before tuning.
        validate: validation loss of a client with some leaves.
        patience: when to stop, and whether the start may be kept.
    """
    tuners = [
        _Tuner(own if patience.fallback else None, [validate(i, own)])
        for i, own in enumerate(start)
    ]
    for step in steps:
        for i, ended in enumerate(step.epoch_ended.reshape(-1).tolist()):
            if ended and not tuners[i].should_stop(patience):
                adapter = row(step.current, i) if step.epoch_ended.ndim else step.current
                tuners[i].observe(adapter, validate(i, adapter))
        if all(tuner.should_stop(patience) for tuner in tuners):
            break
    return [
        (t.best if t.best is not None else own, t.history, t.chosen)
        for t, own in zip(tuners, start, strict=True)
    ]
