"""Encode and decode the leaves that server and clients exchange in a round, in both directions.

Without a chain, leaves are sent unchanged, each under its name. With one, the server broadcasts the
adapter's change since before the first round, and every client can compute that starting adapter.
"""

from dataclasses import dataclass, field
from math import inf

import torch

from fedgen_edge.compression.chain import (
    Chain,
    compress,
    compress_with_feedback,
    decompress,
    get_max_bytes,
)
from fedgen_edge.compression.low_rank import LowRank
from fedgen_edge.compression.packing import Zstd
from fedgen_edge.compression.quantize import SMALLEST_FP16, Cast, Quantize
from fedgen_edge.compression.serialize import Schema, count_encoded_bytes, decode, encode
from fedgen_edge.compression.sparsify import RandomK, TopK
from fedgen_edge.config import Compression
from fedgen_edge.leaves import add, scale
from fedgen_edge.seeds import generator, seed
from fedgen_edge.types import Leaves

RESIDUAL_PREFIX = "left:"
"""Prefix, in a client's memory, of its error-feedback residual."""
LAST_ROUND_KEY = "since:left"
"""Key, in a client's memory, of the round of its last payload."""
NO_COMPRESSION = Chain()
"""Leaves are sent unchanged, each under its name."""


@dataclass(frozen=True)
class Wire:
    """How a run encodes the leaves it sends, as both sides know it."""

    down: Chain = NO_COMPRESSION
    up: Chain = NO_COMPRESSION
    feedback: bool = False
    """Whether a client adds its residual to its next update (error feedback)."""
    decay: float = 1.0
    """Fraction of the residual that remains for each round that the client missed since."""
    seed: int = 0
    base: Leaves = field(default_factory=dict)
    """The adapter before the first round; needed only if `down` has stages."""


def make_wire(up: Compression, down: Compression, seed_: int, base: Leaves) -> Wire:
    """Make the wire that the settings describe.

    Raises:
        MissingExtraError: zstd is not installed.
    """
    low_rank = [LowRank(up.low_rank)] if up.low_rank else []
    # scaled values would be larger than the originals, and error feedback would diverge
    random_k = [RandomK(up.density, scaled=not up.feedback)] if up.sparsify == "random-k" else []
    return Wire(
        Chain(_make_stages(down)),
        Chain((*low_rank, *random_k, *_make_stages(up))),
        up.feedback,
        up.decay,
        seed_,
        base if _make_stages(down) else {},
    )


def _make_stages(settings: Compression) -> tuple[TopK | Cast | Quantize | Zstd, ...]:
    top_k = [TopK(settings.density)] if settings.sparsify == "top-k" else []
    value_encoders = {
        "fp32": [],
        "fp16": [Cast("fp16")],
        "bf16": [Cast("bf16")],
        "int8": [Quantize(8, settings.block)],
        "int4": [Quantize(4, settings.block)],
    }
    return (
        *top_k,
        *value_encoders[settings.dtype],
        *([Zstd(settings.zstd)] if settings.zstd else []),
    )


def encode_broadcast(wire: Wire, leaves: Leaves, round_: int) -> bytes:
    """Encode what the server sends to the clients of a round."""
    if not wire.down.stages:
        return encode(leaves)
    change = add(leaves, scale(_select_base(wire, leaves), -1.0))
    return compress(wire.down, change, generator(wire.seed, "rounding", round_), 0)


def decode_broadcast(wire: Wire, payload: bytes, schema: Schema) -> Leaves:
    """Decode what a client received.

    Raises:
        RefusedError: the payload does not hold these leaves.
    """
    if not wire.down.stages:
        return decode(payload)
    change = decompress(wire.down, payload, schema, 0)
    return add(change, _select_base(wire, change))


