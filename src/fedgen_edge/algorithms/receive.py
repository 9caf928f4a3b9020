"""Slots about what a client begins from."""

from fedgen_edge.types import Leaves

KEPT = "kept:"
"""Prefix, in a client's memory, of leaves that it never sends."""


def own_over_shared(adapter: Leaves, memory: Leaves) -> Leaves:
    """The global adapter, with the leaves that the client has kept in their place."""
    own = {k.removeprefix(KEPT): v for k, v in memory.items() if k.startswith(KEPT)}
    return {**adapter, **own}
