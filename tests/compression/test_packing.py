"""Places, codes of four bits and files are what arithmetic says, and nothing else is read."""

import io
import math
import tracemalloc

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from fedgen_edge.compression.packing import (
    DTYPE_NAMES,
    Zstd,
    count_file_bytes,
    decode_positions,
    encode_positions,
    get_position_form,
    make_header,
    mask_largest,
    pack_nibbles,
    pack_parts,
    unpack_nibbles,
    unpack_parts,
    uses_gaps,
)
from fedgen_edge.errors import ConfigError, RefusedError

patient = settings(deadline=None, max_examples=60)


def masked(count: int, *at: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(at)] = True
    return mask


def from_bits(text: str) -> Tensor:
    """Bits in the order in which they are written, eight in a byte, the lowest first."""
    bits = text.replace(" ", "")
    return torch.tensor(
        [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)], dtype=torch.uint8
    )


@patient
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.sampled_from(list(DTYPE_NAMES)), st.integers(0, 99))
    )
)
def test_the_header_is_the_one_that_the_library_writes(
    form: dict[str, tuple[torch.dtype, int]],
) -> None:
    parts = {k: torch.zeros(count, dtype=dtype) for k, (dtype, count) in form.items()}
    payload = pack_parts(parts)
    assert payload.startswith(make_header(form))
    assert len(payload) == count_file_bytes(form)
    assert all(torch.equal(v, parts[k]) for k, v in unpack_parts(payload, form).items())


FORM = {"values": (torch.int8, 5), "scales": (torch.float16, 2)}
FILE = save({"values": torch.zeros(5, dtype=torch.int8), "scales": torch.zeros(2).half()})


def test_a_file_with_any_byte_of_its_header_changed_is_refused() -> None:
    assert unpack_parts(FILE, FORM).keys() == FORM.keys()
    for at in range(len(make_header(FORM))):
        changed = bytearray(FILE)
        changed[at] ^= 1
        with pytest.raises(RefusedError, match=r"^bad-header"):
            unpack_parts(bytes(changed), FORM)


@pytest.mark.parametrize("payload", [*(FILE[:n] for n in range(len(FILE))), FILE + b"\0"])
def test_a_file_of_another_length_is_refused(payload: bytes) -> None:
    with pytest.raises(RefusedError, match=r"^wrong-length"):
        unpack_parts(payload, FORM)


def test_the_first_of_equal_values_are_kept() -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    assert mask_largest(values, 3).tolist() == [False, True, True, True, False, False]
    assert mask_largest(torch.zeros(4), 2).tolist() == [True, True, False, False]


@patient
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_what_is_kept_is_what_a_stable_sort_puts_first(
    numbers: list[int], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, len(numbers)))
    expected = sorted(range(len(numbers)), key=lambda i: -numbers[i])[:kept]
    found = mask_largest(torch.tensor(numbers).float(), kept).nonzero().flatten().tolist()
    assert found == sorted(expected)


def test_two_places_of_sixty_four_are_thirteen_bits() -> None:
    # floor(log2(64 / 2)) = 5 low bits. 3 = 0 * 32 + 3 and 40 = 1 * 32 + 8. Of the high bits, gaps
    # 0 and 1: a one, then a zero and a one. 3 and 8 in five bits, lowest first: 11000, 00010.
    found = encode_positions(masked(64, 3, 40))
    assert torch.equal(found["gaps"], from_bits("1 01 11000 00010"))
    assert torch.equal(decode_positions(found, 64, 2), masked(64, 3, 40))


def test_eight_places_of_sixteen_are_a_bitmap() -> None:
    found = encode_positions(masked(16, 0, 1, 2, 3, 8, 9, 10, 11))
    assert found["bitmap"].tolist() == [0b1111, 0b1111]


@patient
@given(st.integers(1, 300), st.data())
def test_places_are_told_in_the_shorter_way_of_a_known_length(
    count: int, data: st.DataObject
) -> None:
    at = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    mask, form = masked(count, *at), get_position_form(count, len(at))
    found = encode_positions(mask)
    assert {k: (v.dtype, v.numel()) for k, v in found.items()} == form
    assert sum(size for _, size in form.values()) <= math.ceil(count / 8)
    assert torch.equal(decode_positions(found, count, len(at)), mask)


@pytest.mark.parametrize(
    ("density", "gaps"), [(0.001, True), (0.1, True), (0.2, True), (0.3, False), (1.0, False)]
)
def test_density_chooses_between_gaps_and_a_bitmap(density: float, gaps: bool) -> None:
    # Gaps of count / kept values take 2 + log2(count / kept) bits each, or a little less: at a
    # fifth 5 values are 4.3 bits at most, and at three tenths 3.3 values are 3.7, over a bitmap's.
    count = 100_000
    kept = int(density * count)
    assert uses_gaps(count, kept) == gaps
    if gaps:
        ((_, size),) = get_position_form(count, kept).values()
        each = math.log2(count / kept)
        assert 1 + each < 8 * size / kept < 2 + each + 8 / kept


@pytest.mark.parametrize(
    ("bits", "why"),
    [
        ("0 01 11000 00010 000", "1 gaps"),
        ("1 11 11000 00010 000", "3 gaps"),
        ("1 10 00010 11000 000", "rise"),  # 8, then 3
        ("1 10 11000 11000 000", "rise"),  # 3 twice
        ("1 01 11000 00010 001", "after the last"),
    ],
)
def test_gaps_that_cannot_be_are_refused(bits: str, why: str) -> None:
    with pytest.raises(RefusedError, match=rf"^bad-positions: .*{why}"):
        decode_positions({"gaps": from_bits(bits)}, 64, 2)


