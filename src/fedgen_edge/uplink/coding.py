"""Of a form that both sides know: places as bits, codes of four bits, and the file around them.

The receiver computes the form from its settings; what differs from it in one byte is refused.
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
"""What a payload is made of: vectors by name."""

Form = Mapping[str, tuple[torch.dtype, int]]
"""What parts must be: type and number of elements, by name."""

TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""safetensors' names, in the order in which it lays out types."""


def header(form: Form) -> bytes:
    """What `save` puts before the values of such parts: a length of 8 bytes, and text."""
    order = list(TYPES)
    told: dict[str, dict[str, object]] = {}
    at = 0
    for name, (dtype, count) in sorted(form.items(), key=lambda p: (order.index(p[1][0]), p[0])):
        end = at + dtype.itemsize * count
        told[name] = {"dtype": TYPES[dtype], "shape": [count], "data_offsets": [at, end]}
        at = end
    text = json.dumps(told, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def length(form: Form) -> int:
    """Bytes of a file of such parts."""
    return len(header(form)) + sum(dtype.itemsize * count for dtype, count in form.values())


def packed(parts: Parts) -> bytes:
    """One safetensors file."""
    return save({k: v.contiguous() for k, v in parts.items()})


def opened(payload: bytes, form: Form) -> Parts:
    """The parts of a file that is of this form, byte for byte up to its values.

    The header is compared before a library reads it.

    Raises:
        RefusedError: another length (`wrong-length`) or another header (`bad-header`).
    """
    whole, head = length(form), header(form)
    if len(payload) != whole:
        raise RefusedError(
            "wrong-length", f"the payload has {len(payload)} bytes, and these settings make {whole}"
        )
    if payload[: len(head)] != head:
        raise RefusedError("bad-header", "the payload's header is not what these settings make")
    return load(payload)


def first(values: Float[Tensor, " count"], kept: int) -> Bool[Tensor, " count"]:
    """Where the largest values are; of equal ones, those that come first.

    Args:
        values: finite.
        kept: how many, from 1 to all.
    """
    least = torch.kthvalue(values, values.numel() - kept + 1).values
    above, level = values > least, values == least
    return above | (level & (level.cumsum(0) <= kept - above.sum()))


def by_gaps(count: int, kept: int) -> bool:
    """Whether places are shorter as gaps than as a bitmap: below about a quarter of all."""
    return _gaps_length(count, kept) < _bytes(count)


def places_form(count: int, kept: int) -> dict[str, tuple[torch.dtype, int]]:
    """How `kept` places of `count` are told, which their number alone decides."""
    if by_gaps(count, kept):
        return {"gaps": (torch.uint8, _gaps_length(count, kept))}
    return {"bitmap": (torch.uint8, _bytes(count))}


def places(mask: Bool[Tensor, " count"]) -> Parts:
    """Where a mask is true, in as many bytes as `places_form` says: a bitmap, or gaps.

    A place is cut in two. Its low bits are written as they are, and of its high bits the gap to
    those of the place before: as many zeros, then a one. With low bits of floor(log2(count / kept))
    a place takes about 2 + log2(count / kept) bits, and the whole has one length whatever the
    places are.

    Source: Elias-Fano coding, as in Vigna 2012 (arXiv:1206.4300).
    Differs: sparse updates are usually told by Golomb's code of gaps (Sattler et al. 2019,
    arXiv:1903.02891), which is a little shorter, but of a length that only the sender knows.
    """
    at = mask.nonzero().flatten().numpy()
    count, kept = mask.numel(), len(at)
    if not by_gaps(count, kept):
        return {"bitmap": _packed_bits(mask.numpy())}
    low = _low_bits(count, kept)
    unary = np.zeros(_unary_length(count, kept), dtype=bool)
    unary[(at >> low) + np.arange(kept)] = True
    digits = (at[:, None] >> np.arange(low)) & 1
    return {"gaps": _packed_bits(np.concatenate([unary, digits.astype(bool).flatten()]))}


def placed(parts: Parts, count: int, kept: int) -> Bool[Tensor, " count"]:
    """The mask whose places were told.

    Raises:
        RefusedError: they are not `kept` places that rise and stay below `count`
            (`bad-positions`).
    """
    if not by_gaps(count, kept):
        bits = _bits(parts["bitmap"], count)
        if bits.sum() != kept:
            raise RefusedError(
                "bad-positions", f"the bitmap has {bits.sum()} ones, not {kept} of {count}"
            )
        return torch.from_numpy(bits)
    low, unary = _low_bits(count, kept), _unary_length(count, kept)
    bits = _bits(parts["gaps"], unary + kept * low)
    ones = np.flatnonzero(bits[:unary])
    if len(ones) != kept:
        raise RefusedError("bad-positions", f"there are {len(ones)} gaps, not {kept}")
    digits = bits[unary:].reshape(kept, low)
    at = (ones - np.arange(kept)) << low
    for bit in range(low):
        at |= digits[:, bit].astype(np.int64) << bit
    if at[-1] >= count or (np.diff(at) <= 0).any():
        raise RefusedError("bad-positions", f"positions do not rise, or leave the {count} values")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(at)] = True
    return mask


