"""Dropout as data: a mask is a function of a seed, so that any pass over it draws it again.

The mask of an element depends on its client's seed, its layer and its place alone, never on how
clients were stacked or whether a pass is a recomputation.
"""

from jaxtyping import Float, Int
from torch import Tensor

from fedgen_edge.seeds import BITS, uniform


def draw_mask(
    seed: Int[Tensor, "*clients"], layer: int, shape: tuple[int, ...], rate: float
) -> Float[Tensor, "..."]:
    """Zeros for a share of the elements, 1 / (1 - share) for the others.

    Args:
        seed: one for each client.
        layer: number of the layer, so that no two layers share a mask.
        shape: of one client's elements.
        rate: from 0 to below 1.

    Returns:
        `[*clients, *shape]`.
    """
    kept = uniform(seed, layer, shape) >= int(rate * (1 << BITS)) / (1 << BITS)
    return kept / (1 - rate)
