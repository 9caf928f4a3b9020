"""Serialize leaves and read them back: every engine does both, in both directions.

So bytes and rounding are the same wherever clients run, and bytes are measured, not estimated.
"""

import json
import math
from collections.abc import Mapping, Sequence

from safetensors.torch import load, save

from fedgen_edge.types import Leaves

Schema = Mapping[str, tuple[int, ...]]
"""Shapes of float32 leaves, by name."""


def encode(leaves: Leaves) -> bytes:
    """Write one safetensors file of names, shapes, types and values; no leaves give no bytes."""
    if not leaves:
        return b""
    return save({k: v.detach().contiguous().cpu() for k, v in sorted(leaves.items())})


def decode(payload: bytes) -> Leaves:
    """Read a payload's leaves, in the order of their names, which sums over leaves depend on."""
    return dict(sorted(load(payload).items())) if payload else {}


def count_encoded_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Count the bytes of `encode` for float32 leaves of these shapes, without creating them.

    This is for what was not sent (a full model's update); what was sent is measured.
    """
    if not shapes:
        return 0
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, shape in sorted(shapes.items()):
        size = 4 * math.prod(shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset
