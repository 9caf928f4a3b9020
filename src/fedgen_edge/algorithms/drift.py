"""How far clients move in the effective weights: for a LoRA layer, in its product B A.

Factors say less: a product has many factorizations, and the effect of a change of A depends on B.
Norms are Frobenius, over all layers together, without alpha / rank. A leaf that is not a factor
counts as its own weight, and moving averages, which follow other leaves, are left out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge import leaves
from fedgen_edge.algorithms import low_rank
from fedgen_edge.algorithms.low_rank import FactorNames, Product, find_pairs
from fedgen_edge.algorithms.merge import weighted_average
from fedgen_edge.types import AVERAGE, Leaves, Update


class ClientDrift(NamedTuple):
    """How far the clients of a round moved."""

    client_norms: list[float]
    """Norm of each client's change."""
    mean_norm: float
    """Norm of their mean change, weighted by examples."""


def measure_drift(updates: Sequence[Update], adapter: Leaves) -> ClientDrift | None:
    """Drift of each client and of their mean; None where workers sent only means of factors.

    Cost: O(K (m + n) r^2) for a layer of m x n, K clients and rank r; the mean also takes a norm
    of R = (K + 1) r columns.

    Args:
        updates: at least one, with the leaf names of training.
        adapter: the server's adapter before the round, including factors that are not trained or
            sent. A factor whose partner is neither here nor received is compared by itself.

    Raises:
        ValueError: no client has a positive weight.
    """
    sent_names = [name for name in updates[0].delta if not name.startswith(AVERAGE)]
    layers = [
        pair
        for pair in find_pairs({**adapter, **updates[0].order.received})
        if {pair.a, pair.b, pair.core}.intersection(sent_names)
    ]
    if any(update.client_norm is not None for update in updates):
        return None if layers else _read_aggregated_drift(updates)
    squares, mean_square = torch.zeros(len(updates), dtype=torch.float64), 0.0
    for pair in layers:
        layer_squares, mean_change = _measure_layer(updates, adapter, pair)
        squares, mean_square = (
            squares + layer_squares,
            mean_square + low_rank.norm(mean_change) ** 2,
        )
    factor_names = {name for pair in layers for name in (pair.a, pair.b, pair.core)}
    if other_names := [name for name in sent_names if name not in factor_names]:
        other_changes = [
            leaves.select(update.delta, other_names.__contains__) for update in updates
        ]
        squares += torch.tensor([float(leaves.norm(own)) ** 2 for own in other_changes])
        weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
        mean_square += float(leaves.norm(leaves.mean(other_changes, weights))) ** 2
    return ClientDrift(squares.clamp(min=0).sqrt().tolist(), math.sqrt(mean_square))


def _read_aggregated_drift(updates: Sequence[Update]) -> ClientDrift:
    return ClientDrift(
        [u.client_norm or 0.0 for u in updates], float(leaves.norm(weighted_average({}, updates)))
    )


def _measure_layer(
    updates: Sequence[Update], adapter: Leaves, pair: FactorNames
) -> tuple[Float[Tensor, " clients"], Product]:
    """Squared norms of clients' changes of a product, and their mean change.

    A change is B A - B0 A0 = (B - B0) A + B0 (A - A0): no large, nearly equal numbers are
    subtracted, so float32 is enough. The core is multiplied into B by the same rule.
    """
    squares, parts = torch.zeros(len(updates), dtype=torch.float64), list[Product]()
    total = sum(update.weight for update in updates)
    if not total > 0:
        raise ValueError("a mean needs at least one member with a positive weight")
    for received, places in _group_by_start(updates):
        start, members = {**adapter, **received}, [updates[at] for at in places]
        (a0, da), (b0, db) = (_stack_changes(start, members, name) for name in pair)
        if pair.core in start:
            core, change = _stack_changes(start, members, pair.core)
            b0, db = b0 @ core, db @ (core + change) + b0 @ change
        a = a0 + da
        squares[places] = (
            _inner_product(db, db, a, a)
            + 2 * _inner_product(db, b0, a, da)
            + _inner_product(b0, b0, da, da)
        )
        shares = [update.weight / total for update in members]
        parts.append(low_rank.sum_products([*map(Product, db, a)], shares))
        parts.append(Product(b0, torch.einsum("c,cri->ri", torch.tensor(shares), da)))
    return squares, low_rank.sum_products(parts)


def _group_by_start(updates: Sequence[Update]) -> list[tuple[Leaves, list[int]]]:
    """Received leaves, and the indices of the clients that received them; usually one group."""
    starts: dict[int, tuple[Leaves, list[int]]] = {}
    for place, update in enumerate(updates):
        received = update.order.received
        starts.setdefault(id(received), (received, []))[1].append(place)
    return [*starts.values()]


def _stack_changes(
    start: Leaves, updates: Sequence[Update], name: str
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "clients rows columns"]]:
    """A leaf's starting value and each client's change of it, as matrices."""
    leaf = start[name].flatten(1)
    zeros = torch.zeros_like(leaf)
    changes = [u.delta[name].flatten(1) if name in u.delta else zeros for u in updates]
    return leaf, torch.stack(changes)


def _inner_product(left: Tensor, right: Tensor, a: Tensor, c: Tensor) -> Float[Tensor, "*clients"]:
    """The inner product of `left @ a` and `right @ c`, from small Gram matrices."""
    return ((left.mT @ right).double() * (a @ c.mT).double()).sum((-2, -1))
