"""Adapters of several ranks: the first terms of a product, with zeros in place of the others.

All share the scale alpha / rank of the largest rank, so a truncated adapter is the same sum with
fewer terms. Where a row of A and its column of B are both zero, their gradients are zero too, and
SGD and AdamW leave them at zero, with or without weight decay.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from fedgen_edge.leaves import shapes
from fedgen_edge.types import PAIRS, RESIDUAL, Leaves


def get_rank_axis(name: str) -> int | None:
    """The dimension of a leaf that holds the adapter's rank; None if it has no such dimension.

    It is the first dimension of A, and the second of B. Residuals have a rank of their own.
    """
    last = name.rpartition(".")[2]
    axes = (pair.index(last) for pair in PAIRS if last in pair)
    return None if name.startswith(RESIDUAL) else next(axes, None)


def get_rank_shapes(
    full_shapes: Mapping[str, Sequence[int]], rank: int | None
) -> dict[str, tuple[int, ...]]:
    """The shapes after `truncate_rank`."""
    return {
        k: tuple(
            min(n, rank) if rank and at == get_rank_axis(k) else n for at, n in enumerate(shape)
        )
        for k, shape in full_shapes.items()
    }


def truncate_rank(leaves: Leaves, rank: int | None) -> Leaves:
    """The first `rank` rows of A and columns of B; None keeps all of them."""
    if rank is None:
        return leaves
    return {
        k: v if (at := get_rank_axis(k)) is None else v.narrow(at, 0, min(rank, v.shape[at]))
        for k, v in leaves.items()
    }


def pad_ranks(leaves: Leaves, full_shapes: Mapping[str, Sequence[int]]) -> Leaves:
    """The leaves, padded with zeros to these ranks; without a client axis.

    Args:
        leaves: A has no more rows, and B no more columns, than the target shape.
        full_shapes: the target shapes; a leaf without one is unchanged.
    """
    return {
        k: _zero_pad(v, get_rank_axis(k), full_shapes.get(k, v.shape)) for k, v in leaves.items()
    }


def mask_rank(leaves: Leaves, rank: int | None) -> Leaves:
    """The leaves in their shapes, with zeros beyond the rank; None leaves them unchanged."""
    return pad_ranks(truncate_rank(leaves, rank), shapes(leaves))


def _zero_pad(leaf: Tensor, at: int | None, shape: Sequence[int]) -> Tensor:
    missing = 0 if at is None else shape[at] - leaf.shape[at]
    if at is None or not missing:
        return leaf
    return F.pad(leaf, (0, 0) * (leaf.ndim - 1 - at) + (0, missing))
