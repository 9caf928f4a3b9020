"""Stages that write values in fewer bits."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from fedgen_edge.compression.packing import Form, Parts, pack_nibbles, unpack_nibbles
from fedgen_edge.errors import ConfigError, RefusedError, TrainingError

SMALLEST_FP16 = 2.0**-24
"""The smallest positive fp16."""


@runtime_checkable
class ValueEncoder(Protocol):
    """Writes values in fewer bits."""

    @property
    def name(self) -> str:
        """Its name in settings and errors."""
        ...

    def get_form(self, count: int) -> Form:
        """Return the form of the parts that encode this many values."""
        ...

    def encode(self, values: Float[Tensor, " count"], rng: Generator, /) -> Parts:
        """Encode finite values as parts."""
        ...

    def decode(self, parts: Parts, count: int, /) -> Float[Tensor, " count"]:
        """Decode the values as float32."""
        ...


@dataclass(frozen=True)
class Cast:
    """Cast each value to a shorter type, rounding to nearest."""

    to: Literal["fp32", "fp16", "bf16"]
    """fp16: 11 bits of precision up to 65504; bf16: 8 bits, and float32's range; fp32: as it is."""

    @property
    def name(self) -> str:
        """The type."""
        return self.to

    @property
    def _dtype(self) -> torch.dtype:
        types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        return types[self.to]

    def get_form(self, count: int) -> Form:
        """Return the form of the cast values."""
        return {"values": (self._dtype, count)}

    def encode(self, values: Float[Tensor, " count"], _rng: Generator) -> Parts:
        """Cast the values; raises TrainingError if the type cannot hold one."""
        cast_values = values.to(self._dtype)
        _check_range(cast_values, values, self.name)
        return {"values": cast_values}

    def decode(self, parts: Parts, _count: int) -> Float[Tensor, " count"]:
        """Decode the values as float32."""
        return parts["values"].float()


@dataclass(frozen=True)
class Quantize:
    """Stochastic quantization: each value is a multiple of its block's scale over L.

    L is 127 for int8 and 7 for int4. The scale is the block's largest magnitude, rounded up to
    fp16: no value is clipped, so the mean over draws is the value itself. The error of a value is
    less than scale / L. With 16 bits for each block's scale, a value takes bits + 16 / block.

    Error feedback needs errors that are on average smaller than the encoded vector; they are if a
    block is shorter than 8 L^2: 392 for int4.

    Source: Alistarh et al. 2017, QSGD (arXiv:1610.02132); blocks: Dettmers et al. 2021
    (arXiv:2110.02861).
    Differs: QSGD's scale is a Euclidean norm; ours is the largest magnitude, which wastes no
    levels. A scale below the smallest fp16, 2^-24, becomes 2^-24.
    """

    bits: Literal[8, 4] = 8
    """Bits per value; with 4, two values share a byte."""
    block: int = 128
    """Values that share a scale."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"block={self.block} must be at least 1: 64 to 256 is usual")

    @property
    def name(self) -> str:
        """The type."""
        return f"int{self.bits}"

    @property
    def levels(self) -> int:
        """L: codes range from -L to L."""
        return 2 ** (self.bits - 1) - 1

    def get_form(self, count: int) -> Form:
        """Return the form of the blocks' scales and the codes."""
        scales = (torch.float16, -(-count // self.block))
        if self.bits == 8:
            return {"scales": scales, "values": (torch.int8, count)}
        return {"scales": scales, "values": (torch.uint8, -(-count // 2))}

    def encode(self, values: Float[Tensor, " count"], rng: Generator) -> Parts:
        """Encode as scales and codes; raises TrainingError if fp16 cannot hold a scale."""
        blocks = self._split_blocks(values)
        largest = blocks.abs().amax(1)
        scales = _round_up_to_fp16(largest)
        _check_range(scales, largest, self.name)
        # zero over zero would be NaN, whose conversion to an integer is undefined
        exact = blocks / scales.float().clamp(min=SMALLEST_FP16)[:, None] * self.levels
        below = exact.floor()
        random_values = torch.rand(blocks.shape, generator=rng)
        codes = (below + (random_values < exact - below)).to(torch.int8).flatten()[: values.numel()]
        return {"scales": scales, "values": codes if self.bits == 8 else pack_nibbles(codes)}

    def decode(self, parts: Parts, count: int) -> Float[Tensor, " count"]:
        """Decode the values; impossible scales and codes are refused (`bad-values`)."""
        scales, codes = parts["scales"].float(), parts["values"]
        if not ((scales >= 0) & scales.isfinite()).all():
            raise RefusedError("bad-values", f"a scale of {self.name} is negative or not finite")
        if self.bits == 4:
            codes = unpack_nibbles(codes, count)
        if (codes < -self.levels).any():
            raise RefusedError("bad-values", f"a code of {self.name} is below -{self.levels}")
        return (self._split_blocks(codes.float()) * scales[:, None] / self.levels).flatten()[:count]

    def _split_blocks(self, values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, -values.numel() % self.block))
        return padded.reshape(-1, self.block)


def _round_up_to_fp16(values: Tensor) -> Tensor:
    """Round up to fp16; infinite beyond 65504."""
    nearest = values.to(torch.float16)
    return (nearest.view(torch.int16) + (nearest.float() < values)).view(torch.float16)


def _check_range(cast_values: Tensor, values: Tensor, name: str) -> None:
    if not cast_values.isfinite().all():
        raise TrainingError(
            f"a change of {float(values.abs().max()):.3g} is more than {name} can hold "
            "(bf16 holds most)"
        )
