"""Slots about what is told and remembered beside leaves, by default."""

from fedgen_edge.types import Leaves, Order, ServerState


def nothing(state: ServerState, among: int) -> Leaves:
    """The adapter travels alone."""
    del state, among
    return {}


def nothing_learnt(order: Order, delta: Leaves, steps: int, memory: Leaves) -> Leaves:
    """Clients remember leaves alone."""
    del order, delta, steps, memory
    return {}
