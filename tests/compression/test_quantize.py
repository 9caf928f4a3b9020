"""Rounding is within its step, and right on average; what no sender makes is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgen_edge.compression.quantize import Cast, Quantize, ValueEncoder
from fedgen_edge.errors import ConfigError, RefusedError, TrainingError
from fedgen_edge.seeds import generator

CODERS = [Cast("fp32"), Cast("fp16"), Cast("bf16"), Quantize(8), Quantize(4), Quantize(4, block=5)]


def passed(coder: ValueEncoder, values: Tensor, key: int = 0) -> Tensor:
    return coder.decode(coder.encode(values, generator(key)), values.numel())


@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("coder", CODERS, ids=lambda c: c.name)
@given(st.integers(1, 300))
def test_parts_are_what_was_expected_of_so_many_values(coder: ValueEncoder, count: int) -> None:
    parts = coder.encode(torch.randn(count, generator=generator("values")), generator("round"))
    assert {k: (v.dtype, v.numel()) for k, v in parts.items()} == coder.get_form(count)
    assert coder.decode(parts, count).shape == (count,)


@pytest.mark.parametrize(("to", "digits"), [("fp16", 11), ("bf16", 8)])
def test_a_cast_is_off_by_half_a_unit_in_its_last_place(to: str, digits: int) -> None:
    values = 1 + torch.rand(1000, generator=generator("values"))  # a unit is 2^(1 - digits) here
    off = (passed(Cast(to), values) - values).abs()
    assert 0.9 * 2.0**-digits < float(off.max()) <= 2.0**-digits


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([8, 4]), st.integers(1, 40), st.integers(1, 200), st.integers(-40, 12))
def test_a_value_is_off_by_less_than_a_step_of_its_block(
    bits: int, block: int, count: int, power: int
) -> None:
    coder = Quantize(bits, block)
    values = torch.randn(count, generator=generator(count)) * 2.0**power
    found = passed(coder, values).double()
    for part, got in zip(values.double().split(block), found.split(block), strict=True):
        # fp16 has 11 bits from 2^-14 on, and multiples of 2^-24 below
        most = float(part.abs().max())
        scale = most + max(most * 2.0**-10, 2.0**-24)
        assert float((part - got).abs().max()) <= scale / (2 ** (bits - 1) - 1)


def test_four_values_in_two_blocks_by_hand() -> None:
    # Scales 2 and 0.5; steps 2 / 7 and 0.5 / 7. All values are whole steps: nothing is at random.
    values = torch.tensor([2.0, -2.0, 0.0, 0.5])
    parts = Quantize(4, block=2).encode(values, generator("any"))
    assert parts["scales"].tolist() == [2.0, 0.5]
    # 7 + 16 * (-7 & 15) = 7 + 16 * 9; 0 + 16 * 7
    assert parts["values"].tolist() == [151, 112]
    assert torch.equal(Quantize(4, block=2).decode(parts, 4), values)
    assert Quantize(8, block=2).encode(values, generator("any"))["values"].tolist() == [
        127,
        -127,
        0,
        127,
    ]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("most", [0.1, 3e-4, 2e-6])
def test_rounding_at_random_is_right_on_average_and_as_wide_as_it_must_be(
    bits: int, most: float
) -> None:
    # A value f of a step above a multiple is rounded up with probability f: its variance is
    # f (1 - f) steps^2, its mean off by sqrt(f (1 - f) / draws) of a step. 64 values at 5 such
    # deviations fail in 4 of 100,000 seeds. 0.1 is no fp16: the nearest lies below, and would clip.
    draws, coder = 4000, Quantize(bits, block=64)
    values = most * torch.linspace(-1, 1, 64)
    rng = generator("draws", bits)
    parts = [coder.encode(values, rng) for _ in range(draws)]
    found = torch.stack([coder.decode(p, 64) for p in parts]).double()
    step = float(parts[0]["scales"]) / coder.levels
    share = (values.double() / step) % 1
    spread = (share * (1 - share)).sqrt()
    mean = (found.mean(0) - values.double()) / step
    assert (mean.abs() <= 5 * spread / math.sqrt(draws) + 1e-4).all()
    assert float(found.std(0).div(step).sub(spread).abs().max()) < 0.05
    assert float(spread.max()) > 0.4


def test_a_key_decides_how_values_are_rounded() -> None:
    values = torch.randn(1000, generator=generator("values"))
    one, again, other = (passed(Quantize(4), values, key) for key in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_zeros_stay_zeros_beside_other_blocks() -> None:
    values = torch.tensor([0.0, 0.0, -0.0, 5.0])
    for bits in (8, 4):
        parts = Quantize(bits, block=2).encode(values, generator("any"))
        assert parts["scales"].tolist() == [0.0, 5.0]
        assert torch.equal(Quantize(bits, block=2).decode(parts, 4), values)


def test_values_below_fp16_are_not_lost_but_rounded() -> None:
    # 2^-30 over a scale of 2^-24 is 127 / 64 of int8's steps: mean 1.984, always 1 or 2 of them.
    values = torch.full((10_000,), 2.0**-30)
    found = passed(Quantize(8), values) * 127 * 2.0**24
    assert {*found.unique().tolist()} == {1.0, 2.0}
    # the deviation of the mean is sqrt(0.984 * 0.016 / 10,000) = 0.0012
    assert abs(float(found.mean()) - 127 / 64) < 0.006


def test_the_largest_scale_is_fp16s() -> None:
    largest = torch.tensor([65504.0])
    assert torch.equal(passed(Quantize(8), largest), largest)
    assert torch.equal(passed(Cast("fp16"), largest), largest)


@pytest.mark.parametrize(
    ("coder", "value"),
    [
        (Quantize(8), 65505.0),
        (Quantize(4), -1e6),
        (Cast("fp16"), 65520.0),
        (Cast("bf16"), 3.4e38),
    ],
)
def test_a_value_beyond_the_type_is_a_mistake_of_one_line(
    coder: ValueEncoder, value: float
) -> None:
    with pytest.raises(TrainingError, match=rf"^a change of .* {coder.name} can hold ") as found:
        coder.encode(torch.tensor([value]), generator("any"))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0])
def test_a_scale_that_is_no_size_is_refused(scale: float) -> None:
    parts = Quantize(8, block=2).encode(torch.zeros(4), generator("any"))
    parts["scales"][1] = scale
    with pytest.raises(RefusedError, match=r"^bad-values: a scale"):
        Quantize(8, block=2).decode(parts, 4)


def test_a_code_that_no_sender_writes_is_refused() -> None:
    scales = torch.ones(1).half()
    for coder, byte in (
        (Quantize(8), torch.tensor([-128], dtype=torch.int8)),
        (Quantize(4), torch.tensor([8], dtype=torch.uint8)),
    ):
        with pytest.raises(RefusedError, match=r"^bad-values: a code"):
            coder.decode({"scales": scales, "values": byte}, 1)


def test_long_blocks_of_int4_lose_more_than_they_hold_and_shorter_ones_do_not() -> None:
    # One value of 1 and the rest at a quarter of a step, 1 / 28: each of those is off by
    # sqrt(3) / 4 of a step, so the error is (block - 1) 3 / 784 against 1 + (block - 1) / 784:
    # equal at block - 1 = 392. Scales are exact, and so is the average over 200 draws to 2 %.
    for block, loses in ((300, False), (500, True)):
        values = torch.full((block,), 1 / 28)
        values[0] = 1
        coder = Quantize(4, block)
        rng = generator("long")
        off = torch.stack(
            [coder.decode(coder.encode(values, rng), block) - values for _ in range(200)]
        )
        assert (off.square().sum(1).mean() > values.square().sum()) == loses


def test_a_block_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^block=0 "):
        Quantize(8, block=0)
