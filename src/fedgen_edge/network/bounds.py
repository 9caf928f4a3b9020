"""How far honest training can take an adapter, by the settings alone: it needs nobody's data.

What moved farther was not made by the recipe. A bound says nothing of which way it moved.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge import leaves
from fedgen_edge.algorithms.low_rank import find_pairs
from fedgen_edge.config import Training
from fedgen_edge.types import AVERAGE, Leaves, Phase

ROUNDING = 2.0**-21
"""Relative error of float32 that a step adds, at most, to a leaf and to the optimiser's moments."""
MAX_SUMMED_STEPS = 100_000
"""Steps that are summed one by one; the rest are all taken for the largest."""
MAX_EXPONENT = 50.0
"""Above e to this power a bound says nothing."""


@dataclass(frozen=True)
class Reach:
    """How far a phase's leaves can move: `gain`, and `decay` times the size of their start."""

    gain: float
    decay: float
    per_element: bool
    """Whether sizes are of each element (AdamW), or one norm over all the leaves (SGD)."""
    steps: int
    """Optimiser steps."""


@dataclass(frozen=True)
class Bounds:
    """What an honest answer of one round keeps to."""

    weight: int
    """Most training examples that a site may have."""
    training: Training | None = None
    """How the sites train; none bounds neither steps nor movement."""
    rate: float = 0.0
    """Learning rate of the round: `config.learning_rate`'s, of `lr_full` where that counts."""
    phases: tuple[Phase, ...] = (Phase(),)
    """The task's."""
    spectrum: float | None = None
    """Largest singular value of the change of a product; none is any."""
    stretch: float = 1.0
    """How many times as far as training moved, a change may seem to have moved; the gate multiplies
    it by `wire.stretch`."""
    slack: float = 0.0
    """How much farther still any value may seem to have moved: `wire.slack`."""

    def steps(self, weight: int) -> int | None:
        """Batches that a site with so many examples trains on in the round."""
        t = self.training
        return (t.steps or t.epochs * -(-weight // t.batch)) if t else None

    def reach(self, phase: Phase, steps: int) -> Reach | None:
        """How far so many batches can move the leaves of a phase; none where no bound is known."""
        t = self.training
        return compute_reach(t, self.rate * phase.rate, steps * phase.repeats) if t else None


def compute_reach(training: Training, rate: float, steps: int) -> Reach | None:
    """The longest way that the optimiser can take in so many steps, whatever the gradients are.

    AdamW divides a mean m of gradients by the root of a mean v of their squares. By the inequality
    of Cauchy and Schwarz, step t moves an element by at most the rate times

        (1 - b1) / sqrt(1 - b2) * sqrt(sum of (b1^2 / b2)^j, j < t) * sqrt(1 - b2^t) / (1 - b1^t),

    and gradients that grow by b2 / b1 from step to step reach it in every step. So the sum over
    steps is sound, and the smallest that is. Weight decay takes away a share of the element in each
    step, together at most `decay` of its start.

    SGD with clipped gradients adds a vector no longer than `clip`, and `weight_decay` times the
    leaves, to a momentum that is at most 1 / (1 - momentum) times the longest of them.

    Args:
        training: the optimiser and its parameters.
        rate: its learning rate.
        steps: that it takes.

    Returns:
        None where no bound is known: SGD without clipping; AdamW with b1^2 >= b2; and weight decay
        that takes more than all in a step, or could make leaves grow without end.

    Differs: Kingma & Ba 2015 (arXiv:1412.6980, section 2.1) say max(1, (1 - b1) / sqrt(1 - b2)) of
    a step, the size for one gradient after many that are zero; growing gradients exceed it.
    """
    return (_adamw if training.optimizer == "adamw" else _sgd)(training, rate, steps)


def _adamw(training: Training, rate: float, steps: int) -> Reach | None:
    (beta1, beta2), step_decay = training.betas, rate * training.weight_decay
    if step_decay > 1 or (beta1 and beta1**2 >= beta2):
        return None
    return Reach(
        rate * _sum_moment_quotients(beta1, beta2, steps),
        1 - (1 - step_decay) ** steps,
        True,
        steps,
    )


@lru_cache
def _sum_moment_quotients(beta1: float, beta2: float, steps: int) -> float:
    """Sum over the steps of the largest quotient of AdamW's two moments."""
    ratio = beta1**2 / beta2 if beta1 else 0.0
    max_quotient = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio))
    t = np.arange(1, min(steps, MAX_SUMMED_STEPS) + 1, dtype=np.float64)
    quotients = max_quotient * np.sqrt((1 - ratio**t) * (1 - beta2**t)) / (1 - beta1**t)
    return float(quotients.sum()) + max(0, steps - MAX_SUMMED_STEPS) * max_quotient / (
        1 - beta1**MAX_SUMMED_STEPS
    )


def _sgd(training: Training, rate: float, steps: int) -> Reach | None:
    step, decay = rate / (1 - training.momentum), training.weight_decay
    power = steps * math.log1p(step * decay)
    if not training.clip or power > MAX_EXPONENT:
        return None
    growth = math.expm1(power)
    return Reach(training.clip * (growth / decay if decay else step * steps), growth, False, steps)


