"""Slots that merge layers by their products B A: a product of means is not the mean of products.

Both factors of a layer are merged together. Other leaves, and factors whose partner is not sent,
are averaged by `merge.weighted_average`. A residual's change must be added as it is, without a
server optimizer. Arithmetic is float64. Costs are for one layer of m x n, K clients and rank r;
a cost given as R means O((m + n) R^2 + R^3).
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
"""Singular values below this fraction of the clients' products are float32 rounding errors."""

Rule = Callable[[FactorNames, Leaves, Sequence[Product], Sequence[float]], Leaves]
"""One layer's change, given its names, the server's adapter, the clients' factors, and shares."""


def flexlora(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The product of the adapter's rank that is closest to the mean of the clients' products.

    Each singular value is split evenly between B and A, so that their gradients have similar sizes;
    the largest element of each column of B is positive.

    Where the mean has a lower rank than the adapter, B and A would both be zero in the unused
    ranks, and their gradients would stay zero. There, the randomly initialized factor (A; for an
    embedding, B) keeps what the clients received, orthogonal to the ranks in use, and its partner
    is zero, as at initialization. So the random factor never loses rank.

    A moving average's factors are rotated toward those that it follows, because clients mix the two
    factor by factor; rotating both factors does not change their product.

    Cost: R = K r.

    Raises:
        ValueError: no client has a positive weight.

    Source: Bai et al. 2024, FlexLoRA (arXiv:2402.11505).
    Differs: singular values are split rather than put into B, and QR of the factors replaces an SVD
    of the dense product. As in the paper, a client of a lower rank gets the largest ones.
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
    """The means of A and of B, with B corrected for the error of their product.

    The correction D minimizes |ideal - (B + D) A|^2 + ridge |D|^2 in Frobenius norms, where the
    ideal is the mean of the clients' products. It is E A^T (A A^T + ridge I)^-1, where
    E = sum of p_k (B_k - B) (A_k - A) is the error: r equations are solved for m rows.

    Cost: O(K (m + n) r^2).

    Args:
        ridge: above 0, in the units of A A^T, so without alpha / rank.

    Raises:
        ValueError: no client has a positive weight, or the ridge is not above 0.

    Source: Bian et al. 2024, LoRA-FAIR (arXiv:2411.14961).
    Differs: a closed-form solution for the Frobenius norm; theirs optimizes a similarity measure
    iteratively.
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
    """The means of A and of B, with the error of their product in a frozen residual pair.

    The error is the sum of p_k (B_k - B) (A_k - A), of rank (K - 1) r at most. It is added to the
    residual of earlier rounds, and the sum is truncated to the closest product of rank `cap`. So a
    layer is exact while `cap` is at least its smaller side, or (K - 1) r times the rounds.

    Cost: R = K r + cap. Clients also receive a pair of rank `cap`, and send nothing extra.

    Args:
        cap: rank of the residual, which is part of the adapter: see `make_residuals`.

    Raises:
        ValueError: no client has a positive weight, or the residual has another rank.
        KeyError: the adapter has no residual.

    Source: Singhal et al. 2024, FedEx-LoRA (arXiv:2410.09432).
    Differs: theirs is added to the backbone, complete or truncated in each round; here the backbone
    is unchanged, and the residual of all rounds is truncated once. `adapter.dropout` applies to it.
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
    """The mean of products is added to a frozen pair, and the trained pair is reset to its start.

    The frozen pair is truncated to the closest product of rank `cap`: exact while `cap` is at least
    a layer's smaller side, or K r times the rounds. A trained pair starts with a product of zero;
    any other starting product is subtracted from what is added.

    Cost: R = (K + 1) r + cap. Clients also receive a pair of rank `cap`, and send nothing extra.

    Args:
        cap: rank of the residual, which is part of the adapter: see `make_residuals`.

    Raises:
        ValueError: no client has a positive weight, or the residual has another rank.
        KeyError: the adapter has no residual.

    Source: Wang et al. 2024, FLoRA (arXiv:2409.05976).
    Differs: A is not redrawn in each round; the clients' stacked factors are neither sent nor added
    to the backbone, but truncated to a pair of bounded rank.
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
    """An adapter's residual pairs before the first round, all zero.

    Args:
        adapter: its trained leaves.
        cap: the residuals' rank, which a layer's smaller side limits.
    """
    frozen: Leaves = {}
    for pair in find_pairs(adapter):
        a, b = adapter[pair.a], adapter[pair.b]
        rank = _cap_rank(get_product(adapter, pair), cap)
        frozen[pair.residual.a] = a.new_zeros(rank, *a.shape[1:])
        frozen[pair.residual.b] = b.new_zeros(len(b), rank, *b.shape[2:])
    return frozen


def _merge_layers(adapter: Leaves, updates: Sequence[Update], rule: Rule) -> Leaves:
    """The weighted average, with the rule's change of each pair."""
    change, shares = weighted_average(adapter, updates), _compute_shares(updates)
    for pair in find_pairs(updates[0].delta):
        change |= rule(pair, adapter, _get_client_products(updates, pair), shares)
    return change


def _merge_with_residuals(adapter: Leaves, updates: Sequence[Update], rule: Rule) -> Leaves:
    """`_merge_layers`, where a moving average shares the residual of the leaf that it follows."""
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
    """Each client's factors: the received ones plus its change."""
    starts = [get_product(u.order.received, pair) for u in updates]
    changes = [get_product(u.delta, pair) for u in updates]
    return [Product(s.b + m.b, s.a + m.a) for s, m in zip(starts, changes, strict=True)]


def _average_factors(clients: Sequence[Product], shares: Sequence[float]) -> Product:
    """The mean of each factor separately."""
    members = [c._asdict() for c in clients]
    return Product(**leaves.mean(members, torch.tensor(shares, dtype=torch.float64)))


def _compute_covariance(
    clients: Sequence[Product], mean_factors: Product, shares: Sequence[float]
) -> Product:
    """The mean of products minus the product of means: the covariance of B and A over clients."""
    return low_rank.sum_products(
        [Product(c.b - mean_factors.b, c.a - mean_factors.a) for c in clients], shares
    )


def _cap_rank(matrix: Product, cap: int) -> int:
    """The rank of a residual, at most the smaller side of its product."""
    return min(cap, len(matrix.b), matrix.a.shape[1])


def _truncate_residual(pair: FactorNames, matrix: Product, cap: int, adapter: Leaves) -> Leaves:
    """The change that makes a residual the closest product of its rank."""
    rank = _cap_rank(matrix, cap)
    if len(adapter[pair.a]) != rank:
        raise ValueError(f"{pair.a} has rank {len(adapter[pair.a])}, and not {rank}")
    return _compute_change(
        pair, low_rank.pad_rank(low_rank.truncate_svd(matrix, rank), rank), adapter
    )


def _compute_change(pair: FactorNames, target: Product, adapter: Leaves) -> Leaves:
    """The change that turns the adapter's factors into the target, in their own shapes."""
    targets = {pair.a: target.a, pair.b: target.b}
    current = {name: adapter[name] for name in targets}
    return {k: (targets[k].reshape(v.shape) - v.double()).float() for k, v in current.items()}


class LayerSize(NamedTuple):
    """Effective rank and norms of one layer."""

    rank: float
    """Effective rank of the product with its residual."""
    a: float
    b: float
    """Frobenius norms of A and B, without the residual."""


def measure_sizes(adapter: Leaves) -> dict[str, LayerSize]:
    """The size of every layer, by name. Cost: R = r + cap."""
    by_layer = {}
    for pair in find_pairs(k for k in adapter if not k.startswith(RESIDUAL)):
        a, b = (float(torch.linalg.vector_norm(adapter[k].double())) for k in pair)
        by_layer[pair.layer] = LayerSize(
            low_rank.effective_rank(_get_effective_product(adapter, pair)), a, b
        )
    return by_layer


def measure_errors(updates: Sequence[Update], after: Leaves) -> dict[str, float]:
    """Relative error of each layer's new product against the ideal one, for any merge rule.

    The ideal is the weighted mean of what the clients computed with: their product plus the
    received residual. The new product is the server's after the round, in float32, so 1e-7 means
    no error. Norms are Frobenius; if the ideal is zero, the error is the new product's norm.

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
    """The mean of the residuals that the clients received; usually all received the same one."""
    received = {id(u.order.received): u.order.received for u in updates}
    share_by_id = dict.fromkeys(received, 0.0)
    for update, share in zip(updates, shares, strict=True):
        share_by_id[id(update.order.received)] += share
    frozen = [low_rank.get_residual(one, pair) for one in received.values()]
    return low_rank.sum_products(frozen, list(share_by_id.values()))


def _get_effective_product(adapter: Leaves, pair: FactorNames) -> Product:
    """A pair's product, including its core and its residual."""
    trained = get_product(adapter, pair)
    if pair.core in adapter:
        trained = trained._replace(b=trained.b @ adapter[pair.core].double())
    return low_rank.sum_products([trained, low_rank.get_residual(adapter, pair)])
