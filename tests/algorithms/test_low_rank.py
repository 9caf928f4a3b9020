"""Products in factors are what they are as matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge.algorithms.low_rank import (
    FactorNames,
    Product,
    align_factors,
    compute_svd,
    effective_rank,
    find_pairs,
    norm,
    pad_rank,
    refill_rank,
    sum_products,
    transpose,
    truncate_svd,
)
from fedgen_edge.seeds import generator

patient = settings(deadline=None, max_examples=50)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9))


def drawn(seed: int, out: int, in_: int, rank: int) -> Product:
    """A random product; its rank may be above its sides."""
    rng = generator("products", seed)
    b = torch.randn(out, rank, generator=rng, dtype=torch.float64)
    return Product(b, torch.randn(rank, in_, generator=rng, dtype=torch.float64))


def diagonal(*values: float) -> Product:
    return Product(torch.eye(len(values)).double(), torch.diag(torch.tensor(values)).double())


def test_pairs_are_two_factors_of_one_layer_that_are_both_there() -> None:
    names = ["a.lora_B", "a.lora_A", "b.lora_A", "b.bias", "e.lora_embedding_A", "average.a.lora_A"]
    names += ["e.lora_embedding_B", "average.a.lora_B", "c.lora_embedding_A", "c.lora_B"]
    found = find_pairs(names)
    assert [pair.layer for pair in found] == ["a", "e", "average.a"]
    assert found[1] == FactorNames("e.lora_embedding_A", "e.lora_embedding_B")
    assert found[2].residual == FactorNames(
        "residual.average.a.lora_A", "residual.average.a.lora_B"
    )


@patient
@given(size=sizes, seed=st.integers(0, 99))
def test_the_spectrum_is_the_dense_one(size: tuple[int, int, int], seed: int) -> None:
    whole = drawn(seed, *size)
    left, values, right = compute_svd(whole)
    dense = whole.b @ whole.a
    torch.testing.assert_close(left * values @ right, dense)
    few = min(dense.shape)
    torch.testing.assert_close(values[:few], torch.linalg.svdvals(dense)[: len(values)])
    torch.testing.assert_close(left.mT @ left, torch.eye(len(values)).double())
    torch.testing.assert_close(right @ right.mT, torch.eye(len(values)).double())
    assert bool((left.amax(0) == left.abs().amax(0)).all())
    assert norm(whole) == pytest.approx(float(torch.linalg.matrix_norm(dense)))


@patient
@given(size=sizes, seed=st.integers(0, 99), rank=st.integers(1, 4))
def test_the_closest_product_misses_the_tail_of_the_dense_spectrum(
    size: tuple[int, int, int], seed: int, rank: int
) -> None:
    whole = drawn(seed, *size)
    found = truncate_svd(whole, rank)
    tail = torch.linalg.svdvals(whole.b @ whole.a)[rank:]
    gap = torch.linalg.matrix_norm(found.b @ found.a - whole.b @ whole.a)
    torch.testing.assert_close(gap, tail.square().sum().sqrt(), atol=1e-9, rtol=1e-9)
    # balanced: both factors carry the same share of each singular value
    torch.testing.assert_close(found.b.square().sum(0), found.a.square().sum(1))


def test_singular_values_that_are_noise_take_no_rank() -> None:
    # of 4, 1 and 1e-9 those above 1/1000 count, and zeros never do
    assert len(truncate_svd(diagonal(4, 1, 1e-9), 3, 1e-3).a) == 2
    assert len(truncate_svd(diagonal(4, 1, 1e-9), 3).a) == 3
    assert len(truncate_svd(diagonal(0, 0, 0), 3).a) == 0
    assert pad_rank(truncate_svd(diagonal(0, 0, 0), 3), 2).b.tolist() == [[0, 0]] * 3


def test_a_norm_keeps_its_digits_where_products_nearly_cancel() -> None:
    # (1 + 1e-12) - 1 in each of three places; squares alone would leave nothing below 1e-8
    gap = sum_products([diagonal(1 + 1e-12, 1, 1), diagonal(1, 1, 1)], [1.0, -1.0])
    assert norm(gap) == pytest.approx(1e-12, rel=1e-3)


def test_a_sum_of_products_and_a_transpose_are_the_dense_ones() -> None:
    one, two = drawn(0, 3, 4, 2), drawn(1, 3, 4, 5)
    both = sum_products([one, two], [0.5, -2.0])
    torch.testing.assert_close(both.b @ both.a, one.b @ one.a / 2 - 2 * (two.b @ two.a))
    flipped = transpose(one)
    torch.testing.assert_close(flipped.b @ flipped.a, (one.b @ one.a).T)


def test_ranks_without_a_product_are_lent_rows_that_are_not_there_yet() -> None:
    # A has e1 + e2 and 3 e3, and e1 is in use: left are 3 e3, the larger, and e2
    whole = truncate_svd(diagonal(4, 0, 0), 3, 1e-3)
    before = Product(torch.zeros(3, 2).double(), torch.tensor([[1.0, 1, 0], [0, 0, 3]]).double())
    found = refill_rank(whole, before)
    assert found.b.tolist() == [[2, 0], [0, 0], [0, 0]]
    torch.testing.assert_close(found.a.abs(), torch.tensor([[2.0, 0, 0], [0, 0, 3]]).double())


def test_turning_towards_the_same_product_finds_its_factors() -> None:
    own = truncate_svd(drawn(3, 5, 6, 3), 3)
    about = torch.linalg.qr(drawn(4, 3, 3, 3).b).Q
    found = align_factors(Product(own.b @ about, about.mT @ own.a), own)
    torch.testing.assert_close(found, own)
    other = drawn(5, 5, 6, 3)
    moved = align_factors(other, own)
    torch.testing.assert_close(moved.b @ moved.a, other.b @ other.a)


def test_the_effective_rank_counts_equal_directions_and_weighs_others() -> None:
    assert effective_rank(diagonal(2, 2, 2)) == pytest.approx(3)
    assert effective_rank(diagonal(7, 0)) == pytest.approx(1)
    # shares 3/4 and 1/4: exp(3/4 ln 4/3 + 1/4 ln 4) = 4 / 3^(3/4)
    assert effective_rank(diagonal(3, 1)) == pytest.approx(4 / math.pow(3, 0.75))
    assert effective_rank(diagonal(0, 0)) == 0
