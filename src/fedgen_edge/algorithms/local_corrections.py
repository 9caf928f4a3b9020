"""Slots that correct a gradient before the optimizer step."""

from collections.abc import Callable

from fedgen_edge.types import Leaves


def keep_gradients(grads: Leaves, _current: Leaves, _start: Leaves, _memory: Leaves) -> Leaves:
    """The gradient of the loss, unchanged."""
    return grads


def add_proximal_term(mu: float) -> Callable[[Leaves, Leaves, Leaves, Leaves], Leaves]:
    """Add FedProx's proximal term: the gradient of mu / 2 |current - start|^2.

    Source: Li et al. 2020, FedProx (arXiv:1812.06127).
    """

    def corrects(grads: Leaves, current: Leaves, start: Leaves, _memory: Leaves) -> Leaves:
        return {k: g + mu * (current[k] - start[k]) for k, g in grads.items()}

    return corrects


def pull_toward_shared(ditto_lambda: float) -> Callable[[Leaves, Leaves, Leaves, Leaves], Leaves]:
    """Pull a personal model toward the shared one: add the gradient of lambda / 2 |own - shared|^2.

    The shared model, as received in the round, is passed as `memory`.

    Source: Li et al. 2021, Ditto (arXiv:2012.04221), algorithm 1.
    Differs: the distance is between factors, so the distance between products depends on how they
    are factored; and the pull is clipped together with the gradient.
    """

    def corrects(grads: Leaves, current: Leaves, _start: Leaves, memory: Leaves) -> Leaves:
        return {k: g + ditto_lambda * (current[k] - memory[k]) for k, g in grads.items()}

    return corrects
