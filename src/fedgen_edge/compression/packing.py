"""Payloads of a form that both sides know: positions as bits, four-bit codes, and the file.

The receiver computes the form from its settings, and refuses a file that differs in one byte.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8, UInt8
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from fedgen_edge.errors import ConfigError, MissingExtraError, RefusedError

Parts = dict[str, Tensor]
"""The parts of a payload: vectors by name."""

Form = Mapping[str, tuple[torch.dtype, int]]
"""What the parts must look like: type and number of elements, by name."""

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""safetensors' names of types, in the order in which it lays them out."""


def make_header(form: Form) -> bytes:
    """Return what `save` writes before the values of such parts: an 8-byte length, and text."""
    order = list(DTYPE_NAMES)
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name, (dtype, count) in sorted(form.items(), key=lambda p: (order.index(p[1][0]), p[0])):
        end = offset + dtype.itemsize * count
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": [count],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def count_file_bytes(form: Form) -> int:
    """Count the bytes of a file of such parts."""
    return len(make_header(form)) + sum(dtype.itemsize * count for dtype, count in form.values())


def pack_parts(parts: Parts) -> bytes:
    """Write the parts as one safetensors file."""
    return save({k: v.contiguous() for k, v in parts.items()})


def unpack_parts(payload: bytes, form: Form) -> Parts:
    """Return the parts of a file that has exactly this form, byte for byte up to its values.

    The header is compared before a library reads it.

    Raises:
        RefusedError: the length differs (`wrong-length`), or the header does (`bad-header`).
    """
    expected_length, expected_header = count_file_bytes(form), make_header(form)
    if len(payload) != expected_length:
        raise RefusedError(
            "wrong-length",
            f"the payload has {len(payload)} bytes, and these settings make {expected_length}",
        )
    if payload[: len(expected_header)] != expected_header:
        raise RefusedError("bad-header", "the payload's header is not what these settings make")
    return load(payload)


def mask_largest(values: Float[Tensor, " count"], num_kept: int) -> Bool[Tensor, " count"]:
    """Return a mask of the largest values; among equal ones, the first win.

    Args:
        values: finite.
        num_kept: how many to select, from 1 to all.
    """
    threshold = torch.kthvalue(values, values.numel() - num_kept + 1).values
    above, tied = values > threshold, values == threshold
    return above | (tied & (tied.cumsum(0) <= num_kept - above.sum()))


def uses_gaps(count: int, num_kept: int) -> bool:
    """Whether gaps are shorter than a bitmap: true below a density of about a quarter."""
    return _count_gap_bytes(count, num_kept) < _count_bytes(count)


def get_position_form(count: int, num_kept: int) -> dict[str, tuple[torch.dtype, int]]:
    """Return the form of `num_kept` positions among `count`; only the two numbers decide it."""
    if uses_gaps(count, num_kept):
        return {"gaps": (torch.uint8, _count_gap_bytes(count, num_kept))}
    return {"bitmap": (torch.uint8, _count_bytes(count))}


def encode_positions(mask: Bool[Tensor, " count"]) -> Parts:
    """Encode where a mask is true, in the form of `get_position_form`: a bitmap, or gaps.

    A position is split in two. Its low bits are written as they are; its high bits are written as
    the gap to those of the previous position: that many zeros, then a one. With
    floor(log2(count / kept)) low bits, a position takes about 2 + log2(count / kept) bits, and the
    total length does not depend on the positions.

    Source: Elias-Fano coding, as in Vigna 2012 (arXiv:1206.4300).
    Differs: sparse updates usually use a Golomb code of the gaps (Sattler et al. 2019,
    arXiv:1903.02891), which is a little shorter, but whose length only the sender knows.
    """
    positions = mask.nonzero().flatten().numpy()
    count, num_kept = mask.numel(), len(positions)
    if not uses_gaps(count, num_kept):
        return {"bitmap": _pack_bits(mask.numpy())}
    low_bits = _count_low_bits(count, num_kept)
    unary = np.zeros(_count_unary_bits(count, num_kept), dtype=bool)
    unary[(positions >> low_bits) + np.arange(num_kept)] = True
    digits = (positions[:, None] >> np.arange(low_bits)) & 1
    return {"gaps": _pack_bits(np.concatenate([unary, digits.astype(bool).flatten()]))}


