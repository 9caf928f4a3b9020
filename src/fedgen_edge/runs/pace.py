"""How long the rest of a stage will take, from what its steps have taken so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from fedgen_edge.runs.build import Experiment
from fedgen_edge.tasks.measure import Number
from fedgen_edge.types import Order


class PacePoint(NamedTuple):
    """A round, or a client that has tuned."""

    seconds: float
    work: Number = 1
    """Relative to the stage's other steps."""
    validation_seconds: float = 0.0
    """Seconds of these that went into validation; 0 where there was none."""


@dataclass
class Pace:
    """A stage's steps since this process began with it."""

    remaining_work: Number
    """Work of all the steps that are left."""
    last: float
    """When the last step ended, by the same clock as every other time here."""
    warms_up: bool = True
    """Whether the first step is slower than the others: kernels are chosen, or compiled, in it."""
    steps: list[PacePoint] = field(default_factory=list)

    def add(self, now: float, work: Number = 1, validation_seconds: float = 0.0) -> None:
        """Record a step that ends now."""
        self.steps.append(PacePoint(now - self.last, work, validation_seconds))
        self.remaining_work -= work
        self.last = now

    def estimate_remaining(self, now: float, validations: int = 0) -> float | None:
        """Seconds that the rest will take from now on; none before the first step has ended.

        Args:
            now: by the clock of `last`.
            validations: validations that are still to come.
        """
        typical = self.steps[1:] if self.warms_up and len(self.steps) > 1 else self.steps
        if not typical:
            return None
        return max(0.0, estimate(typical, self.remaining_work, validations) - (now - self.last))


def estimate(steps: Sequence[PacePoint], work: Number, validations: int) -> float:
    """Seconds for so much work and so many validations, at the mean rate of some steps."""
    rate = sum(s.seconds - s.validation_seconds for s in steps) / sum(s.work for s in steps)
    validation_seconds = [s.validation_seconds for s in steps if s.validation_seconds]
    return rate * work + (fmean(validation_seconds) * validations if validation_seconds else 0.0)


def count_validations_left(completed: int, total: int, every: int) -> int:
    """Rounds after `done` that are validated: every so many, and the last one."""
    return total // every - completed // every + (1 if total % every and completed < total else 0)


def tuning_steps(experiment: Experiment) -> Mapping[str, int]:
    """Optimiser steps that each client's personalization may take."""
    job = experiment.tune
    return {
        name: max(1, job.steps(Order((client,), 0, {})))
        for client, name in enumerate(experiment.names)
    }
