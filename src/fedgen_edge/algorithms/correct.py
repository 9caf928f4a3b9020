"""Slots about a gradient before the optimiser sees it."""

from collections.abc import Callable

from fedgen_edge.types import Leaves


def unchanged(grads: Leaves, now: Leaves, start: Leaves, memory: Leaves) -> Leaves:
    """The gradient of the loss alone."""
    del now, start, memory
    return grads


def proximal(mu: float) -> Callable[[Leaves, Leaves, Leaves, Leaves], Leaves]:
    """Pull towards the received adapter: the gradient of mu / 2 |now - start|^2 is added.

    Source: Li et al. 2020, FedProx (arXiv:1812.06127).
    """

    def corrects(grads: Leaves, now: Leaves, start: Leaves, memory: Leaves) -> Leaves:
        del memory
        return {k: g + mu * (now[k] - start[k]) for k, g in grads.items()}

    return corrects
