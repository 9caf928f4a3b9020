"""Where randomness begins: every key has its own, and the same one on every machine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedgen_edge import seeds
from fedgen_edge.seeds import generator, seed

patient = settings(deadline=None, max_examples=50)
keys = st.lists(st.integers(-(2**63), 2**63) | st.text(max_size=8), max_size=5).map(tuple)


@patient
@given(key=keys)
def test_a_seed_is_a_63_bit_number_and_always_the_same(key: tuple[int | str, ...]) -> None:
    assert 0 <= seed(*key) < 2**63
    assert seed(*key) == seed(*key)
    assert torch.equal(
        torch.rand(3, generator=generator(*key)), torch.rand(3, generator=generator(*key))
    )


@patient
@given(one=keys, other=keys)
def test_any_change_of_the_key_changes_the_seed(
    one: tuple[int | str, ...], other: tuple[int | str, ...]
) -> None:
    assert (seed(*one) == seed(*other)) == (one == other)


def test_keys_that_only_look_alike_differ() -> None:
    alike = [(1, 23), (12, 3), (123,), ("1", 23), ("1, 23",), ("(1, 23)",), (23, 1), (1, 23, "")]
    assert len({seed(*key) for key in alike}) == len(alike)


def test_a_seed_is_the_same_on_every_machine() -> None:
    # printf "(0, 'order', 3, 7)" | sha256sum begins 240fb8e21e5c62bd; these eight bytes
    # from the last to the first, shifted right by one bit.
    assert seed(0, "order", 3, 7) == 0xBD625C1EE2B80F24 >> 1


def test_no_seed_is_global() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("place", [0, 1, 2**23, 2**24 - 1])
def test_the_outermost_normal_numbers_are_finite(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.tensor([place / 2**24])
    monkeypatch.setattr(seeds, "uniform", lambda *_: drawn)
    found = float(seeds.normal(torch.tensor(0), 0, (1,)))
    # the quantile of the middle of one of 2^24 equal steps, by scipy
    assert found == pytest.approx(float(norm.ppf((place + 0.5) / 2**24)), abs=1e-6)
    assert abs(found) < 5.5
