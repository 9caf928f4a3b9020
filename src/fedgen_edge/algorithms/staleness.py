"""Slots about what an update counts that began from an older version than the server's."""

from collections.abc import Callable
from dataclasses import replace

from fedgen_edge import leaves
from fedgen_edge.types import Update


def ignore_staleness(staleness: int) -> float:
    """All of it, however old it is."""
    del staleness
    return 1.0


def make_polynomial_decay(exponent: float) -> Callable[[int], float]:
    """(1 + s)^-exponent of an update that is s commits behind.

    The mean of a buffer is over the examples of all that is in it, so a stale buffer moves the
    server less, as the paper has it, and a fresh one moves it as FedAvg does.

    Source: Nguyen et al. 2022, FedBuff (arXiv:2106.06639), whose exponent is 1/2.
    Differs: updates are weighed by examples too, and not alike.
    """
    return lambda behind: (1.0 + behind) ** -exponent


def discount_update(update: Update, factor: float) -> Update:
    """The update with so much of its change."""
    return replace(update, delta=leaves.scale(update.delta, factor))
