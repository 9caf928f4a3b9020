"""Arithmetic on leaves: sums that a reader can redo, and laws that hold for any leaves."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge import leaves
from fedgen_edge.types import Leaves

patient = settings(deadline=None, max_examples=50)
numbers = st.floats(-100, 100, width=32)


def of(a: float, b: float, c: float) -> Leaves:
    kind = torch.float32
    return {"one": torch.tensor([a, b], dtype=kind), "two": torch.tensor([[c]], dtype=kind)}


adapters = st.builds(of, numbers, numbers, numbers)
members = st.lists(st.tuples(adapters, st.floats(0.01, 100)), min_size=1, max_size=6)


def same(found: Leaves, wanted: Leaves, tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        torch.testing.assert_close(found[name], leaf, rtol=tolerance, atol=tolerance)


# ---- sums, differences, multiples


def test_add_subtract_and_scale_go_leaf_by_leaf() -> None:
    one, other = of(1, 2, 3), of(10, 20, 30)
    same(leaves.add(one, other), of(11, 22, 33))
    same(leaves.subtract(other, one), of(9, 18, 27))
    same(leaves.scale(one, -2.0), of(-2, -4, -6))
    same(one, of(1, 2, 3))


def test_add_keeps_a_leaf_that_the_change_lacks() -> None:
    same(leaves.add(of(1, 2, 3), {"two": torch.tensor([[4.0]])}), of(1, 2, 7))
    same(leaves.add(of(1, 2, 3), {}), of(1, 2, 3))


# ---- the mean


def test_a_mean_is_weighted_and_its_weights_need_not_sum_to_one() -> None:
    # (1 * 2 + 3 * 6) / 4 = 5, (1 * 0 + 3 * 4) / 4 = 3, (1 * 8 + 3 * 0) / 4 = 2.
    both = [of(2, 0, 8), of(6, 4, 0)]
    same(leaves.mean(both, torch.tensor([1.0, 3.0])), of(5, 3, 2))
    same(leaves.mean(both, torch.tensor([10.0, 30.0])), of(5, 3, 2))


def test_a_weight_matters_and_a_weight_of_zero_leaves_its_member_out() -> None:
    both = [of(2, 0, 8), of(6, 4, 0)]
    same(leaves.mean(both, torch.tensor([1.0, 0.0])), both[0])
    same(leaves.mean(both, torch.tensor([1.0, 1.0])), of(4, 2, 4))


@patient
@given(members=members, data=st.data())
def test_a_mean_does_not_depend_on_the_order(members: list[Any], data: st.DataObject) -> None:
    other = data.draw(st.permutations(members))
    # Relative to the largest number, 100: float32 keeps 6e-8 of it in each of 6 terms.
    same(mean_of(members), mean_of(other), 100 * 1e-6)


def mean_of(weighted: list[tuple[Leaves, float]]) -> Leaves:
    own, weights = zip(*weighted, strict=True)
    return leaves.mean(own, torch.tensor(weights))


@patient
@given(own=adapters, weight=st.floats(0.01, 100))
def test_the_mean_of_one_member_is_that_member(own: Leaves, weight: float) -> None:
    same(mean_of([(own, weight)]), own)


@patient
@given(own=adapters, weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_the_mean_of_equal_members_is_each_of_them(own: Leaves, weights: list[float]) -> None:
    same(mean_of([(own, weight) for weight in weights]), own, 1e-6)


@patient
@given(members=members)
def test_a_mean_lies_between_its_members(members: list[Any]) -> None:
    stacked = leaves.stack([own for own, _ in members])
    for name, leaf in mean_of(members).items():
        least, most = stacked[name].amin(0), stacked[name].amax(0)
        assert ((least - 1e-4 <= leaf) & (leaf <= most + 1e-4)).all()


@pytest.mark.parametrize("weights", [[], [0.0], [0.0, 0.0]])
def test_a_mean_of_nothing_is_an_error(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one member with a positive weight"):
        leaves.mean([of(1, 2, 3)] * len(weights), torch.tensor(weights))


def test_a_mean_needs_a_weight_for_each_member() -> None:
    with pytest.raises(ValueError, match="zip"):
        leaves.mean([of(1, 2, 3)], torch.tensor([1.0, 2.0]))


# ---- norms


def test_a_norm_is_over_all_leaves_together() -> None:
    # sqrt(2^2 + 3^2 + 6^2) = 7.
    assert leaves.norm(of(2, 3, 6)) == 7


def test_a_stack_has_a_norm_for_each_client() -> None:
    # sqrt(2^2 + 3^2 + 6^2) = 7 and sqrt(1^2 + 4^2 + 8^2) = 9.
    stacked = leaves.stack([of(2, 3, 6), of(1, 4, 8)])
    same({"": leaves.norm(stacked, axes=1)}, {"": torch.tensor([7.0, 9.0])})


@patient
@given(own=adapters, factor=st.floats(-10, 10))
def test_a_norm_grows_as_its_leaves(own: Leaves, factor: float) -> None:
    scaled = float(leaves.norm(leaves.scale(own, factor)))
    assert math.isclose(scaled, abs(factor) * float(leaves.norm(own)), rel_tol=1e-4, abs_tol=1e-4)


# ---- stacks


@patient
@given(own=st.lists(adapters, min_size=1, max_size=4))
def test_each_row_of_a_stack_is_its_member(own: list[Leaves]) -> None:
    stacked = leaves.stack(own)
    assert {k: tuple(v.shape) for k, v in stacked.items()} == {
        "one": (len(own), 2),
        "two": (len(own), 1, 1),
    }
    for place, member in enumerate(own):
        same(leaves.row(stacked, place), member)


def test_select_keeps_the_names_that_pass() -> None:
    same(leaves.select(of(1, 2, 3), lambda name: name == "two"), {"two": torch.tensor([[3.0]])})


def test_the_largest_magnitude_of_a_leaf() -> None:
    assert leaves.max_magnitude(torch.tensor([1.0, -3.0, 2.0])) == 3
    assert leaves.max_magnitude(torch.tensor([[0.0, 4.0], [-1.0, 2.0]])) == 4
    assert math.isinf(leaves.max_magnitude(torch.tensor([1.0, math.nan])))
    assert math.isinf(leaves.max_magnitude(torch.tensor([1.0, -math.inf])))
