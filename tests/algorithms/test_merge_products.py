"""Merging by products: sums by hand, leaves and ranks at the edges, diagnostics."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fedgen_edge.algorithms import merge, merge_products
from fedgen_edge.algorithms.low_rank import FactorNames
from fedgen_edge.leaves import add
from fedgen_edge.seeds import generator
from fedgen_edge.types import AVERAGE, Update
from support.cohorts import (
    EXACT,
    LAYERS,
    LINEAR,
    RULES,
    after,
    averaged,
    changed,
    close,
    cohort,
    cohort_of,
    dense,
    drawn,
    every_layer,
    every_rule,
    ideal,
    matrix,
    names,
    untrained,
)


def axes(weights: Sequence[float] = (1, 1), cap: int = 2) -> list[Update]:
    """Two clients of rank 1 whose products are e1 e1' and e2 e2'."""
    end = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    own = [{LINEAR.a: e, LINEAR.b: e.T} for e in end]
    zero = {k: torch.zeros_like(v) for k, v in own[0].items()}
    return cohort({**zero, **merge_products.make_residuals(zero, cap)}, own, weights)


# --- by hand


def test_the_best_product_of_one_rank_is_the_heavier_axis_split_evenly() -> None:
    # 3/4 e1 e1' + 1/4 e2 e2': rank 1 keeps 3/4, as sqrt(3/4) in both factors
    change = changed(merge_products.flexlora, axes((3, 1)))
    torch.testing.assert_close(change[LINEAR.b], torch.tensor([[0.75**0.5], [0.0]]))
    torch.testing.assert_close(change[LINEAR.a], torch.tensor([[0.75**0.5, 0.0]]))


def test_a_sign_is_in_a_where_the_largest_of_b_is_positive() -> None:
    # B = -2 e1, A = 8 e2': 16, and the sign goes to A
    own = {LINEAR.b: torch.tensor([[-2.0], [0.0]]), LINEAR.a: torch.tensor([[0.0, 8.0]])}
    change = changed(
        merge_products.flexlora, cohort({k: v * 0 for k, v in own.items()}, [own], [1])
    )
    torch.testing.assert_close(change[LINEAR.b], torch.tensor([[4.0], [0.0]]))
    torch.testing.assert_close(change[LINEAR.a], torch.tensor([[0.0, -4.0]]))


def test_the_residual_is_the_covariance_weighed_by_examples() -> None:
    # p1 p2 (B1 - B2) (A1 - A2) = 3/16 [1, -1]' [1, -1]; without weights, as in the
    # published code for FedEx-LoRA, it would be 4/16
    now = after("fedex_lora", axes((3, 1)))
    torch.testing.assert_close(now[LINEAR.b], torch.tensor([[0.75], [0.25]]))
    torch.testing.assert_close(
        matrix(now, LINEAR.residual), torch.tensor([[3.0, -3], [-3, 3]]).double() / 16
    )


def test_a_stack_joins_the_residual_and_the_trained_pair_stays() -> None:
    updates = axes((3, 1))
    change = changed(RULES["flora"], updates)
    assert not change[LINEAR.a].any()
    assert not change[LINEAR.b].any()
    torch.testing.assert_close(
        matrix(change, LINEAR.residual), torch.tensor([[0.75, 0], [0, 0.25]]).double()
    )


def test_a_correction_goes_half_of_the_way_where_the_ridge_is_as_large_as_a() -> None:
    # 1 x 1: B 1 and 0, A 2 and 0. Ideal is 1; means are 1/2 and 1, so 1/2 is missed, and with
    # ridge 1 the correction is 1/2 * 1 / (1 + 1) = 1/4
    ends = [(1.0, 2.0), (0.0, 0.0)]
    own = [{LINEAR.b: torch.tensor([[b]]), LINEAR.a: torch.tensor([[a]])} for b, a in ends]
    now = add(own[1], merge_products.lora_fair(1.0)(own[1], cohort(own[1], own, (2, 2))))
    assert [float(now[k]) for k in (LINEAR.b, LINEAR.a)] == [0.75, 1.0]


def test_a_square_residual_is_not_transposed() -> None:
    # published code for FedEx-LoRA adds its transpose, which a square layer takes without a word.
    # One client's product is at (1, 2), the other's zero: half of it, at (1, 2)
    own = [
        {LINEAR.b: torch.tensor([[w], [0.0]]), LINEAR.a: torch.tensor([[0.0, w]])} for w in (1, 0)
    ]
    updates = cohort({**own[1], **merge_products.make_residuals(own[1], 2)}, own, (1, 1))
    for name in EXACT:
        torch.testing.assert_close(
            dense(after(name, updates), "linear"), torch.tensor([[0, 0.5], [0, 0]]).double()
        )


# --- leaves that are no pair, and clients that count for nothing


@every_rule
def test_other_leaves_and_factors_without_their_partner_are_averaged(name: str) -> None:
    rng = generator("others")
    others = ("linear.bias", "alone.lora_B", "other.lora_embedding_A")
    received = {k: torch.randn(3, 2, generator=rng) for k in (*others, "alone.lora_A")}
    own = [{k: torch.randn(3, 2, generator=rng) for k in others} for _ in range(3)]
    updates = cohort(received, own, (1, 2, 5))
    change, plain = RULES[name](received, updates), merge.weighted_average(received, updates)
    assert change.keys() == {*others}
    assert all(torch.equal(change[k], plain[k]) for k in others)


def test_an_error_of_clients_without_weight_is_not_known() -> None:
    with pytest.raises(ValueError, match="positive weight"):
        merge_products.measure_errors(axes((0, 0)), {})


def test_a_residual_of_another_rank_and_a_ridge_of_zero_are_errors() -> None:
    for rule in (merge_products.fedex_lora(2), merge_products.flora(2)):
        with pytest.raises(ValueError, match="has rank 1, and not 2"):
            changed(rule, axes(cap=1))
    with pytest.raises(ValueError, match="ridge=0"):
        merge_products.lora_fair(0.0)


def test_residuals_are_zero_and_no_wider_than_their_layer() -> None:
    found = merge_products.make_residuals(drawn(0), 5)
    assert not any(v.any() for v in found.values())
    assert found["residual.convolution.lora_A"].shape == (5, 4, 3, 3)
    assert found["residual.convolution.lora_B"].shape == (7, 5, 1, 1)
    assert merge_products.make_residuals(drawn(0), 50)["residual.linear.lora_A"].shape == (7, 9)
    narrow = {LINEAR.a: torch.ones(2, 3), LINEAR.b: torch.ones(7, 2)}
    assert merge_products.make_residuals(narrow, 50)[LINEAR.residual.b].shape == (7, 3)


# --- ranks that the product does not use, and moving averages


def test_ranks_that_the_product_leaves_keep_a_factor_to_train_with() -> None:
    # 4 e1 e1' uses one rank: 2 e1 in both factors. A's other direction is kept, without a B.
    start = {LINEAR.a: torch.eye(2, 3), LINEAR.b: torch.zeros(4, 2)}
    own = {LINEAR.a: torch.eye(2, 3), LINEAR.b: 4 * torch.eye(4, 1) * torch.eye(1, 2)}
    now = add(start, merge_products.flexlora(start, cohort(start, [own], [1])))
    torch.testing.assert_close(now[LINEAR.b], 2 * torch.eye(4, 1) * torch.eye(1, 2))
    torch.testing.assert_close(now[LINEAR.a].abs(), torch.tensor([[2.0, 0, 0], [0, 1, 0]]))
    # an embedding is drawn the other way round: B is kept
    pair = FactorNames("e.lora_embedding_A", "e.lora_embedding_B")
    start = {pair.a: torch.zeros(2, 3), pair.b: torch.eye(4, 2)}
    own = {pair.a: 4 * torch.eye(2, 1) * torch.eye(1, 3), pair.b: torch.eye(4, 2)}
    now = add(start, merge_products.flexlora(start, cohort(start, [own], [1])))
    torch.testing.assert_close(now[pair.a], 2 * torch.eye(2, 1) * torch.eye(1, 3))
    torch.testing.assert_close(now[pair.b].abs(), torch.eye(4, 2) * torch.tensor([2.0, 1.0]))


@every_layer
def test_a_product_of_zero_can_still_be_trained(layer: str) -> None:
    # nobody moved, or all that moved cancels: one factor is zero, and the other one leads its
    # gradient into as many directions, of the same sizes, as at the start
    start, pair = untrained(8, [layer]), names(layer)
    zero, lead = pair[::-1] if layer != "embedding" else pair
    step = drawn(9, [layer])[zero]
    for steps in ([0 * step], [step, -step]):
        own = [{**start, zero: start[zero] + s} for s in steps]
        now = add(start, merge_products.flexlora(start, cohort(start, own, [1.0] * len(own))))
        assert not now[zero].any()
        values = [torch.linalg.svdvals(k[lead].flatten(1)) for k in (start, now)]
        torch.testing.assert_close(values[1], values[0])


def test_a_moving_average_keeps_to_the_factors_that_it_follows() -> None:
    # diag(3, 2), and its average diag(2, 3). By size alone the average's first column would be e2,
    # and a step that mixes it with e1 would make a product of neither: it is turned, e1 first.
    ends = {"": torch.tensor([3.0, 2.0]), "average.": torch.tensor([2.0, 3.0])}
    own = {
        prefix + name: torch.diag(values) if name == LINEAR.b else torch.eye(2)
        for prefix, values in ends.items()
        for name in LINEAR
    }
    zero = {k: 0 * v for k, v in own.items()}
    now = add(zero, merge_products.flexlora(zero, cohort(zero, [own], [1])))
    for prefix, values in ends.items():
        for name in LINEAR:
            torch.testing.assert_close(now[prefix + name], torch.diag(values.sqrt()))


def test_a_moving_average_has_its_own_best_product() -> None:
    updates, slow = cohort_of(10, 2), cohort_of(11, 2)
    both = [
        replace(
            u,
            order=replace(u.order, received=averaged(u.order.received, v.order.received)),
            delta=averaged(u.delta, v.delta),
        )
        for u, v in zip(updates, slow, strict=True)
    ]
    now, apart = (
        after("flexlora", both),
        averaged(after("flexlora", updates), after("flexlora", slow)),
    )
    for layer in (*LAYERS, *(AVERAGE + k for k in LAYERS)):
        assert close(matrix(now, names(layer)), matrix(apart, names(layer)))


# --- diagnostics


def test_the_error_of_means_is_known_and_that_of_exact_rules_is_none() -> None:
    # e1 e1' and e2 e2': I / 2 of size sqrt(1/2); the means' product is 1/4 everywhere, and misses
    # 1/4 in each of four places, together 1/2
    # by_svd keeps one of the two: 1/2 of sqrt(1/2)
    updates = axes()
    for name in ("mean", "flexlora"):
        assert merge_products.measure_errors(updates, after(name, updates)) == {
            "linear": pytest.approx(0.5**0.5)
        }
    for rule in (merge_products.fedex_lora(2), merge_products.flora(2)):
        now = add(updates[0].order.received, changed(rule, updates))
        assert merge_products.measure_errors(updates, now)["linear"] < 1e-6


@every_rule
def test_the_error_is_the_dense_one(name: str) -> None:
    updates = cohort_of(12, 3)
    now = after(name, updates)
    found = merge_products.measure_errors(updates, now)
    assert found.keys() == {*LAYERS}
    for layer in LAYERS:
        whole = ideal(updates, layer)
        off = float((dense(now, layer) - whole).norm() / whole.norm())
        assert found[layer] == pytest.approx(off, rel=1e-6, abs=1e-7)


def test_the_error_where_the_ideal_is_zero_is_the_new_products_norm() -> None:
    zero = {LINEAR.a: torch.ones(1, 2), LINEAR.b: torch.zeros(2, 1)}
    updates = cohort(zero, [zero], [1])
    assert merge_products.measure_errors(updates, zero) == {"linear": 0}
    assert merge_products.measure_errors(
        updates, {LINEAR.a: zero[LINEAR.a], LINEAR.b: torch.ones(2, 1)}
    ) == {"linear": pytest.approx(2)}


def test_sizes_tell_a_layers_factors_and_its_rank_with_the_residual() -> None:
    # 2 e1 e1', and beside it 2 e2 e2': two equal directions
    adapter = {LINEAR.a: torch.tensor([[1.0, 0]]), LINEAR.b: torch.tensor([[2.0], [0]])}
    assert merge_products.measure_sizes(adapter) == {"linear": (pytest.approx(1), 1, 2)}
    adapter[LINEAR.residual.a] = torch.tensor([[0, 2.0]])
    adapter[LINEAR.residual.b] = torch.tensor([[0], [1.0]])
    assert merge_products.measure_sizes(adapter) == {"linear": (pytest.approx(2), 1, 2)}
