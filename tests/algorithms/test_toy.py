"""How much each way to merge misses of ten clients' mean product, in one set-up.

A layer of 256 x 256, rank 8, ten clients of Dirichlet(1) weights. B is what all clients learnt and
what each has learnt on its own, of one size. A is one draw, which each client has moved by a tenth
of its size; or, by mistake, a draw of the client's own.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedgen_edge import leaves
from fedgen_edge.adapters.peft_io import change_rank
from fedgen_edge.algorithms import low_rank, merge, merge_products
from fedgen_edge.algorithms.low_rank import Product
from fedgen_edge.config import Adapter
from fedgen_edge.leaves import add
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves, Update
from support.cohorts import LINEAR, Rule, cohort

SIDE, RANK, CLIENTS = 256, 8, 10
DRIFT = 0.1
seeds = pytest.mark.parametrize("seed", range(4))


def clients(seed: int, *, shared: bool = True, cap: int = 72) -> list[Update]:
    rng = generator("toy", seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    weights = torch.empty(CLIENTS).exponential_(generator=rng)  # divided by their sum: Dirichlet(1)
    common, first = drawn(SIDE, RANK), drawn(RANK, SIDE)
    own = [
        {
            LINEAR.b: common + drawn(SIDE, RANK),
            LINEAR.a: (first if shared else drawn(RANK, SIDE)) + DRIFT * drawn(RANK, SIDE),
        }
        for _ in range(CLIENTS)
    ]
    start = {LINEAR.a: first, LINEAR.b: torch.zeros(SIDE, RANK)}
    return cohort({**start, **merge_products.make_residuals(start, cap)}, own, weights.tolist())


def after(rule: Rule, updates: Sequence[Update]) -> Leaves:
    start = updates[0].order.received
    return add(start, rule(start, updates))


def missed(rule: Rule, updates: Sequence[Update]) -> float:
    """Of the mean product's size."""
    return merge_products.measure_errors(updates, after(rule, updates))["linear"]


@seeds
def test_means_of_factors_miss_few_percent_where_a_is_shared_and_most_where_it_is_not(
    seed: int,
) -> None:
    # Missed is the sum of (p_k [k = l] - p_k p_l) b_k a_l over all k and l, of a client's own b and
    # a. Independent and of size 1, it has the squared size s - 2 c + s^2, with sums s of p^2 and c
    # of p^3. Shared, a is a tenth, and the mean product (B + mean b) A has squared size 1 + s; else
    # a is all of A, and the mean of (B + b_k) A_k has 2 s.
    for shared, least, most in ((True, 0.02, 0.05), (False, 0.5, 0.75)):
        updates = clients(seed, shared=shared)
        p = torch.tensor([u.weight for u in updates])
        s, c = (float((p / p.sum()).pow(power).sum()) for power in (2, 3))
        ideal = (1 + s) / DRIFT**2 if shared else 2 * s
        found = missed(merge.weighted_average, updates)
        assert found == pytest.approx(((s - 2 * c + s**2) / ideal) ** 0.5, rel=0.05)
        assert least < found < most


@seeds
def test_the_best_adapter_of_the_rank_misses_little_less_than_the_means_do(seed: int) -> None:
    # so exactness buys little where A is shared
    updates = clients(seed)
    least, naive = missed(merge_products.flexlora, updates), missed(merge.weighted_average, updates)
    assert 0.7 * naive < least < naive
    assert naive > missed(merge_products.lora_fair(0.01), updates) > least


def dense(ends: Sequence[Product], shares: Sequence[float]) -> Tensor:
    """The sum of products, added up as matrices."""
    return torch.stack([p.b @ p.a * w for p, w in zip(ends, shares, strict=True)]).sum(0)


@seeds
def test_what_means_miss_is_the_drifts_covariance_and_of_rank_72(seed: int) -> None:
    # ten drifts whose weighted sum is zero have nine times 8 directions
    updates = clients(seed)
    total = sum(u.weight for u in updates)
    ends = [low_rank.get_product(add(u.order.received, u.delta), LINEAR) for u in updates]
    shares = [u.weight / total for u in updates]
    weights = torch.tensor(shares, dtype=torch.float64)
    middle = Product(**leaves.mean([p._asdict() for p in ends], weights))
    drifts = [Product(p.b - middle.b, p.a - middle.a) for p in ends]
    gap, covariance = (
        dense(ps, w) for ps, w in (([*ends, middle], [*shares, -1]), (drifts, shares))
    )
    torch.testing.assert_close(gap, covariance, rtol=0, atol=1e-13)
    values = torch.linalg.svdvals(gap)
    assert int((values > 1e-10 * values[0]).sum()) == 72
    # a frozen pair of that rank holds all of it, and one of 71 lacks the last direction
    assert missed(merge_products.fedex_lora(72), clients(seed, cap=72)) < 5e-7
    assert missed(merge_products.fedex_lora(71), clients(seed, cap=71)) > 1e-6


@seeds
def test_factors_give_the_dense_svd_to_the_last_digits(seed: int) -> None:
    updates = clients(seed)
    ends = [low_rank.get_product(add(u.order.received, u.delta), LINEAR) for u in updates]
    whole = low_rank.sum_products(ends, [u.weight for u in updates])
    dense = whole.b @ whole.a
    u, s, v = torch.linalg.svd(dense)
    best, found = u[:, :RANK] * s[:RANK] @ v[:RANK], low_rank.truncate_svd(whole, RANK)
    assert float((found.b @ found.a - best).norm() / dense.norm()) < 1e-14


def test_one_alpha_for_unequal_ranks_misses_62_percent_and_one_scale_nothing() -> None:
    # alpha = 16 for all makes scales 4, 2 and 1, and products have sizes of the roots of ranks:
    # sqrt((3^2 * 4 + 1^2 * 8 + 0 * 16) / (4^2 * 4 + 2^2 * 8 + 1^2 * 16)) = sqrt(44 / 112) = 0.627
    rng, whole = generator("scales"), Adapter(rank=16, ranks=(4, 8, 16), alpha=16.0)
    ends = [
        Product(*(torch.randn(*shape, generator=rng).double() for shape in ((256, r), (r, 256))))
        for r in whole.ranks
    ]
    ours = [change_rank(whole, r).alpha / r for r in whole.ranks]
    for scales, expected in (([4.0, 2.0, 1.0], 0.627), (ours, 0.0)):
        ideal = low_rank.sum_products(ends, scales)
        gap = low_rank.sum_products([ideal, low_rank.sum_products(ends)], [1.0, -1.0])
        assert low_rank.norm(gap) / low_rank.norm(ideal) == pytest.approx(expected, abs=0.01)
