"""Slots about what the server does with the merged change."""

from dataclasses import replace

from fedgen_edge import leaves
from fedgen_edge.types import Leaves, ServerState


def add(state: ServerState, change: Leaves) -> ServerState:
    """Add it: FedAvg's step, of size one."""
    return replace(state, adapter=leaves.add(state.adapter, change))