def nibbles(codes: Int8[Tensor, " count"]) -> UInt8[Tensor, " half"]:
    """Codes from -8 to 7, two in a byte: the first of a pair is the low half."""
    whole = torch.cat([codes, codes.new_zeros(codes.numel() % 2)]).reshape(-1, 2)
    low, high = (whole & 15).to(torch.uint8).unbind(1)
    return low | (high << 4)


def from_nibbles(packed: UInt8[Tensor, " half"], count: int) -> Int8[Tensor, " count"]:
    """The codes.

    Raises:
        RefusedError: a last half that no code has is not zero (`bad-values`).
    """
    halves = torch.stack([packed & 15, packed >> 4], 1).flatten()
    if halves[count:].any():
        raise RefusedError("bad-values", "the last half byte is not zero")
    return (halves[:count] ^ 8).to(torch.int8) - 8


@dataclass(frozen=True)
class Zstd:
    """The finished file, shortened without loss (extra: compress)."""

    level: int = 3
    """From 1, quick, to 19, short."""

    name = "zstd"

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19:
            raise ConfigError(f"level={self.level} must be from 1 to 19: 3 is usual")
        if importlib.util.find_spec("zstandard") is None:
            raise MissingExtraError("compression by zstd", "compress")

    def expects(self, length: int) -> int:
        """Bytes at most of what is made of so many: zstd's own bound, and a checksum."""
        return length + length // 256 + 64 + 4

    def encode(self, payload: bytes) -> bytes:
        """One frame, which says its length, with a checksum."""
        import zstandard

        return zstandard.ZstdCompressor(level=self.level, write_checksum=True).compress(payload)

    def decode(self, payload: bytes, length: int) -> bytes:
        """The file, of this length: a frame that says another is refused unopened."""
        import zstandard

        if len(payload) > self.expects(length):
            raise RefusedError("wrong-length", f"a frame has {len(payload)} bytes, for {length}")
        try:
            said = zstandard.get_frame_parameters(payload).content_size
            if said != length:
                raise RefusedError("wrong-length", f"a frame says {said} bytes, not {length}")
            reader = zstandard.ZstdDecompressor(max_window_size=max(1024, 2 * length))
            return reader.decompress(payload, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError:
            raise RefusedError("bad-frame", "the payload is not one whole frame of zstd") from None


def _low_bits(count: int, kept: int) -> int:
    return (count // kept).bit_length() - 1


def _unary_length(count: int, kept: int) -> int:
    return kept + ((count - 1) >> _low_bits(count, kept))


def _gaps_length(count: int, kept: int) -> int:
    return _bytes(_unary_length(count, kept) + kept * _low_bits(count, kept))


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _packed_bits(bits: NDArray[np.bool_]) -> UInt8[Tensor, " bytes"]:
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def _bits(packed: UInt8[Tensor, " bytes"], count: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(packed.numpy(), bitorder="little").astype(bool)
    if bits[count:].any():
        raise RefusedError("bad-positions", "the bits after the last position are not zero")
    return bits[:count]
