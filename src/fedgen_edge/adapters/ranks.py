"""Adapters of several ranks: the first terms of a product, and zeros in the place of the others.

All share the scale alpha / rank of the largest, so a truncated adapter is the same sum with fewer
terms. Where a row of A and its column of B are both zero, so are both their gradients, and SGD and
AdamW leave them at zero, weight decay or not.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from fedgen_edge.leaves import shapes
from fedgen_edge.types import PAIRS, RESIDUAL, Leaves


def get_rank_axis(name: str) -> int | None:
    """Where a leaf has the rank, of its dimensions; none where it has none, or one of its own.

    That is the first dimension of A, and the second of B. Residuals have a rank of their own.
    """
    last = name.rpartition(".")[2]
    axes = (pair.index(last) for pair in PAIRS if last in pair)
    return None if name.startswith(RESIDUAL) else next(axes, None)


def get_rank_shapes(
    full_shapes: Mapping[str, Sequence[int]], rank: int | None
) -> dict[str, tuple[int, ...]]:
    """The shapes that `truncate_rank` makes of these."""
    return {
        k: tuple(
            min(n, rank) if rank and at == get_rank_axis(k) else n for at, n in enumerate(shape)
        )
        for k, shape in full_shapes.items()
    }


def truncate_rank(leaves: Leaves, rank: int | None) -> Leaves:
    """The first rows of A and columns of B, as many as the rank (none: all)."""
    if rank is None:
        return leaves
    return {
        k: v if (at := get_rank_axis(k)) is None else v.narrow(at, 0, min(rank, v.shape[at]))
        for k, v in leaves.items()
    }


def pad_ranks(leaves: Leaves, full_shapes: Mapping[str, Sequence[int]]) -> Leaves:
    """The leaves, with zeros up to these ranks; without an axis of clients.

    Args:
        leaves: A with no more rows, B with no more columns.
        full_shapes: the shapes that they are to have; a leaf that is not among them stays as it is.
    """
    return {
        k: _zero_pad(v, get_rank_axis(k), full_shapes.get(k, v.shape)) for k, v in leaves.items()
    }


def mask_rank(leaves: Leaves, rank: int | None) -> Leaves:
    """The leaves in their shapes, with zeros beyond the rank (none: as they are)."""
    return pad_ranks(truncate_rank(leaves, rank), shapes(leaves))


def _zero_pad(leaf: Tensor, at: int | None, shape: Sequence[int]) -> Tensor:
    missing = 0 if at is None else shape[at] - leaf.shape[at]
    if at is None or not missing:
        return leaf
    return F.pad(leaf, (0, 0) * (leaf.ndim - 1 - at) + (0, missing))
