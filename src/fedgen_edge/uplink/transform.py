"""From leaves to the bytes that travel, and back: every engine runs both, both ways.

So bytes and rounding are the same wherever clients run, and a count is a length, never a formula.
"""

from safetensors.torch import load, save

from fedgen_edge.types import Leaves


def encode(leaves: Leaves) -> bytes:
    """One safetensors file: names, shapes, types and values."""
    return save({k: v.detach().contiguous().cpu() for k, v in sorted(leaves.items())})


def decode(payload: bytes) -> Leaves:
    """The leaves of a payload."""
    return load(payload)


def deliver(leaves: Leaves) -> tuple[Leaves, int]:
    """What arrives, and the bytes that it took; nothing to send takes none."""
    if not leaves:
        return {}, 0
    payload = encode(leaves)
    return decode(payload), len(payload)
