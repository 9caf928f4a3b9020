"""How leaves travel in a round, in both directions: what is made of them, and what arrives.

Without a chain they go as they are, each under its name. With one, what goes down is the adapter's
change since before the first round, which every client can make for itself.
"""

from dataclasses import dataclass, field
from math import inf

import torch

from fedgen_edge.config import Downlink, Uplink
from fedgen_edge.leaves import add, scale
from fedgen_edge.seeds import generator, seed
from fedgen_edge.types import Leaves
from fedgen_edge.uplink.coding import Zstd
from fedgen_edge.uplink.compress import Chain, compress, expand, fed_back, longest
from fedgen_edge.uplink.lowrank import LowRank
from fedgen_edge.uplink.quantise import LEAST, Cast, Quantise
from fedgen_edge.uplink.sparsify import RandomK, TopK
from fedgen_edge.uplink.transform import Schema, decode, encode, length

LEFT = "left:"
"""Prefix, in a client's memory, of what its payloads have left out."""
SINCE = "since:left"
"""In a client's memory: the round of its last payload."""
PLAIN = Chain()
"""Leaves go as they are, each under its name."""


@dataclass(frozen=True)
class Wire:
    """What both sides of a run know of how leaves travel."""

    down: Chain = PLAIN
    up: Chain = PLAIN
    feedback: bool = False
    """Whether a client adds what its payloads left out to its next change."""
    decay: float = 1.0
    """Share of that which stays, for each round that the client missed since."""
    seed: int = 0
    base: Leaves = field(default_factory=dict)
    """The adapter before the first round; needed only where `down` has stages."""


def made(up: Uplink, down: Downlink, seed_: int, base: Leaves) -> Wire:
    """As settings say.

    Raises:
        MissingExtraError: zstd is not installed.
    """
    thin = [LowRank(up.rank)] if up.rank else []
    # scaled, what is kept would be more than what there was, and feedback would never settle
    drawn = [RandomK(up.density, scaled=not up.feedback)] if up.keep == "random-k" else []
    return Wire(
        Chain(_stages(down)),
        Chain((*thin, *drawn, *_stages(up))),
        up.feedback,
        up.decay,
        seed_,
        base if _stages(down) else {},
    )


def _stages(told: Uplink | Downlink) -> tuple[TopK | Cast | Quantise | Zstd, ...]:
    kept = [TopK(told.density)] if told.keep == "top-k" else []
    coders = {
        "fp32": [],
        "fp16": [Cast("fp16")],
        "bf16": [Cast("bf16")],
        "int8": [Quantise(8, told.block)],
        "int4": [Quantise(4, told.block)],
    }
    return (*kept, *coders[told.values], *([Zstd(told.zstd)] if told.zstd else []))


def sent_down(on: Wire, leaves: Leaves, round_: int) -> bytes:
    """What travels to the clients of a round."""
    if not on.down.stages:
        return encode(leaves)
    moved = add(leaves, scale(_begun(on, leaves), -1.0))
    return compress(on.down, moved, generator(on.seed, "rounding", round_), 0)


def came_down(on: Wire, payload: bytes, schema: Schema) -> Leaves:
    """What a client makes of it.

    Raises:
        RefusedError: it is not of these leaves.
    """
    if not on.down.stages:
        return decode(payload)
    moved = expand(on.down, payload, schema, 0)
    return add(moved, _begun(on, moved))


def sent_up(
    on: Wire, delta: Leaves, memory: Leaves, round_: int, client: int
) -> tuple[bytes, Leaves]:
    """What travels to the server, and what the client remembers of it if it counts.

    Args:
        on: the run's.
        delta: the change that the client shares.
        memory: what it remembers.
        round_: counted from 0.
        client: its number; with the round it draws how values are rounded, and which are sent.

    Raises:
        TrainingError: the change is not finite, or too large for its type.
    """
    rng, places = generator(on.seed, "rounding", round_, client), _places(on, round_, client)
    if not on.up.stages:
        return encode(delta), {}
    if not on.feedback or not delta:
        return compress(on.up, delta, rng, places), {}
    missed = max(0, round_ - int(memory[SINCE]) - 1) if SINCE in memory else 0
    left = {k: memory[LEFT + k] for k in delta if LEFT + k in memory}
    payload, rest = fed_back(on.up, delta, left, on.decay**missed, rng, places)
    return payload, {SINCE: torch.tensor(float(round_)), **{LEFT + k: v for k, v in rest.items()}}


def came_up(on: Wire, payload: bytes, schema: Schema, round_: int, client: int) -> Leaves:
    """What the server makes of it.

    Raises:
        RefusedError: it is not of these leaves; without a chain, see `engines.payload`.
    """
    if not on.up.stages:
        return decode(payload)
    return expand(on.up, payload, schema, _places(on, round_, client))


def most_up(on: Wire, schema: Schema) -> int:
    """Bytes of a client's payload, at most."""
    return longest(on.up, schema) if on.up.stages else length(schema)


def most_down(on: Wire, schema: Schema) -> int:
    """Bytes of what travels to a client, at most."""
    return longest(on.down, schema) if on.down.stages else length(schema)


def stretch(on: Wire) -> float:
    """How many times as far as training moved, an honest payload may seem to have moved.

    Of the largest element, and of the norm of all: a rounded value is off by less than a level of
    its block's largest, and scaled random-k multiplies. With feedback it is of all the rounds that
    were. Of low-rank, and of coarse values that feedback may add up, no bound is known.
    """
    coder = on.up.coder
    off = coder.block**0.5 / coder.levels if isinstance(coder, Quantise) else 2.0**-7
    if on.up.low_rank or (on.feedback and off >= 1):
        return inf
    return _scale(on) * (1 + off) if on.up.stages else 1.0


def slack(on: Wire, round_: int) -> float:
    """How much farther still any value may seem to have moved, however little training moved.

    Near zero fp16 has steps of 2^-24, and the scales of int8 and int4 are fp16: the error is no
    share of the value there. Scaled random-k multiplies it; with feedback each round adds one.

    Args:
        on: the run's.
        round_: counted from 0.
    """
    halves = isinstance(on.up.coder, Quantise) or on.up.coder.name == "fp16"
    return LEAST * _scale(on) * (round_ + 1 if on.feedback else 1) if halves else 0.0


def _scale(on: Wire) -> float:
    """What the receiver multiplies values by, at most."""
    sparse = on.up.sparsifier
    return 1 / sparse.density if isinstance(sparse, RandomK) and sparse.scaled else 1.0


def _begun(on: Wire, leaves: Leaves) -> Leaves:
    """These leaves before the first round, those that there were, cut to the ranks of these."""
    return {
        k: on.base[k][tuple(slice(n) for n in v.shape)] for k, v in leaves.items() if k in on.base
    }


def _places(on: Wire, round_: int, client: int) -> int:
    return seed(on.seed, "places", round_, client)