def find_excess(bounds: Bounds, steps: int, start: Leaves, delta: Leaves) -> str | None:
    """Why a change is none that so many batches can make; none where it may be.

    Args:
        bounds: of the round.
        steps: batches that the site trained on.
        start: the leaves that it began from.
        delta: how they changed.
    """
    if bounds.stretch != 1:
        return _find_joint_excess(bounds, steps, start, delta)
    for phase in bounds.phases:
        phase_reach = bounds.reach(phase, steps)
        names = _select_phase(phase, delta)
        if phase_reach is not None:
            excesses = (
                _find_group_excess(phase_reach, group, start, delta)
                for group in _group_names(names, per_element=phase_reach.per_element)
            )
            excess = next(filter(None, excesses), None)
            if excess:
                return excess
    return None


def _find_joint_excess(bounds: Bounds, steps: int, start: Leaves, delta: Leaves) -> str | None:
    """The same where leaves travel as one vector, so that the largest of all may have moved any."""
    if math.isinf(bounds.stretch):
        return None
    limits, per_element = [], True
    for phase in bounds.phases:
        phase_reach, names = bounds.reach(phase, steps), _select_phase(phase, delta)
        if phase_reach is None or any(name.removeprefix(AVERAGE) not in start for name in names):
            return None
        per_element = phase_reach.per_element
        limits += [
            float(_compute_limit(phase_reach, group, start).max())
            for group in _group_names(names, per_element=per_element)
        ]
    limit = bounds.stretch * (max(limits, default=0.0) if per_element else sum(limits))
    change = max(map(leaves.max_magnitude, delta.values()), default=0.0)
    if not per_element:
        change = float(torch.linalg.vector_norm(leaves.flatten(delta)))
    limit += bounds.slack * (1.0 if per_element else sum(v.numel() for v in delta.values()) ** 0.5)
    if change <= limit:
        return None
    subject = "an element" if per_element else "the norm of all leaves"
    return f"{subject} changed by {change:.3g}, and so many steps reach at most {limit:.3g}"


def _select_phase(phase: Phase, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.removeprefix(AVERAGE).startswith(phase.prefix)]


def _group_names(names: Sequence[str], *, per_element: bool) -> list[list[str]]:
    """Leaves whose sizes are bounded together: averages apart from what they follow."""
    if per_element:
        return [[name] for name in names]
    parts = ([k for k in names if k.startswith(AVERAGE) == follows] for follows in (False, True))
    return [part for part in parts if part]


def _find_group_excess(
    phase_reach: Reach, names: Sequence[str], start: Leaves, delta: Leaves
) -> str | None:
    """A moving average lies between its start and what it follows, wherever that has been.

    So it moves as far as that one at most, and the gap that there was between them.
    """
    followed = [name.removeprefix(AVERAGE) for name in names]
    if any(name not in start for name in followed):
        return None
    min_limit = phase_reach.gain * (1 + phase_reach.steps * ROUNDING)
    if (
        phase_reach.per_element
        and max(leaves.max_magnitude(delta[name]) for name in names) <= min_limit
    ):
        return None  # the common case, for a fraction of the work: the rest only adds to the limit
    size = torch.abs if phase_reach.per_element else torch.linalg.vector_norm
    moved, limit = _flatten(delta, names), _compute_limit(phase_reach, names, start)
    excess = (size(moved) - limit).reshape(-1)
    if not bool((excess > 0).any()):
        return None
    worst = int(excess.argmax())
    subject = (
        ("an element of " + names[0])
        if phase_reach.per_element
        else f"the norm of {len(names)} leaves"
    )
    change, max_change = float(size(moved).reshape(-1)[worst]), float(limit.reshape(-1)[worst])
    return (
        f"{subject} changed by {change:.3g}, and {phase_reach.steps} steps reach at "
        f"most {max_change:.3g}"
    )


def _compute_limit(
    phase_reach: Reach, names: Sequence[str], start: Leaves
) -> Float[Tensor, "*values"]:
    """How far these leaves can move: each element, or the norm of all."""
    size = torch.abs if phase_reach.per_element else torch.linalg.vector_norm
    slack = phase_reach.steps * ROUNDING
    start_values, followed_start = (
        _flatten(start, names),
        _flatten(start, [n.removeprefix(AVERAGE) for n in names]),
    )
    limit = phase_reach.gain * (1 + slack) + (phase_reach.decay + slack) * size(followed_start)
    return limit + size(followed_start - start_values) + slack * size(start_values)


def _flatten(values: Leaves, names: Sequence[str]) -> Float[Tensor, " values"]:
    return leaves.flatten({name: values[name] for name in names})


def compute_spectral_norm(start: Leaves, delta: Leaves) -> float:
    """Largest singular value of the change of any layer's product B A, without alpha / rank.

    The change is dB (A + dA) + B dA = [dB, B] [A + dA; dA]: of rank 2r, so the dense matrix is not
    needed. A convolution's A is taken as a matrix, as `adapters/lora.py` does. A factor that is not
    sent has stayed as it began; without a pair the value is 0.

    Args:
        start: the factors before.
        delta: how they changed; finite.
    """
    norms = [0.0]
    for pair in find_pairs(start):
        if delta.keys() & {*pair}:
            start_factors = [start[name] for name in pair]
            factor_changes = [delta.get(name, torch.zeros_like(start[name])) for name in pair]
            norms.append(
                _compute_product_norm(
                    *(v.double().flatten(1) for v in (*start_factors, *factor_changes))
                )
            )
    return max(norms)


def _compute_product_norm(
    a: Float[Tensor, "rank in_"],
    b: Float[Tensor, "out rank"],
    da: Float[Tensor, "rank in_"],
    db: Float[Tensor, "out rank"],
) -> float:
    left, right = torch.cat([db, b], 1), torch.cat([a + da, da])
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
    return float(torch.linalg.matrix_norm(core, 2))
