"""Slots about a gradient before the optimiser sees it."""

from collections.abc import Callable

from fedgen_edge.types import Leaves


def keep_gradients(grads: Leaves, current: Leaves, start: Leaves, memory: Leaves) -> Leaves:
    """The gradient of the loss alone."""
    del current, start, memory
    return grads


def add_proximal_term(mu: float) -> Callable[[Leaves, Leaves, Leaves, Leaves], Leaves]:
    """Pull towards the received adapter: the gradient of mu / 2 |now - start|^2 is added.

    Source: Li et al. 2020, FedProx (arXiv:1812.06127).
    """

    def corrects(grads: Leaves, current: Leaves, start: Leaves, memory: Leaves) -> Leaves:
        del memory
        return {k: g + mu * (current[k] - start[k]) for k, g in grads.items()}

    return corrects


def pull_toward_shared(ditto_lambda: float) -> Callable[[Leaves, Leaves, Leaves, Leaves], Leaves]:
    """Pull a client's own model towards the shared one: the gradient of pull / 2 |own - shared|^2.

    The shared one is what the client received in the round, in the memory's place.

    Source: Li et al. 2021, Ditto (arXiv:2012.04221), algorithm 1.
    Differs: the distance is between factors, so that of products depends on how they are factored;
    and the pull is clipped with the gradient.
    """

    def corrects(grads: Leaves, current: Leaves, start: Leaves, memory: Leaves) -> Leaves:
        del start
        return {k: g + ditto_lambda * (current[k] - memory[k]) for k, g in grads.items()}

    return corrects
