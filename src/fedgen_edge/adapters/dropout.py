"""Dropout as data: a mask is a function of a seed, so every forward pass gets the same mask.

An element's mask depends only on its client's seed, its layer, and its position, never on how
clients are stacked or whether a pass is a recomputation.
"""

from jaxtyping import Float, Int
from torch import Tensor

from fedgen_edge.seeds import BITS, uniform


def draw_mask(
    seed: Int[Tensor, "*clients"], layer: int, shape: tuple[int, ...], rate: float
) -> Float[Tensor, "..."]:
    """A mask: zeros for a fraction of the elements, and 1 / (1 - share) for the others.

    Args:
        seed: one per client.
        layer: the layer's number, so that no two layers share a mask.
        shape: the shape of one client's elements.
        rate: the fraction, from 0 to below 1.

    Returns:
        `[*clients, *shape]`.
    """
    kept = uniform(seed, layer, shape) >= int(rate * (1 << BITS)) / (1 << BITS)
    return kept / (1 - rate)
