"""Merging adapters of unequal ranks: by hand, dense, and what becomes of a term."""

from collections.abc import Sequence
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgen_edge.adapters.ranks import mask_rank
from fedgen_edge.algorithms import merge, merge_mixed_ranks, merge_products
from fedgen_edge.algorithms.methods import METHODS, make_algorithm
from fedgen_edge.config import Adapter, Method
from fedgen_edge.errors import ConfigError
from fedgen_edge.leaves import add, subtract
from fedgen_edge.seeds import generator
from fedgen_edge.types import AVERAGE, Leaves, Order, Update
from support.cohorts import LINEAR, Rule, averaged, close, dense, names

RULES: dict[str, Rule] = {
    "by_norm": merge_mixed_ranks.hetlora,
    "over_holders": merge_mixed_ranks.rbla,
    "raflora": merge_mixed_ranks.raflora,
    "flexlora": merge_products.flexlora,
}
SHAPES = {
    "linear": ((8, 12), (10, 8)),
    "convolution": ((8, 3, 2, 2), (10, 8, 1, 1)),
    "embedding": ((8, 12), (10, 8)),
}
every_rule = pytest.mark.parametrize("name", RULES)
every_layer = pytest.mark.parametrize("layer", SHAPES)
patient = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 999)


def drawn(seed: object) -> Leaves:
    """Random factors of rank 8."""
    rng, found = generator("unequal", str(seed)), {}
    for layer, shapes in SHAPES.items():
        for name, shape in zip(names(layer), shapes, strict=True):
            found[name] = torch.randn(shape, generator=rng)
    return found


def update(server: Leaves, end: Leaves, rank: int | None, weight: float) -> Update:
    """What comes back of a client of a rank that ended with these factors."""
    received = mask_rank(server, rank)
    order = Order((0,), 0, received, rank=rank)
    return Update(order, subtract(mask_rank(end, rank), received), {}, weight, 0.0, 1, 0)


def cohort(
    seed: object, ranks: Sequence[int] = (2, 8, 4), weights: Sequence[float] = (1.0, 5.0, 2.0)
) -> list[Update]:
    server = drawn(seed)
    told = enumerate(zip(ranks, weights, strict=True))
    return [update(server, drawn(f"{seed} {i}"), rank, weight) for i, (rank, weight) in told]


def after(rule: Rule, server: Leaves, updates: Sequence[Update]) -> Leaves:
    return add(server, rule(server, updates))


def ends(updates: Sequence[Update]) -> list[Leaves]:
    return [add(u.order.received, u.delta) for u in updates]


# --- by hand


def pair(b: list[list[float]], a: list[list[float]]) -> Leaves:
    return {LINEAR.a: torch.tensor(a), LINEAR.b: torch.tensor(b)}


