"""Slots that merge adapters of unequal ranks: each client holds the first terms of every product.

A term is a row of A and its column of B. Terms that a client lacks are zero in its adapter, and all
clients share one scale, so alpha never appears here. Terms that no client in a cohort holds keep
the server's values. If all clients have one rank, each rule equals the plain rule that it names.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge import leaves
from fedgen_edge.adapters.ranks import get_rank_axis, mask_rank
from fedgen_edge.algorithms import low_rank
from fedgen_edge.algorithms.low_rank import FactorNames, find_pairs, get_product
from fedgen_edge.algorithms.merge import weighted_average
from fedgen_edge.algorithms.merge_products import flexlora
from fedgen_edge.types import AVERAGE, Leaves, Update


def hetlora(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean of each layer's factors, weighted by the norm of the client's product.

    A factor that lacks a term counts as zero in that term, with its client's full weight. So a term
    that a fraction s of the clients hold shrinks to s of its size, in A and in B, in each round.

    Norms are Frobenius norms, computed from the factors. If all are zero, and for leaves without a
    partner, the weights are training examples. With one rank it is the mean of factors weighted by
    those norms. A moving average gets the weights of the leaf that it follows.

    Cost: O(K (m + n) r^2) for a layer of m x n, K clients and rank r.

    Raises:
        ValueError: no client has a positive weight.

    Source: Cho et al. 2024, HetLoRA (arXiv:2401.06432).
    Differs: ranks stay fixed: its self-pruning, and the penalty on the last terms that leads to it,
    are omitted. Norms are per layer, and terms that no client holds keep their values: if both
    factors were zero, they could never be trained again.
    """
    change, max_rank = weighted_average(adapter, updates), _find_max_rank(updates)
    examples = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    client_adapters = [leaves.add(u.delta, u.order.received) for u in updates]
    for pair in find_pairs(change):
        leading_pair = FactorNames(*(name.removeprefix(AVERAGE) for name in pair))
        leading_pair = leading_pair if {*leading_pair} <= change.keys() else pair
        norms = [low_rank.norm(get_product(end, leading_pair)) for end in client_adapters]
        sizes = torch.tensor(norms, dtype=torch.float64)
        client_factors = [leaves.select(end, pair.__contains__) for end in client_adapters]
        mean_factors = leaves.mean(client_factors, sizes if sizes.any() else examples)
        change |= mask_rank({name: mean_factors[name] - adapter[name] for name in pair}, max_rank)
    return change


def rbla(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean change of each term over the clients that hold it, weighted by examples.

    So a client of low rank does not affect the terms that it lacks. With one rank it is
    `merge.weighted_average`.

    Raises:
        ValueError: no client has a positive weight.

    Source: Chen et al. 2024, RBLA (arXiv:2408.08699).
    """
    get_scales = _make_term_scaling(updates)
    return {
        k: _scale_terms(k, v, get_scales) for k, v in weighted_average(adapter, updates).items()
    }


def raflora(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The closest product to the sum of the terms' means, each over the clients that hold it.

    Terms between two neighboring ranks form a partition: its clients have the higher rank or
    above, and their weights are normalized to sum to one. With one rank it is
    `merge_products.flexlora`; it splits singular values, refills unused ranks, and costs as that.

    Raises:
        ValueError: no client has a positive weight.

    Source: Wu et al. 2026, raFLoRA (arXiv:2602.13486).
    Differs: uses QR of the factors. Terms that no client in a cohort holds enter the sum with the
    server's values.
    """
    unheld_terms = leaves.subtract(adapter, mask_rank(adapter, _find_max_rank(updates)))
    get_scales, b_names = (
        _make_term_scaling(updates),
        {pair.b for u in updates for pair in find_pairs(u.delta)},
    )

    def rescale_terms(unscaled: Leaves) -> Leaves:
        return {
            k: _scale_terms(k, v, get_scales) if k in b_names else v for k, v in unscaled.items()
        }

    rescaled_updates = [
        replace(
            u,
            order=replace(
                u.order, received=leaves.add(rescale_terms(u.order.received), unheld_terms)
            ),
            delta=rescale_terms(u.delta),
        )
        for u in updates
    ]
    return flexlora(adapter, rescaled_updates)


def _find_max_rank(updates: Sequence[Update]) -> int | None:
    """The highest rank of a client with a positive weight; None if one has the full rank."""
    ranks = [u.order.rank for u in updates if u.weight > 0]
    return max((r for r in ranks if r), default=None) if all(ranks) else None


def _make_term_scaling(updates: Sequence[Update]) -> Callable[[int], Float[Tensor, " rank"]]:
    """For a rank, factors that turn terms' means over all clients into means over their holders."""
    total = sum(u.weight for u in updates)

    def get_scales(rank: int) -> Float[Tensor, " rank"]:
        holder_weights = [
            sum(u.weight for u in updates if (u.order.rank or rank) > j) for j in range(rank)
        ]
        return torch.tensor([total / own if own > 0 else 1.0 for own in holder_weights])

    return get_scales


def _scale_terms(
    name: str, leaf: Tensor, get_scales: Callable[[int], Float[Tensor, " rank"]]
) -> Tensor:
    """A factor with each term multiplied by its scale; other leaves are unchanged."""
    rank_axis = get_rank_axis(name)
    if rank_axis is None:
        return leaf
    shape = [1] * leaf.ndim
    shape[rank_axis] = leaf.shape[rank_axis]
    return leaf * get_scales(leaf.shape[rank_axis]).view(shape)