def encode_update(
    wire: Wire, delta: Leaves, memory: Leaves, round_: int, client: int
) -> tuple[bytes, Leaves]:
    """Encode a client's update, and return what the client remembers if the update counts.

    Args:
        wire: the wire of the run.
        delta: the update that the client shares.
        memory: the client's memory.
        round_: counted from 0.
        client: its number; with the round, it seeds the rounding and the choice of values.

    Raises:
        TrainingError: the update is not finite, or too large for its type.
    """
    rng, position_seed = (
        generator(wire.seed, "rounding", round_, client),
        _get_position_seed(wire, round_, client),
    )
    if not wire.up.stages:
        return encode(delta), {}
    if not wire.feedback or not delta:
        return compress(wire.up, delta, rng, position_seed), {}
    missed_rounds = (
        max(0, round_ - int(memory[LAST_ROUND_KEY]) - 1) if LAST_ROUND_KEY in memory else 0
    )
    residual = {k: memory[RESIDUAL_PREFIX + k] for k in delta if RESIDUAL_PREFIX + k in memory}
    payload, new_residual = compress_with_feedback(
        wire.up, delta, residual, wire.decay**missed_rounds, rng, position_seed
    )
    return payload, {
        LAST_ROUND_KEY: torch.tensor(float(round_)),
        **{RESIDUAL_PREFIX + k: v for k, v in new_residual.items()},
    }


def decode_update(wire: Wire, payload: bytes, schema: Schema, round_: int, client: int) -> Leaves:
    """Decode a client's update at the server.

    Raises:
        RefusedError: the payload does not hold these leaves; without a chain, see
            `network.payload`.
    """
    if not wire.up.stages:
        return decode(payload)
    return decompress(wire.up, payload, schema, _get_position_seed(wire, round_, client))


def get_max_bytes_up(wire: Wire, schema: Schema) -> int:
    """Return the maximum bytes of a client's payload."""
    return get_max_bytes(wire.up, schema) if wire.up.stages else count_encoded_bytes(schema)


def get_max_bytes_down(wire: Wire, schema: Schema) -> int:
    """Return the maximum bytes that the server sends to a client."""
    return get_max_bytes(wire.down, schema) if wire.down.stages else count_encoded_bytes(schema)


def get_error_factor(wire: Wire) -> float:
    """Bound how many times larger than the trained change an honest decoded update may be.

    The bound holds for the largest element and for the norm: a rounded value is off by less than
    one level of its block's largest value, and scaled random-k multiplies. With error feedback it
    covers all rounds so far. For low-rank, and for coarse values that feedback may accumulate, no
    bound is known.
    """
    value_encoder = wire.up.value_encoder
    relative_error = (
        value_encoder.block**0.5 / value_encoder.levels
        if isinstance(value_encoder, Quantize)
        else 2.0**-7
    )
    if wire.up.low_rank or (wire.feedback and relative_error >= 1):
        return inf
    return _get_max_scale(wire) * (1 + relative_error) if wire.up.stages else 1.0


def get_error_margin(wire: Wire, round_: int) -> float:
    """Bound how much farther any decoded value may be off, however little training moved it.

    Near zero, fp16 has steps of 2^-24, and the scales of int8 and int4 are fp16: there the error is
    not proportional to the value. Scaled random-k multiplies it; with feedback each round adds one.

    Args:
        wire: the wire of the run.
        round_: counted from 0.
    """
    uses_fp16 = isinstance(wire.up.value_encoder, Quantize) or wire.up.value_encoder.name == "fp16"
    return (
        SMALLEST_FP16 * _get_max_scale(wire) * (round_ + 1 if wire.feedback else 1)
        if uses_fp16
        else 0.0
    )


def _get_max_scale(wire: Wire) -> float:
    """Return the largest factor by which the receiver multiplies values."""
    sparsifier = wire.up.sparsifier
    return 1 / sparsifier.density if isinstance(sparsifier, RandomK) and sparsifier.scaled else 1.0


def _select_base(wire: Wire, leaves: Leaves) -> Leaves:
    """Return the leaves that existed before the first round, truncated to the ranks of these."""
    return {
        k: wire.base[k][tuple(slice(n) for n in v.shape)]
        for k, v in leaves.items()
        if k in wire.base
    }


def _get_position_seed(wire: Wire, round_: int, client: int) -> int:
    return seed(wire.seed, "places", round_, client)
