"""Slots about a model of its own that a client trains beside the shared one, and never sends.

Two adapters are mixed in what their layers put out, w B A + (1 - w) B' A', and never factor by
factor: one pair is trained, and the other one frozen beside it (`types.RESIDUAL`), so that the
mixture is one adapter of twice the rank. Leaves that are no factors are interpolated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgen_edge.algorithms.correct import unchanged
from fedgen_edge.algorithms.factors import Pair, pairs
from fedgen_edge.algorithms.share import is_drawn
from fedgen_edge.types import RESIDUAL, Leaves

OWN = "own:"
"""Prefix, in a client's memory, of the leaves of its own model."""


@dataclass(frozen=True)
class Beside:
    """How a client's own model is trained, in each round that it takes part in.

    It meets the batches of the shared model again, with an optimiser of its own; tuning begins from
    it after the last round.
    """

    corrects: Callable[[Leaves, Leaves, Leaves, Leaves], Leaves] = unchanged
    """As the algorithm's slot; in the memory's place is what the client received."""
    share: float = 1.0
    """Of what its layers put out, the own adapter's, as it is trained; the rest is the shared
    adapter's, which is frozen then."""
    mixing: tuple[float, ...] = ()
    """Such shares that a client chooses from at the end, where the settings name none."""

    def begins(self, shared: Leaves, memory: Leaves) -> Leaves:
        """What its training begins from.

        Args:
            shared: what the client begins from with the shared model, which is its own one before
                it has one.
            memory: the client's.
        """
        own = {k.removeprefix(OWN): v for k, v in memory.items() if k.startswith(OWN)}
        return mixed({**shared, **own}, shared, self.share)

    def keeps(self, now: Leaves, shared: Leaves) -> Leaves:
        """A part of the client's memory, from what its training ended with."""
        own = unmixed(now, shared, self.share)
        return {OWN + k: v for k, v in own.items() if not k.startswith(RESIDUAL)}


def mixed(own: Leaves, other: Leaves, share: float) -> Leaves:
    """One adapter that puts out `share` of the first's and the rest of the second's.

    Args:
        own: its factors stay the trained ones; that which begins at zero is scaled.
        other: joins what is frozen beside both, which is the same of both.
        share: from 0 to 1; at either end it is one of the two as it is, at its own rank.
    """
    if share in {0, 1}:
        return own if share else other
    found = {k: v if k.startswith(RESIDUAL) else torch.lerp(other[k], v, share)
             for k, v in own.items()}  # fmt: skip
    for pair in pairs(k for k in own if not k.startswith(RESIDUAL)):
        found |= _scaled(own, pair, share)
        rest = _scaled(other, pair, 1 - share)
        if pair.core in own:
            found[pair.core] = own[pair.core]
            rest[pair.b] = _through(rest[pair.b], other[pair.core])
        for name, frozen, axis in zip(pair, pair.residual, (0, 1), strict=True):
            both = [rest[name], other[frozen]] if frozen in other else [rest[name]]
            found[frozen] = torch.cat(both, axis)
    return found


def unmixed(now: Leaves, other: Leaves, share: float) -> Leaves:
    """The first adapter of a mixture with the second, whatever it has become.

    Args:
        now: a mixture, trained since; what was frozen in it is not looked at.
        other: as it was mixed in.
        share: as it was, above 0.
    """
    if share == 1:
        return now
    found = {k: v if k.startswith(RESIDUAL) else v + (now[k] - v) / share
             for k, v in other.items()}  # fmt: skip
    for pair in pairs(k for k in other if not k.startswith(RESIDUAL)):
        found |= _scaled(now, pair, 1 / share)
    return found


def _through(b: Tensor, core: Tensor) -> Tensor:
    """B R: what is frozen is a pair, with nothing between its factors."""
    return (b.flatten(1) @ core).reshape(b.shape)


def _scaled(adapter: Leaves, pair: Pair, factor: float) -> Leaves:
    """Two factors whose product is scaled by that which begins at zero."""
    return {k: adapter[k] if is_drawn(k) else adapter[k] * factor for k in pair}
