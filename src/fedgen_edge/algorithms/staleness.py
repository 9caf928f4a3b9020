"""Slots that weight an update trained from an older version than the server's."""

from collections.abc import Callable
from dataclasses import replace

from fedgen_edge import leaves
from fedgen_edge.types import Update


def ignore_staleness(_staleness: int) -> float:
    """Full weight, however stale the update is."""
    return 1.0


def make_polynomial_decay(exponent: float) -> Callable[[int], float]:
    """The weight (1 + s)^-exponent for an update that is s commits behind.

    A buffer's mean divides by the examples of all its updates, so a stale buffer moves the server
    less, as in the paper, and a fresh one moves it as FedAvg does.

    Source: Nguyen et al. 2022, FedBuff (arXiv:2106.06639), whose exponent is 1/2.
    Differs: updates are also weighted by examples, not equally.
    """
    return lambda behind: (1.0 + behind) ** -exponent


def discount_update(update: Update, factor: float) -> Update:
    """The update with its change scaled by the factor."""
    return replace(update, delta=leaves.scale(update.delta, factor))
