"""Slots about a model of its own that a client trains beside the shared one, and never sends.

Two adapters are mixed in what their layers put out, w B A + (1 - w) B' A', and never factor by
factor: one pair is trained, and the other one frozen beside it (`types.RESIDUAL`), so that the
mixture is one adapter of twice the rank. Leaves that are no factors are interpolated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgen_edge.algorithms.local_corrections import keep_gradients
from fedgen_edge.algorithms.low_rank import FactorNames, find_pairs
from fedgen_edge.algorithms.share import is_random_init
from fedgen_edge.types import RESIDUAL, Leaves

PERSONAL_PREFIX = "own:"
"""Prefix, in a client's memory, of the leaves of its own model."""


@dataclass(frozen=True)
class PersonalModel:
    """How a client's own model is trained, in each round that it takes part in.

    It meets the batches of the shared model again, with an optimiser of its own; tuning begins from
    it after the last round.
    """

    corrects: Callable[[Leaves, Leaves, Leaves, Leaves], Leaves] = keep_gradients
    """As the algorithm's slot; in the memory's place is what the client received."""
    share: float = 1.0
    """Of what its layers put out, the own adapter's, as it is trained; the rest is the shared
    adapter's, which is frozen then."""
    mixing: tuple[float, ...] = ()
    """Such shares that a client chooses from at the end, where the settings name none."""

    def make_start(self, shared: Leaves, memory: Leaves) -> Leaves:
        """What its training begins from.

        Args:
            shared: what the client begins from with the shared model, which is its own one before
                it has one.
            memory: the client's.
        """
        personal_leaves = {
            k.removeprefix(PERSONAL_PREFIX): v
            for k, v in memory.items()
            if k.startswith(PERSONAL_PREFIX)
        }
        return mix_adapters({**shared, **personal_leaves}, shared, self.share)

    def make_memory(self, trained: Leaves, shared: Leaves) -> Leaves:
        """A part of the client's memory, from what its training ended with."""
        personal_leaves = unmix_adapters(trained, shared, self.share)
        return {
            PERSONAL_PREFIX + k: v for k, v in personal_leaves.items() if not k.startswith(RESIDUAL)
        }


def mix_adapters(personal: Leaves, shared: Leaves, share: float) -> Leaves:
    """One adapter that puts out `share` of the first's and the rest of the second's.

    Args:
        personal: its factors stay the trained ones; that which begins at zero is scaled.
        shared: joins what is frozen beside both, which is the same of both.
        share: from 0 to 1; at either end it is one of the two as it is, at its own rank.
    """
    if share in {0, 1}:
        return personal if share else shared
    mixture = {k: v if k.startswith(RESIDUAL) else torch.lerp(shared[k], v, share)
             for k, v in personal.items()}  # fmt: skip
    for pair in find_pairs(k for k in personal if not k.startswith(RESIDUAL)):
        mixture |= _scale_product(personal, pair, share)
        frozen_factors = _scale_product(shared, pair, 1 - share)
        if pair.core in personal:
            mixture[pair.core] = personal[pair.core]
            frozen_factors[pair.b] = _multiply_core(frozen_factors[pair.b], shared[pair.core])
        for name, frozen, axis in zip(pair, pair.residual, (0, 1), strict=True):
            residual_parts = (
                [frozen_factors[name], shared[frozen]]
                if frozen in shared
                else [frozen_factors[name]]
            )
            mixture[frozen] = torch.cat(residual_parts, axis)
    return mixture


def unmix_adapters(mixture: Leaves, shared: Leaves, share: float) -> Leaves:
    """The first adapter of a mixture with the second, whatever it has become.

    Args:
        mixture: a mixture, trained since; what was frozen in it is not looked at.
        shared: as it was mixed in.
        share: as it was, above 0.
    """
    if share == 1:
        return mixture
    personal = {k: v if k.startswith(RESIDUAL) else v + (mixture[k] - v) / share
             for k, v in shared.items()}  # fmt: skip
    for pair in find_pairs(k for k in shared if not k.startswith(RESIDUAL)):
        personal |= _scale_product(mixture, pair, 1 / share)
    return personal


def _multiply_core(b: Tensor, core: Tensor) -> Tensor:
    """B R: what is frozen is a pair, with nothing between its factors."""
    return (b.flatten(1) @ core).reshape(b.shape)


def _scale_product(adapter: Leaves, pair: FactorNames, factor: float) -> Leaves:
    """Two factors whose product is scaled by that which begins at zero."""
    return {k: adapter[k] if is_random_init(k) else adapter[k] * factor for k in pair}
