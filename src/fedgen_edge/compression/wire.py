"""How leaves travel in a round, in both directions: what is made of them, and what arrives.

Without a chain they go as they are, each under its name. With one, what goes down is the adapter's
change since before the first round, which every client can make for itself.
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
from fedgen_edge.config import Downlink, Uplink
from fedgen_edge.leaves import add, scale
from fedgen_edge.seeds import generator, seed
from fedgen_edge.types import Leaves

RESIDUAL_PREFIX = "left:"
"""Prefix, in a client's memory, of what its payloads have left out."""
LAST_ROUND_KEY = "since:left"
"""In a client's memory: the round of its last payload."""
NO_COMPRESSION = Chain()
"""Leaves go as they are, each under its name."""


@dataclass(frozen=True)
class Wire:
    """What both sides of a run know of how leaves travel."""

    down: Chain = NO_COMPRESSION
    up: Chain = NO_COMPRESSION
    feedback: bool = False
    """Whether a client adds what its payloads left out to its next change."""
    decay: float = 1.0
    """Share of that which stays, for each round that the client missed since."""
    seed: int = 0
    base: Leaves = field(default_factory=dict)
    """The adapter before the first round; needed only where `down` has stages."""


def make_wire(up: Uplink, down: Downlink, seed_: int, base: Leaves) -> Wire:
    """As settings say.

    Raises:
        MissingExtraError: zstd is not installed.
    """
    low_rank = [LowRank(up.rank)] if up.rank else []
    # scaled, what is kept would be more than what there was, and feedback would never settle
    random_k = [RandomK(up.density, scaled=not up.feedback)] if up.keep == "random-k" else []
    return Wire(
        Chain(_make_stages(down)),
        Chain((*low_rank, *random_k, *_make_stages(up))),
        up.feedback,
        up.decay,
        seed_,
        base if _make_stages(down) else {},
    )


def _make_stages(settings: Uplink | Downlink) -> tuple[TopK | Cast | Quantize | Zstd, ...]:
    top_k = [TopK(settings.density)] if settings.keep == "top-k" else []
    value_encoders = {
        "fp32": [],
        "fp16": [Cast("fp16")],
        "bf16": [Cast("bf16")],
        "int8": [Quantize(8, settings.block)],
        "int4": [Quantize(4, settings.block)],
    }
    return (
        *top_k,
        *value_encoders[settings.values],
        *([Zstd(settings.zstd)] if settings.zstd else []),
    )


def encode_broadcast(wire: Wire, leaves: Leaves, round_: int) -> bytes:
    """What travels to the clients of a round."""
    if not wire.down.stages:
        return encode(leaves)
    change = add(leaves, scale(_select_base(wire, leaves), -1.0))
    return compress(wire.down, change, generator(wire.seed, "rounding", round_), 0)


def decode_broadcast(wire: Wire, payload: bytes, schema: Schema) -> Leaves:
    """What a client makes of it.

    Raises:
        RefusedError: it is not of these leaves.
    """
    if not wire.down.stages:
        return decode(payload)
    change = decompress(wire.down, payload, schema, 0)
    return add(change, _select_base(wire, change))


def encode_update(
    wire: Wire, delta: Leaves, memory: Leaves, round_: int, client: int
) -> tuple[bytes, Leaves]:
    """What travels to the server, and what the client remembers of it if it counts.

    Args:
        wire: the run's.
        delta: the change that the client shares.
        memory: what it remembers.
        round_: counted from 0.
        client: its number; with the round it draws how values are rounded, and which are sent.

    Raises:
        TrainingError: the change is not finite, or too large for its type.
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
    """What the server makes of it.

    Raises:
        RefusedError: it is not of these leaves; without a chain, see `engines.payload`.
    """
    if not wire.up.stages:
        return decode(payload)
    return decompress(wire.up, payload, schema, _get_position_seed(wire, round_, client))


def get_max_bytes_up(wire: Wire, schema: Schema) -> int:
    """Bytes of a client's payload, at most."""
    return get_max_bytes(wire.up, schema) if wire.up.stages else count_encoded_bytes(schema)


def get_max_bytes_down(wire: Wire, schema: Schema) -> int:
    """Bytes of what travels to a client, at most."""
    return get_max_bytes(wire.down, schema) if wire.down.stages else count_encoded_bytes(schema)


def get_error_factor(wire: Wire) -> float:
    """How many times as far as training moved, an honest payload may seem to have moved.

    Of the largest element, and of the norm of all: a rounded value is off by less than a level of
    its block's largest, and scaled random-k multiplies. With feedback it is of all the rounds that
    were. Of low-rank, and of coarse values that feedback may add up, no bound is known.
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
    """How much farther still any value may seem to have moved, however little training moved.

    Near zero fp16 has steps of 2^-24, and the scales of int8 and int4 are fp16: the error is no
    share of the value there. Scaled random-k multiplies it; with feedback each round adds one.

    Args:
        wire: the run's.
        round_: counted from 0.
    """
    uses_fp16 = isinstance(wire.up.value_encoder, Quantize) or wire.up.value_encoder.name == "fp16"
    return (
        SMALLEST_FP16 * _get_max_scale(wire) * (round_ + 1 if wire.feedback else 1)
        if uses_fp16
        else 0.0
    )


def _get_max_scale(wire: Wire) -> float:
    """What the receiver multiplies values by, at most."""
    sparsifier = wire.up.sparsifier
    return 1 / sparsifier.density if isinstance(sparsifier, RandomK) and sparsifier.scaled else 1.0


def _select_base(wire: Wire, leaves: Leaves) -> Leaves:
    """These leaves before the first round, those that there were, cut to the ranks of these."""
    return {
        k: wire.base[k][tuple(slice(n) for n in v.shape)]
        for k, v in leaves.items()
        if k in wire.base
    }


def _get_position_seed(wire: Wire, round_: int, client: int) -> int:
    return seed(wire.seed, "places", round_, client)