ZERO = pair([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
ONE = pair([[2.0, 9.0], [0.0, 9.0]], [[1.0, 0.0], [9.0, 9.0]])
"""Of rank 1: 2 e1 e1', of size 2; the nines are beyond it."""
TWO = pair([[1.0, 0.0], [0.0, 1.0]], [[3.6, 0.0], [0.0, 4.8]])
"""diag(3.6, 4.8), of size 6."""
BOTH = [update(ZERO, ONE, 1, 3.0), update(ZERO, TWO, 2, 1.0)]


def test_sizes_weigh_and_what_a_client_lacks_counts_for_zero() -> None:
    # sizes 2 and 6, so 1/4 and 3/4: A is diag(1/4 + 3/4 * 3.6, 3/4 * 4.8), B diag(2/4 + 3/4, 3/4)
    found = after(merge_mixed_ranks.hetlora, ZERO, BOTH)
    torch.testing.assert_close(found[LINEAR.a], torch.tensor([[2.95, 0], [0, 3.6]]))
    torch.testing.assert_close(found[LINEAR.b], torch.tensor([[1.25, 0], [0, 0.75]]))


def test_a_term_is_averaged_over_its_holders() -> None:
    # weights 3 and 1: A is diag((3 * 1 + 3.6) / 4, 4.8), B diag((3 * 2 + 1) / 4, 1)
    found = after(merge_mixed_ranks.rbla, ZERO, BOTH)
    torch.testing.assert_close(found[LINEAR.a], torch.tensor([[1.65, 0], [0, 4.8]]))
    torch.testing.assert_close(found[LINEAR.b], torch.tensor([[1.75, 0], [0, 1.0]]))


def test_products_of_a_partition_are_averaged_over_its_holders() -> None:
    # diag(3/4 * 2 + 1/4 * 3.6, 4.8), the larger first; a plain mean has 1/4 of 4.8
    for rule, second in ((merge_mixed_ranks.raflora, 4.8), (merge_products.flexlora, 1.2)):
        found = after(rule, ZERO, BOTH)
        ordered = sorted((2.4, second), reverse=True)
        torch.testing.assert_close(
            dense(found, "linear"), torch.diag(torch.tensor([2.4, second])).double()
        )
        sizes = found[LINEAR.b].norm(dim=0)
        torch.testing.assert_close(sizes, torch.tensor([sqrt(v) for v in ordered]))


# --- ranks 2, 4 and 8 together, against dense matrices


def total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([*parts]).sum(0)


@every_layer
def test_zero_padding_is_the_dense_one(layer: str) -> None:
    updates, (a, b) = cohort(1), names(layer)
    own = ends(updates)
    sizes = [float(dense(end, layer).norm()) for end in own]
    found = after(merge_mixed_ranks.hetlora, drawn(1), updates)
    for name in (a, b):
        expected = total([e[name] * s / sum(sizes) for e, s in zip(own, sizes, strict=True)])
        torch.testing.assert_close(found[name], expected)


@every_layer
def test_means_over_holders_are_means_row_by_row(layer: str) -> None:
    updates, (a, b) = cohort(2), names(layer)
    found = after(merge_mixed_ranks.rbla, drawn(2), updates)
    for term in range(8):
        held = [(u.weight, e) for u, e in zip(updates, ends(updates), strict=True)
                if (u.order.rank or 8) > term]  # fmt: skip
        assert len(held) == (3 if term < 2 else 2 if term < 4 else 1)
        whole = sum(w for w, _ in held)
        for name, at in ((a, 0), (b, 1)):
            expected = total([e[name].select(at, term) * w / whole for w, e in held])
            torch.testing.assert_close(found[name].select(at, term), expected)


def best(whole: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(whole.flatten(1), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).reshape(whole.shape)


def partition(end: Leaves, first: int, last: int) -> Leaves:
    return subtract(mask_rank(end, last), mask_rank(end, first)) if first else mask_rank(end, last)


@every_layer
@pytest.mark.parametrize("name", ["raflora", "flexlora"])
def test_products_are_the_dense_svds_and_a_lower_rank_has_its_leading_directions(
    name: str, layer: str
) -> None:
    # e.g. of terms 3 and 4 the clients of weights 5 and 2 have 5/7 and 2/7; plainly 5/8 and 2/8
    updates, parts = cohort(3), []
    shares = {
        (0, 2): (1 / 8, 5 / 8, 2 / 8),
        (2, 4): (0.0, 5 / 7, 2 / 7) if name == "raflora" else (0.0, 5 / 8, 2 / 8),
        (4, 8): (0.0, 1.0, 0.0) if name == "raflora" else (0.0, 5 / 8, 0.0),
    }
    for (first, last), own in shares.items():
        parts += [
            dense(partition(end, first, last), layer) * share
            for end, share in zip(ends(updates), own, strict=True)
        ]
    now = after(RULES[name], drawn(3), updates)
    for rank in (8, 4, 2):
        assert close(dense(mask_rank(now, rank), layer), best(total(parts), rank), 1e-5)


# --- one client


@patient
@given(seed=seeds, rank=st.sampled_from([1, 2, 5, 8, None]))
@every_rule
def test_one_client_is_the_identity_and_what_nobody_holds_stays(
    name: str, seed: int, rank: int | None
) -> None:
    server = drawn(seed)
    (own,) = [update(server, drawn(f"{seed} own"), rank, 3.0)]
    now, end = after(RULES[name], server, [own]), add(own.order.received, own.delta)
    kept = subtract(server, mask_rank(server, rank))
    for layer in SHAPES:
        expected = dense(end, layer)
        if name != "flexlora":  # FlexLoRA's mean is of the clients' products alone
            expected = expected + dense(kept, layer)
        assert close(dense(now, layer), best(expected, 8), 1e-5)
        if name in {"by_norm", "over_holders"}:
            assert all(close(now[k], add(end, kept)[k]) for k in names(layer))


@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        (merge_mixed_ranks.rbla, merge.weighted_average),
        (merge_mixed_ranks.raflora, merge_products.flexlora),
    ],
)
@pytest.mark.parametrize("rank", [8, None])
def test_of_one_rank_a_rule_is_the_plain_one_bit_by_bit(
    rule: Rule, plain: Rule, rank: int | None
) -> None:
    server = drawn(4)
    updates = [update(server, drawn(f"4 {i}"), rank, 1.0 + i) for i in range(3)]
    found, expected = rule(server, updates), plain(server, updates)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_of_one_rank_and_size_sizes_weigh_as_equal_examples_do() -> None:
    server, turn = drawn(5), {k: -1.0 if "_A" in k else 1.0 for k in drawn(5)}
    flipped = {k: v * turn[k] for k, v in drawn("5 0").items()}
    updates = [update(server, end, 8, 1.0) for end in (drawn("5 0"), flipped)]
    for layer in SHAPES:
        assert close(dense(flipped, layer), -dense(drawn("5 0"), layer))
    found, expected = (
        merge_mixed_ranks.hetlora(server, updates),
        merge.weighted_average(server, updates),
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_where_no_product_has_a_size_examples_weigh() -> None:
    start = {k: v * ("_A" in k) for k, v in drawn(6).items()}
    end = {k: v * ("_A" in k) for k, v in drawn("6 end").items()}
    lone = {k: v for k, v in start.items() if k in names("linear")}
    rest = [{k: v for k, v in e.items() if k in lone} for e in (end, start)]
    updates = [update(lone, e, 8, w) for e, w in zip(rest, (3.0, 1.0), strict=True)]
    found, expected = (
        merge_mixed_ranks.hetlora(lone, updates),
        merge.weighted_average(lone, updates),
    )
    assert all(close(found[k], v) for k, v in expected.items() if v.any())


def test_a_moving_average_is_weighed_as_what_it_follows() -> None:
    one, two = (averaged(ONE, TWO), averaged(TWO, ONE))
    server = averaged(ZERO, ZERO)
    updates = [update(server, one, 2, 1.0), update(server, two, 2, 1.0)]
    sizes = [float(dense(e, "linear").norm()) for e in (ONE, TWO)]
    found = after(merge_mixed_ranks.hetlora, server, updates)
    for name in LINEAR:
        expected = total([TWO[name] * sizes[0], ONE[name] * sizes[1]]) / sum(sizes)
        torch.testing.assert_close(found[AVERAGE + name], expected)


# --- what becomes of the last terms


def energies(rule: Rule, rounds: int = 4) -> list[float]:
    """Size of the product's terms beyond rank 2, with four clients that do not move, one of 8."""
    server, found = drawn(7), []
    for _ in range(rounds):
        found.append(
            float((dense(server, "linear") - dense(mask_rank(server, 2), "linear")).norm())
        )
        updates = [update(server, server, rank, 1.0) for rank in (2, 2, 2, 8)]
        server = after(rule, server, updates)
    return found


def steady(one: float, other: float) -> bool:
    return abs(one / other - 1) < 1e-4


def test_padding_with_zeros_makes_the_last_terms_collapse_and_means_over_holders_do_not() -> None:
    for rule in (merge_mixed_ranks.rbla, merge_mixed_ranks.raflora):
        # the first round of `raflora` orders the terms by size; nothing moves after it
        kept = energies(rule)[1:]
        assert all(steady(one, kept[0]) for one in kept)
    # a plain mean of products keeps a quarter of them in each round
    plain = energies(merge_products.flexlora)
    assert plain[2] < 0.3 * plain[1]
    assert plain[3] < 0.3 * plain[2]
    # and of factors the square of the weight of the one that holds them, which grows to 1 slowly
    padded = energies(merge_mixed_ranks.hetlora)
    assert padded[1] < 0.25 * padded[0]
    assert padded[2] < 0.25 * padded[1]
    assert padded[3] < 0.25 * padded[2]


# --- what may be asked for


def test_a_method_that_merges_one_rank_is_refused_with_those_that_merge_any() -> None:
    able = ["flexlora", "hetlora", "rbla", "raflora", "local-only"]
    ranks = Adapter(rank=8, ranks=(2, 8))
    for name in METHODS:
        if name in able:
            assert make_algorithm(Method(name=name), adapter=ranks).ranks == (2, 8)
            continue
        with pytest.raises(ConfigError) as refused:
            make_algorithm(Method(name=name), adapter=ranks)
        said = str(refused.value)
        assert f"adapter.ranks=[2, 8] cannot go with method.name={name!r}" in said
        assert f"take one of {', '.join(able)}, " in said
        assert "\n" not in said
        # where all are the adapter's own, there is nothing to refuse
        assert make_algorithm(Method(name=name), adapter=Adapter(rank=8, ranks=(8, 8)))


def test_clients_take_the_ranks_in_turn() -> None:
    algorithm = make_algorithm(Method(name="rbla"), adapter=Adapter(rank=8, ranks=(2, 8, 4)))
    assert [algorithm.get_rank(c) for c in range(5)] == [2, 8, 4, 2, 8]
    assert make_algorithm(Method(name="rbla")).get_rank(3) is None
