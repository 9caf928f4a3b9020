"""Slots that merge layers by their products B A: a product of means is not the mean of products.

Both factors of a layer are merged together. Other leaves, and factors whose partner is not sent,
are averaged as `merge.mean` does. A residual's change is to be added as it is: a server's optimiser
has no use for it. Arithmetic is float64. Costs are for one layer of m x n,
K clients and rank r; where they say R, it is O((m + n) R^2 + R^3).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fedgen_edge import leaves
from fedgen_edge.algorithms import low_rank
from fedgen_edge.algorithms.low_rank import FactorNames, Product, find_pairs, get_product
from fedgen_edge.algorithms.merge import weighted_average
from fedgen_edge.types import AVERAGE, RESIDUAL, Leaves, Update

NOISE = torch.finfo(torch.float32).eps
"""Singular values below this share of the clients' products are the rounding of float32 factors."""

Rule = Callable[[FactorNames, Leaves, Sequence[Product], Sequence[float]], Leaves]
"""One layer's change, from its names, the server's adapter, the clients' factors and shares."""


def flexlora(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The best product of the adapter's rank for the mean of the clients' products.

    Each singular value is split evenly between B and A, so that both see gradients of one size; the
    largest element of each column of B is positive.

    Where the mean has fewer ranks than the adapter, B and A would both be zero in the others, and
    so would both their gradients from then on. There the factor that is drawn at the start (A; of
    an embedding B) keeps what the clients received, as far as the ranks in use do not have it, and
    its partner is zero, as at the start of training. So the drawn factor never loses rank.

    A moving average's factors are turned towards those that it follows, as clients mix the two
    factor by factor; a turn of both leaves their product as it is.

    Cost: R = K r.

    Raises:
        ValueError: no client has a positive weight.

    Source: Bai et al. 2024, FlexLoRA (arXiv:2402.11505).
    Differs: singular values are split, not all in B; by QR of the factors, where theirs decomposes
    the dense product. A client of a lower rank receives the first columns, as there: the largest.
    """
    change = _merge_layers(adapter, updates, _truncate_mean)
    for pair in find_pairs(updates[0].delta):
        leading_pair = FactorNames(*(name.removeprefix(AVERAGE) for name in pair))
        if leading_pair != pair and {*leading_pair} <= change.keys():
            new_adapter = leaves.add(adapter, change)
            aligned = low_rank.align_factors(
                get_product(new_adapter, pair), get_product(new_adapter, leading_pair)
            )
            change |= _compute_change(pair, aligned, adapter)
    return change


def _truncate_mean(
    pair: FactorNames, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
) -> Leaves:
    start, mean_product = get_product(adapter, pair), low_rank.sum_products(clients, shares)
    largest = max(low_rank.norm(c) * w for c, w in zip(clients, shares, strict=True))
    truncated = low_rank.truncate_svd(mean_product, len(start.a), NOISE * largest)
    if pair.b.endswith("lora_embedding_B"):
        refilled = low_rank.refill_rank(low_rank.transpose(truncated), low_rank.transpose(start))
        return _compute_change(pair, low_rank.transpose(refilled), adapter)
    return _compute_change(pair, low_rank.refill_rank(truncated, start), adapter)


def lora_fair(ridge: float) -> Callable[[Leaves, Sequence[Update]], Leaves]:
    """The means of A and of B, and B corrected for what their product misses.

    The correction D has the least |ideal - (B + D) A|^2 + ridge |D|^2 in Frobenius norms, where
    the ideal is the mean of the clients' products. It is E A^T (A A^T + ridge I)^-1, where
    E = sum of p_k (B_k - B) (A_k - A) is what is missed: r equations are solved, for m rows.

    Cost: O(K (m + n) r^2).

    Args:
        ridge: above 0, in the units of A A^T, so without alpha / rank.

    Raises:
        ValueError: no client has a positive weight; or the ridge is not above 0.

    Source: Bian et al. 2024, LoRA-FAIR (arXiv:2411.14961).
    Differs: the closed solution for the Frobenius norm, where theirs iterates on a measure of
    similarity.
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be above 0")

    def rule(
        pair: FactorNames, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
    ) -> Leaves:
        mean_factors = _average_factors(clients, shares)
        covariance = _compute_covariance(clients, mean_factors, shares)
        gram = mean_factors.a @ mean_factors.a.mT + ridge * torch.eye(
            len(mean_factors.a), dtype=torch.float64
        )
        right_side = covariance.b @ (covariance.a @ mean_factors.a.mT)
        correction = torch.linalg.solve(gram, right_side, left=False)
        return _compute_change(pair, Product(mean_factors.b + correction, mean_factors.a), adapter)

    return lambda adapter, updates: _merge_layers(adapter, updates, rule)


def fedex_lora(cap: int) -> Callable[[Leaves, Sequence[Update]], Leaves]:
    """The means of A and of B, and what their product misses in a frozen pair beside them.

    That is the sum of p_k (B_k - B) (A_k - A), of rank (K - 1) r at most. It joins the residual of
    the rounds before, and the sum is cut to the closest product of rank `cap`. So a layer is exact
    while `cap` is at least the smaller of its sides, or (K - 1) r times the rounds.

    Cost: R = K r + cap. Clients receive a pair of rank `cap` more, and send no more.

    Args:
        cap: rank of the residual, whose leaves the adapter has: see `residuals`.

    Raises:
        ValueError: no client has a positive weight; or the residual has another rank.
        KeyError: the adapter has no residual.

    Source: Singhal et al. 2024, FedEx-LoRA (arXiv:2410.09432).
    Differs: theirs goes into the backbone, whole or cut in each round; here the backbone stays as
    it is, and the residual of all rounds is cut as one. `adapter.dropout` reaches it too.
    """

    def rule(
        pair: FactorNames, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
    ) -> Leaves:
        mean_factors = _average_factors(clients, shares)
        residual_terms = [
            get_product(adapter, pair.residual),
            _compute_covariance(clients, mean_factors, shares),
        ]
        return {
            **_compute_change(pair, mean_factors, adapter),
            **_truncate_residual(
                pair.residual, low_rank.sum_products(residual_terms), cap, adapter
            ),
        }

    return lambda adapter, updates: _merge_with_residuals(adapter, updates, rule)


def flora(cap: int) -> Callable[[Leaves, Sequence[Update]], Leaves]:
    """The mean of products joins a frozen pair, and the trained pair stays as it was.

    The frozen one is cut to the closest product of rank `cap`: exact while `cap` is at least the
    smaller of a layer's sides, or K r times the rounds. A trained pair begins with a product of
    zero; should it have another, that is taken off what joins.

    Cost: R = (K + 1) r + cap. Clients receive a pair of rank `cap` more, and send no more.

    Args:
        cap: rank of the residual, whose leaves the adapter has: see `residuals`.

    Raises:
        ValueError: no client has a positive weight; or the residual has another rank.
        KeyError: the adapter has no residual.

    Source: Wang et al. 2024, FLoRA (arXiv:2409.05976).
    Differs: A is not drawn anew in each round; the clients' factors side by side are neither sent
    nor added to the backbone, but cut to a pair of bounded rank.
    """

    def rule(
        pair: FactorNames, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
    ) -> Leaves:
        start = get_product(adapter, pair)
        terms = [get_product(adapter, pair.residual), *clients, start]
        stacked_product = low_rank.sum_products(terms, [1.0, *shares, -1.0])
        return {
            **_compute_change(pair, start, adapter),
            **_truncate_residual(pair.residual, stacked_product, cap, adapter),
        }

    return lambda adapter, updates: _merge_with_residuals(adapter, updates, rule)


def make_residuals(adapter: Leaves, cap: int) -> Leaves:
    """An adapter's residual pairs before the first round: zero.

    Args:
        adapter: its trained leaves.
        cap: their rank, or the smaller side of a layer where that is less.
    """
    frozen: Leaves = {}
    for pair in find_pairs(adapter):
        a, b = adapter[pair.a], adapter[pair.b]
        rank = _cap_rank(get_product(adapter, pair), cap)
        frozen[pair.residual.a] = a.new_zeros(rank, *a.shape[1:])
        frozen[pair.residual.b] = b.new_zeros(len(b), rank, *b.shape[2:])
    return frozen


def _merge_layers(adapter: Leaves, updates: Sequence[Update], rule: Rule) -> Leaves:
    """The plain mean, with the rule's own change of each pair."""
    change, shares = weighted_average(adapter, updates), _compute_shares(updates)
    for pair in find_pairs(updates[0].delta):
        change |= rule(pair, adapter, _get_client_products(updates, pair), shares)
    return change


def _merge_with_residuals(adapter: Leaves, updates: Sequence[Update], rule: Rule) -> Leaves:
    """The same, and the frozen pair of a moving average is that of what it follows: no lag."""
    change = _merge_layers(adapter, updates, rule)
    for pair in find_pairs(updates[0].delta):
        if pair.a.startswith(AVERAGE):
            leading_names = (RESIDUAL + name.removeprefix(AVERAGE) for name in pair)
            change |= zip(pair.residual, map(change.__getitem__, leading_names), strict=True)
    return change


def _compute_shares(updates: Sequence[Update]) -> list[float]:
    total = sum(u.weight for u in updates)
    if total <= 0:
        raise ValueError("a mean needs at least one member with a positive weight")
    return [u.weight / total for u in updates]


def _get_client_products(updates: Sequence[Update], pair: FactorNames) -> list[Product]:
    """Each client's own factors: what it received, and its change."""
    starts = [get_product(u.order.received, pair) for u in updates]
    changes = [get_product(u.delta, pair) for u in updates]
    return [Product(s.b + m.b, s.a + m.a) for s, m in zip(starts, changes, strict=True)]


def _average_factors(clients: Sequence[Product], shares: Sequence[float]) -> Product:
    """Each factor's own mean."""
    members = [c._asdict() for c in clients]
    return Product(**leaves.mean(members, torch.tensor(shares, dtype=torch.float64)))


def _compute_covariance(
    clients: Sequence[Product], mean_factors: Product, shares: Sequence[float]
) -> Product:
    """The mean of products less the product of means: the covariance of B and A over clients."""
    return low_rank.sum_products(
        [Product(c.b - mean_factors.b, c.a - mean_factors.a) for c in clients], shares
    )


def _cap_rank(matrix: Product, cap: int) -> int:
    """Of a residual: no product has more than its smaller side."""
    return min(cap, len(matrix.b), matrix.a.shape[1])


def _truncate_residual(pair: FactorNames, matrix: Product, cap: int, adapter: Leaves) -> Leaves:
    """The change of a residual to the closest product of its rank."""
    rank = _cap_rank(matrix, cap)
    if len(adapter[pair.a]) != rank:
        raise ValueError(f"{pair.a} has rank {len(adapter[pair.a])}, and not {rank}")
    return _compute_change(
        pair, low_rank.pad_rank(low_rank.truncate_svd(matrix, rank), rank), adapter
    )


def _compute_change(pair: FactorNames, target: Product, adapter: Leaves) -> Leaves:
    """What makes the adapter's factors these, in their own shapes."""
    targets = {pair.a: target.a, pair.b: target.b}
    current = {name: adapter[name] for name in targets}
    return {k: (targets[k].reshape(v.shape) - v.double()).float() for k, v in current.items()}


class LayerSize(NamedTuple):
    """How large one layer's product and factors are."""

    rank: float
    """Effective rank of the product with its residual."""
    a: float
    b: float
    """Frobenius norms of A and B, without the residual's."""


def measure_sizes(adapter: Leaves) -> dict[str, LayerSize]:
    """Every layer's, by its name. Cost: R = r + cap."""
    by_layer = {}
    for pair in find_pairs(k for k in adapter if not k.startswith(RESIDUAL)):
        a, b = (float(torch.linalg.vector_norm(adapter[k].double())) for k in pair)
        by_layer[pair.layer] = LayerSize(
            low_rank.effective_rank(_get_effective_product(adapter, pair)), a, b
        )
    return by_layer


def measure_errors(updates: Sequence[Update], after: Leaves) -> dict[str, float]:
    """How far each layer's new product is from the ideal one, as a share of it, by any rule.

    Ideal is the weighted mean of what the clients computed with: their product, and the residual
    that they received. New is the server's adapter after the round, in float32, so 1e-7 is none.
    Norms are Frobenius; where the ideal is zero it is the new one's norm.

    Cost: R = (K + 1) r and both residuals' ranks.

    Raises:
        ValueError: no client has a positive weight.
    """
    shares, by_layer = _compute_shares(updates), {}
    for pair in find_pairs(updates[0].delta):
        client_mean = low_rank.sum_products(_get_client_products(updates, pair), shares)
        ideal = low_rank.compact_columns(
            low_rank.sum_products([client_mean, _average_residuals(updates, pair, shares)])
        )
        distance = low_rank.norm(
            low_rank.sum_products([_get_effective_product(after, pair), ideal], [1.0, -1.0])
        )
        ideal_norm = low_rank.norm(ideal)
        by_layer[pair.layer] = distance / (ideal_norm or 1.0)
    return by_layer


def _average_residuals(
    updates: Sequence[Update], pair: FactorNames, shares: Sequence[float]
) -> Product:
    """The mean of the residuals that the clients received; most often it is one for all."""
    received = {id(u.order.received): u.order.received for u in updates}
    share_by_id = dict.fromkeys(received, 0.0)
    for update, share in zip(updates, shares, strict=True):
        share_by_id[id(update.order.received)] += share
    frozen = [low_rank.get_residual(one, pair) for one in received.values()]
    return low_rank.sum_products(frozen, list(share_by_id.values()))


def _get_effective_product(adapter: Leaves, pair: FactorNames) -> Product:
    """A pair's product, with what stands between its factors, and its residual."""
    trained = get_product(adapter, pair)
    if pair.core in adapter:
        trained = trained._replace(b=trained.b @ adapter[pair.core].double())
    return low_rank.sum_products([trained, low_rank.get_residual(adapter, pair)])
