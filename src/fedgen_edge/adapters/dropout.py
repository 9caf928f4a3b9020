"""Dropout as data: a mask is a function of a seed, so that any pass over it draws it again.

A counter-based hash, not a stream: the mask of an element depends on its client's seed, its
layer and its place alone, never on how clients were stacked or whether a pass is a recomputation.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 24


def mask(
    seed: Int[Tensor, "*clients"], layer: int, shape: tuple[int, ...], share: float
) -> Float[Tensor, "..."]:
    """Zeros for a share of the elements, 1 / (1 - share) for the others.

    Args:
        seed: one for each client.
        layer: number of the layer, so that no two layers share a mask.
        shape: of one client's elements.
        share: from 0 to below 1.

    Returns:
        `[*clients, *shape]`.
    """
    count = torch.Size(shape).numel()
    key = _mix(seed + _mix(torch.tensor(layer + 1, device=seed.device)))
    places = torch.arange(count, device=seed.device)
    drawn = (_mix(key.unsqueeze(-1) + places) >> 8) & ((1 << BITS) - 1)
    kept = drawn >= int(share * (1 << BITS))
    return (kept / (1 - share)).reshape(*seed.shape, *shape)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014); int64 wraps, and shifts are made logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
