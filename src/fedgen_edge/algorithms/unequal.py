"""Slots that merge adapters of unequal ranks: each client holds the first terms of every product.

A term is a row of A and its column of B. What a client lacks is zero in its adapter, and scales are
one for all, so alpha is never met here. Terms that nobody of a cohort holds stay as the server has
them. Clients of one rank are a special case: each rule is then the plain one that it says.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge import leaves
from fedgen_edge.adapters.ranks import axis, cut
from fedgen_edge.algorithms import factors
from fedgen_edge.algorithms.factors import Pair, pairs, product
from fedgen_edge.algorithms.merge import mean
from fedgen_edge.algorithms.products import by_svd
from fedgen_edge.types import AVERAGE, Leaves, Update


def by_norm(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean of each layer's factors, weighted by the size of the client's product.

    A factor that lacks a term counts for zero in it, with its client's whole weight. So a term
    that clients of a share s hold shrinks to s of its size in A, and in B too, in each round.

    Sizes are Frobenius norms, from the factors. Where all are zero, and for leaves that are no
    pair, training examples weigh. Of one rank it is the mean of factors by those norms. A moving
    average is weighed as what it follows.

    Cost: O(K (m + n) r^2) for a layer of m x n, K clients and rank r.

    Raises:
        ValueError: no client has a positive weight.

    Source: Cho et al. 2024, HetLoRA (arXiv:2401.06432).
    Differs: ranks stay as they are set: its self-pruning, and the penalty on the last terms that
    leads to it, are left out. Norms are of each layer, and terms that nobody holds are kept: at
    zero in both factors they could never be trained again.
    """
    change, most = mean(adapter, updates), _largest(updates)
    examples = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    ends = [leaves.add(u.delta, u.order.received) for u in updates]
    for pair in pairs(change):
        led = Pair(*(name.removeprefix(AVERAGE) for name in pair))
        led = led if {*led} <= change.keys() else pair
        norms = [factors.norm(product(end, led)) for end in ends]
        sizes = torch.tensor(norms, dtype=torch.float64)
        own = [leaves.select(end, pair.__contains__) for end in ends]
        middle = leaves.mean(own, sizes if sizes.any() else examples)
        change |= cut({name: middle[name] - adapter[name] for name in pair}, most)
    return change


def over_holders(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean of the changes of each term, over the clients that hold it, weighted by examples.

    So a client of low rank says nothing of the terms that it lacks. Of one rank it is `merge.mean`.

    Raises:
        ValueError: no client has a positive weight.

    Source: Chen et al. 2024, RBLA (arXiv:2408.08699).
    """
    factor = _raised(updates)
    return {k: _scaled(k, v, factor) for k, v in mean(adapter, updates).items()}


def by_partitions(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The closest product to the sum of the terms' means, each over the clients that hold it.

    Terms between two neighbouring ranks are a partition: its clients are those of the higher rank
    or above, and their weights are made to sum to one in it. Of one rank it is `products.by_svd`,
    whose way to split singular values, cost and care for ranks that are not used this has.

    Raises:
        ValueError: no client has a positive weight.

    Source: Wu et al. 2026, raFLoRA (arXiv:2602.13486).
    Differs: by QR of the factors. Terms that nobody of a cohort holds join the sum as the
    server has them.
    """
    lacked = leaves.subtract(adapter, cut(adapter, _largest(updates)))
    raised, seconds = _raised(updates), {pair.b for u in updates for pair in pairs(u.delta)}

    def weighed(held: Leaves) -> Leaves:
        return {k: _scaled(k, v, raised) if k in seconds else v for k, v in held.items()}

    ends = [
        replace(
            u,
            order=replace(u.order, received=leaves.add(weighed(u.order.received), lacked)),
            delta=weighed(u.delta),
        )
        for u in updates
    ]
    return by_svd(adapter, ends)


def _largest(updates: Sequence[Update]) -> int | None:
    """The highest rank of a client that counts; none where one has them all."""
    held = [u.order.rank for u in updates if u.weight > 0]
    return max((r for r in held if r), default=None) if all(held) else None


def _raised(updates: Sequence[Update]) -> Callable[[int], Float[Tensor, " rank"]]:
    """For a rank, by what its terms' means over all clients make those over their holders."""
    total = sum(u.weight for u in updates)

    def raised(rank: int) -> Float[Tensor, " rank"]:
        held = [sum(u.weight for u in updates if (u.order.rank or rank) > j) for j in range(rank)]
        return torch.tensor([total / own if own > 0 else 1.0 for own in held])

    return raised


def _scaled(name: str, leaf: Tensor, factor: Callable[[int], Float[Tensor, " rank"]]) -> Tensor:
    """A factor's terms, each times its own number; other leaves are as they were."""
    at = axis(name)
    if at is None:
        return leaf
    shape = [1] * leaf.ndim
    shape[at] = leaf.shape[at]
    return leaf * factor(leaf.shape[at]).view(shape)
