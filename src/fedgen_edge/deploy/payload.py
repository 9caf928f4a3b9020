"""What a payload must be before it is used: these leaves, float32, finite."""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError

from fedgen_edge.errors import RefusedError
from fedgen_edge.types import Leaves
from fedgen_edge.uplink.transform import decode, length


def fitting(payload: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Leaves:
    """The leaves of a payload, which must be these, float32 and finite.

    Raises:
        RefusedError: they are not; what is of another size is not even parsed.
    """
    if len(payload) != length(shapes):
        raise RefusedError(
            "wrong-size", f"the payload has {len(payload)} bytes, such leaves {length(shapes)}"
        )
    try:
        found = decode(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise RefusedError("malformed", f"the payload is no safetensors: {error}") from None
    if {k: tuple(v.shape) for k, v in found.items()} != shapes:
        raise RefusedError("wrong-leaves", "the payload's names or shapes are not this adapter's")
    if any(v.dtype != torch.float32 for v in found.values()):
        raise RefusedError("wrong-type", "the payload's leaves are not all float32")
    if not finite(found):
        raise RefusedError("not-finite", "the payload has values that are not finite")
    return found


def finite(found: Leaves) -> bool:
    """Whether every value is a finite number."""
    return all(bool(v.isfinite().all()) for v in found.values())