def test_gaps_that_leave_the_vector_are_refused() -> None:
    # floor(log2(50 / 2)) = 4 low bits, and high bits up to 49 // 16 = 3. 49 = 3 * 16 + 1.
    last = from_bits("1 0001 0000 1000 000")
    assert decode_positions({"gaps": last}, 50, 2).nonzero().flatten().tolist() == [0, 49]
    with pytest.raises(RefusedError, match=r"^bad-positions: .*leave the 50 values"):
        decode_positions({"gaps": from_bits("1 0001 0000 0100 000")}, 50, 2)


@pytest.mark.parametrize("ones", [0, 2, 4, 5])
def test_a_bitmap_with_another_number_of_ones_is_refused(ones: int) -> None:
    right = from_bits("11100")
    assert decode_positions({"bitmap": right}, 5, 3).sum() == 3
    with pytest.raises(RefusedError, match=rf"^bad-positions: .*{ones} ones, not 3 of 5"):
        decode_positions({"bitmap": from_bits("1" * ones + "0" * (5 - ones))}, 5, 3)


def test_a_bitmap_with_ones_after_its_end_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"^bad-positions: .*after the last"):
        decode_positions({"bitmap": from_bits("111001")}, 5, 3)


def test_two_codes_share_a_byte() -> None:
    # -3 is 13 in four bits: 5 + 16 * 13 = 213. The odd one out, 7, is alone.
    assert pack_nibbles(torch.tensor([5, -3, 7], dtype=torch.int8)).tolist() == [213, 7]
    every = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(every), 16), every)


def test_a_half_byte_that_no_code_has_must_be_zero() -> None:
    with pytest.raises(RefusedError, match=r"^bad-values"):
        unpack_nibbles(torch.tensor([213, 0x17], dtype=torch.uint8), 3)


PLAIN = bytes(range(256)) * 2
FRAME = Zstd().encode(PLAIN)


def bomb(size: int, says: bool) -> bytes:
    out = io.BytesIO()
    maker = zstandard.ZstdCompressor(level=1)
    with maker.stream_writer(out, size=size if says else -1, closefd=False) as writer:
        for _ in range(size // 2**20):
            writer.write(bytes(2**20))
    return out.getvalue()


def test_a_frame_is_undone_and_never_longer_than_its_bound() -> None:
    assert Zstd().decode(FRAME, len(PLAIN)) == PLAIN
    for size in (0, 1, 100, 1000, 300_000):
        noise = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator())
        frame = Zstd().encode(noise.numpy().tobytes())
        assert size < len(frame) <= Zstd().get_max_bytes(size)


@pytest.mark.parametrize("says", [True, False])
def test_a_bomb_is_refused_before_its_bytes_are_made(says: bool) -> None:
    payload = bomb(64 * 2**20, says)
    limit = 100_000
    assert len(payload) < limit
    tracemalloc.start()
    with pytest.raises(RefusedError, match=r"^wrong-length: a frame says"):
        Zstd().decode(payload, limit)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize("said", [300, 700])
def test_a_frame_that_lies_about_its_length_is_refused(said: int) -> None:
    # Magic number of 4 bytes, a descriptor of 1; then the length less 256, in 2 bytes.
    frame = Zstd().encode(PLAIN)
    assert int.from_bytes(frame[5:7], "little") == len(PLAIN) - 256
    lying = frame[:5] + (said - 256).to_bytes(2, "little") + frame[7:]
    with pytest.raises(RefusedError, match=r"^bad-frame"):
        Zstd().decode(lying, said)


@pytest.mark.parametrize(
    "payload",
    [
        *(FRAME[:n] for n in range(len(FRAME))),
        FRAME + b"\0",
        FRAME + FRAME,
        b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + FRAME,
        PLAIN,
        FRAME + bytes(10_000),
    ],
)
def test_what_is_not_one_whole_frame_is_refused(payload: bytes) -> None:
    with pytest.raises(RefusedError, match=r"^(bad-frame|wrong-length)"):
        Zstd().decode(payload, len(PLAIN))


def test_a_frame_of_another_length_is_refused_unopened() -> None:
    for size in (0, len(PLAIN) - 1, len(PLAIN) + 1):
        with pytest.raises(RefusedError, match=rf"^wrong-length: a frame says {size} bytes"):
            Zstd().decode(Zstd().encode(bytes(size)), len(PLAIN))


def test_more_bytes_than_an_honest_frame_has_are_not_looked_at() -> None:
    most = Zstd().get_max_bytes(len(PLAIN))
    with pytest.raises(RefusedError, match=rf"^wrong-length: a frame has {most + 1} bytes"):
        Zstd().decode(FRAME.ljust(most + 1, b"\0"), len(PLAIN))


def test_a_frame_with_any_byte_changed_is_refused() -> None:
    for at in range(len(FRAME)):
        changed = bytearray(FRAME)
        changed[at] ^= 0x11
        with pytest.raises(RefusedError, match=r"^(bad-frame|wrong-length)"):
            Zstd().decode(bytes(changed), len(PLAIN))


@pytest.mark.parametrize("level", [0, 20])
def test_a_level_that_zstd_lacks_is_refused(level: int) -> None:
    with pytest.raises(ConfigError, match=f"level={level} "):
        Zstd(level)


def test_the_safetensors_library_reads_what_travels() -> None:
    assert load(FILE)["scales"].dtype == torch.float16
