"""Compress an update: a chain of stages encodes all its leaves as one vector.

The vector holds the leaves in the order of their names. A chain may replace matrices by low-rank
factors, keep some of the values (top-k or random-k), write them in fewer bits (fp16, bf16, int8 or
int4), and compress the file with zstd. Everything in the file except its values follows from the
chain and the shapes of the leaves, so a receiver knows it beforehand and refuses anything else.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator

from fedgen_edge.compression import packing
from fedgen_edge.compression.low_rank import LowRank
from fedgen_edge.compression.packing import Form, Zstd
from fedgen_edge.compression.quantize import Cast, Quantize, ValueEncoder
from fedgen_edge.compression.serialize import Schema
from fedgen_edge.compression.sparsify import RandomK, Sparsifier, TopK
from fedgen_edge.errors import ConfigError, RefusedError, TrainingError
from fedgen_edge.leaves import add, scale, shapes
from fedgen_edge.types import Leaves

STAGE_ORDER = ((LowRank,), (TopK, RandomK), (Cast, Quantize), (Zstd,))
"""A chain has at most one stage from each group, in this order."""


@dataclass(frozen=True)
class Chain:
    """The stages that encode an update; without stages it stays float32.

    Raises:
        ConfigError: two stages of one kind, or an order that cannot be undone.
    """

    stages: tuple[LowRank | Sparsifier | ValueEncoder | Zstd, ...] = ()

    def __post_init__(self) -> None:
        positions = [
            next(i for i, kinds in enumerate(STAGE_ORDER) if isinstance(s, kinds))
            for s in self.stages
        ]
        if any(left >= right for left, right in pairwise(positions)):
            raise ConfigError(
                f"stages={', '.join(s.name for s in self.stages)} cannot be in this order: there "
                "may be low-rank; then one of top-k, random-k; then one of fp16, bf16, int8, int4; "
                "then zstd"
            )

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank stage, if there is one."""
        return next((s for s in self.stages if isinstance(s, LowRank)), None)

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The stage that keeps only some values, if there is one."""
        return next((s for s in self.stages if isinstance(s, TopK | RandomK)), None)

    @property
    def value_encoder(self) -> ValueEncoder:
        """The stage that writes values; without one they are written as float32."""
        return next((s for s in self.stages if isinstance(s, Cast | Quantize)), Cast("fp32"))

    @property
    def zstd(self) -> Zstd | None:
        """The zstd stage, if there is one."""
        return next((s for s in self.stages if isinstance(s, Zstd)), None)

    def get_sent_shapes(self, schema: Schema) -> Schema:
        """Return the shapes of the leaves that become one vector."""
        return self.low_rank.get_sent_shapes(schema) if self.low_rank else schema

    def count_kept(self, count: int) -> int:
        """Count how many of `count` values are sent."""
        return self.sparsifier.count_kept(count) if self.sparsifier else count

    def get_form(self, count: int) -> Form:
        """Return the parts of a file of `count` values, before zstd."""
        position_form = self.sparsifier.get_form(count) if self.sparsifier else {}
        return {**position_form, **self.value_encoder.get_form(self.count_kept(count))}


def compress(chain: Chain, leaves: Leaves, rng: Generator, seed: int) -> bytes:
    """Encode leaves as a payload; without values it is empty.

    Args:
        chain: stages that encode them.
        leaves: one client's leaves, finite.
        rng: rounds int8 and int4 stochastically; only the sender has it.
        seed: draws random-k's positions; both sides have it.

    Raises:
        TrainingError: a value is not finite, or too large for its type.
    """
    if not any(leaf.numel() for leaf in leaves.values()):
        return b""
    if not all(leaf.isfinite().all() for leaf in leaves.values()):
        raise TrainingError("a change that is not finite cannot be sent")
    if chain.low_rank:
        leaves = chain.low_rank.encode(leaves)
    values = torch.cat([leaves[k].detach().float().flatten().cpu() for k in sorted(leaves)])
    parts: packing.Parts = {}
    if chain.sparsifier:
        values, parts = chain.sparsifier.encode(values, seed)
    payload = packing.pack_parts({**parts, **chain.value_encoder.encode(values, rng)})
    return chain.zstd.encode(payload) if chain.zstd else payload


def decompress(chain: Chain, payload: bytes, schema: Schema, seed: int) -> Leaves:
    """Decode a payload that may be hostile; the leaves are in the order of their names.

    Args:
        chain: stages that encoded them.
        payload: of any length; one longer than `get_max_bytes` is refused at once.
        schema: shapes of all leaves; they are not sent.
        seed: draws random-k's positions; both sides have it.

    Raises:
        RefusedError: this chain cannot produce the payload from such leaves. The codes are
            `wrong-length`, `bad-header`, `bad-frame`, `bad-positions`, `bad-values`, `not-finite`.
    """
    sent_shapes = chain.get_sent_shapes(schema)
    count = count_values(sent_shapes)
    if not count:
        if payload:
            raise RefusedError("wrong-length", f"{len(payload)} bytes came for no values")
        return {k: torch.zeros(schema[k]) for k in sorted(schema)}
    form = chain.get_form(count)
    if chain.zstd:
        payload = chain.zstd.decode(payload, packing.count_file_bytes(form))
    parts = packing.unpack_parts(payload, form)
    values = chain.value_encoder.decode(parts, chain.count_kept(count))
    if chain.sparsifier:
        values = chain.sparsifier.decode(values, parts, count, seed)
    names = sorted(sent_shapes)
    pieces = values.split([math.prod(sent_shapes[k]) for k in names])
    # copies: leaves that share memory cannot be saved
    decoded = {k: v.reshape(sent_shapes[k]).clone() for k, v in zip(names, pieces, strict=True)}
    if chain.low_rank:
        decoded = chain.low_rank.decode(decoded, {k: schema[k] for k in sorted(schema)})
    if not all(leaf.isfinite().all() for leaf in decoded.values()):
        raise RefusedError("not-finite", "the payload has values that are not finite")
    return decoded


def compress_with_feedback(
    chain: Chain, delta: Leaves, residual: Leaves, decay: float, rng: Generator, seed: int
) -> tuple[bytes, Leaves]:
    """Compress an update with error feedback: u = delta + decay * residual.

    Args:
        chain: stages that encode it.
        delta: the update of this round.
        residual: what the previous call returned; empty at first.
        decay: 1 forgets nothing; use less than 1 if a client may miss many rounds, since its
            residual grows stale.
        rng: rounds int8 and int4 stochastically.
        seed: draws random-k's positions.

    Returns:
        The payload, and the next residual: u minus what the receiver decodes.

    Raises:
        ConfigError: the chain scales the values it keeps, so the residual would grow without bound.
        TrainingError: as in `compress`.

    Source: Karimireddy et al. 2019, EF-SGD (arXiv:1901.09847).
    """
    if isinstance(chain.sparsifier, RandomK) and chain.sparsifier.scaled:
        raise ConfigError("scaled=True and error feedback diverge: set scaled=False for random-k")
    corrected_delta = add(delta, scale(residual, decay))
    payload = compress(chain, corrected_delta, rng, seed)
    decoded = decompress(chain, payload, shapes(corrected_delta), seed)
    return payload, {k: v - decoded[k].to(v.device) for k, v in corrected_delta.items()}


def count_part_bytes(chain: Chain, schema: Schema) -> dict[str, int]:
    """Count a payload's bytes by purpose: `header`, and each part; before zstd.

    The header holds the file's metadata, the names, types and shapes of the parts, and 8 bytes for
    its own length. The sum is the payload's length.
    """
    count = count_values(chain.get_sent_shapes(schema))
    if not count:
        return {}
    form = chain.get_form(count)
    part_bytes = {name: dtype.itemsize * many for name, (dtype, many) in form.items()}
    return {"header": len(packing.make_header(form)), **part_bytes}


def get_max_bytes(chain: Chain, schema: Schema) -> int:
    """Return the maximum bytes of an honest payload; without zstd, its exact length."""
    payload_bytes = sum(count_part_bytes(chain, schema).values())
    return (
        chain.zstd.get_max_bytes(payload_bytes) if chain.zstd and payload_bytes else payload_bytes
    )


def count_bits_per_value(length: int, schema: Schema) -> float:
    """Return a payload's bits per value, given its bytes and counting values that are not sent."""
    return 8 * length / count_values(schema)


def count_values(schema: Schema) -> int:
    """Count the values of all leaves together."""
    return sum(math.prod(shape) for shape in schema.values())
