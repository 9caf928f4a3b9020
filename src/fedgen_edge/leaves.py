"""Arithmetic on leaves, with which the algebra of a federated method takes a few lines."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge.types import Leaves


def add(left: Leaves, right: Leaves) -> Leaves:
    """Add leaf by leaf; a leaf that `right` lacks stays unchanged."""
    return {k: v + right[k] if k in right else v for k, v in left.items()}


def subtract(left: Leaves, right: Leaves) -> Leaves:
    """Subtract leaf by leaf; both must have the same names."""
    return {k: left[k] - right[k] for k in left}


def scale(leaves: Leaves, factor: float) -> Leaves:
    """Multiply every leaf by the factor."""
    return {k: v * factor for k, v in leaves.items()}


def mean(members: Sequence[Leaves], weights: Float[Tensor, " clients"]) -> Leaves:
    """Return the weighted mean, summed in the members' order; the weights need not sum to one.

    Raises:
        ValueError: the weights sum to zero, or there are no members.
    """
    total = weights.double().sum()
    if not len(members) or total <= 0:
        raise ValueError("a mean needs at least one member with a positive weight")
    shares = [float(w) for w in weights.double() / total]
    return {
        k: torch.stack([m[k] * w for m, w in zip(members, shares, strict=True)]).sum(0)
        for k in members[0]
    }


def norm(leaves: Leaves, axes: int = 0) -> Float[Tensor, "*clients"]:
    """Return the Euclidean norm over all leaves together; the first `axes` dimensions remain."""
    squares = [v.square().flatten(axes).sum(-1) for v in leaves.values()]
    return torch.stack(squares).sum(0).sqrt()


def max_magnitude(leaf: Tensor) -> float:
    """Return the largest magnitude; a NaN counts as larger than any number."""
    low, high = torch.aminmax(leaf)
    return float("inf") if low.isnan() else max(-float(low), float(high))


def flatten(leaves: Leaves) -> Float[Tensor, " values"]:
    """Concatenate all values into one float64 vector."""
    return torch.cat([v.flatten().double() for v in leaves.values()])


def stack(members: Sequence[Leaves]) -> Leaves:
    """Give every leaf a first axis of clients."""
    return {k: torch.stack([m[k] for m in members]) for k in members[0]}


def fill_missing(members: Sequence[Leaves]) -> list[Leaves]:
    """Give all members the same names: a leaf that one of them lacks becomes zeros."""
    shapes = {k: v for member in members for k, v in member.items()}
    return [{k: m.get(k, torch.zeros_like(v)) for k, v in shapes.items()} for m in members]


def shapes(leaves: Leaves) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf."""
    return {k: tuple(v.shape) for k, v in leaves.items()}


def row(leaves: Leaves, index: int) -> Leaves:
    """Return one client's leaves from a stack."""
    return {k: v[index] for k, v in leaves.items()}


def select(leaves: Leaves, keep: Callable[[str], bool]) -> Leaves:
    """Return the leaves whose names satisfy the predicate."""
    return {k: v for k, v in leaves.items() if keep(k)}