def decode_positions(parts: Parts, count: int, num_kept: int) -> Bool[Tensor, " count"]:
    """Decode the mask of the encoded positions.

    Raises:
        RefusedError: they are not `num_kept` increasing positions below `count`
            (`bad-positions`).
    """
    if not uses_gaps(count, num_kept):
        bits = _unpack_bits(parts["bitmap"], count)
        if bits.sum() != num_kept:
            raise RefusedError(
                "bad-positions", f"the bitmap has {bits.sum()} ones, not {num_kept} of {count}"
            )
        return torch.from_numpy(bits)
    low_bits, unary = _count_low_bits(count, num_kept), _count_unary_bits(count, num_kept)
    bits = _unpack_bits(parts["gaps"], unary + num_kept * low_bits)
    ones = np.flatnonzero(bits[:unary])
    if len(ones) != num_kept:
        raise RefusedError("bad-positions", f"there are {len(ones)} gaps, not {num_kept}")
    digits = bits[unary:].reshape(num_kept, low_bits)
    positions = (ones - np.arange(num_kept)) << low_bits
    for bit in range(low_bits):
        positions |= digits[:, bit].astype(np.int64) << bit
    if positions[-1] >= count or (np.diff(positions) <= 0).any():
        raise RefusedError("bad-positions", f"positions do not rise, or leave the {count} values")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(positions)] = True
    return mask


def pack_nibbles(codes: Int8[Tensor, " count"]) -> UInt8[Tensor, " half"]:
    """Pack codes from -8 to 7, two per byte: the first of a pair is the low half."""
    pairs = torch.cat([codes, codes.new_zeros(codes.numel() % 2)]).reshape(-1, 2)
    low, high = (pairs & 15).to(torch.uint8).unbind(1)
    return low | (high << 4)


def unpack_nibbles(packed_codes: UInt8[Tensor, " half"], count: int) -> Int8[Tensor, " count"]:
    """Unpack the codes.

    Raises:
        RefusedError: an unused last half is not zero (`bad-values`).
    """
    halves = torch.stack([packed_codes & 15, packed_codes >> 4], 1).flatten()
    if halves[count:].any():
        raise RefusedError("bad-values", "the last half byte is not zero")
    return (halves[:count] ^ 8).to(torch.int8) - 8


@dataclass(frozen=True)
class Zstd:
    """Lossless compression of the finished file (extra: compress)."""

    level: int = 3
    """From 1, the fastest, to 19, the smallest."""

    name = "zstd"

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19:
            raise ConfigError(f"level={self.level} must be from 1 to 19: 3 is usual")
        if importlib.util.find_spec("zstandard") is None:
            raise MissingExtraError("compression by zstd", "compress")

    def get_max_bytes(self, length: int) -> int:
        """Return the maximum compressed bytes for this length: zstd's own bound, and a checksum."""
        return length + length // 256 + 64 + 4

    def encode(self, payload: bytes) -> bytes:
        """Compress into one frame, which states its length and has a checksum."""
        import zstandard

        return zstandard.ZstdCompressor(level=self.level, write_checksum=True).compress(payload)

    def decode(self, payload: bytes, length: int) -> bytes:
        """Restore the file; a frame that states another length is refused unopened."""
        import zstandard

        if len(payload) > self.get_max_bytes(length):
            raise RefusedError("wrong-length", f"a frame has {len(payload)} bytes, for {length}")
        try:
            frame_length = zstandard.get_frame_parameters(payload).content_size
            if frame_length != length:
                raise RefusedError(
                    "wrong-length", f"a frame says {frame_length} bytes, not {length}"
                )
            reader = zstandard.ZstdDecompressor(max_window_size=max(1024, 2 * length))
            return reader.decompress(payload, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError:
            raise RefusedError("bad-frame", "the payload is not one whole frame of zstd") from None


def _count_low_bits(count: int, num_kept: int) -> int:
    return (count // num_kept).bit_length() - 1


def _count_unary_bits(count: int, num_kept: int) -> int:
    return num_kept + ((count - 1) >> _count_low_bits(count, num_kept))


def _count_gap_bytes(count: int, num_kept: int) -> int:
    return _count_bytes(
        _count_unary_bits(count, num_kept) + num_kept * _count_low_bits(count, num_kept)
    )


def _count_bytes(bits: int) -> int:
    return -(-bits // 8)


def _pack_bits(bits: NDArray[np.bool_]) -> UInt8[Tensor, " bytes"]:
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def _unpack_bits(packed_bits: UInt8[Tensor, " bytes"], count: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(packed_bits.numpy(), bitorder="little").astype(bool)
    if bits[count:].any():
        raise RefusedError("bad-positions", "the bits after the last position are not zero")
    return bits[:count]
