"""Stages that keep some values of a vector, and encode which ones."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge.compression.packing import (
    Form,
    Parts,
    decode_positions,
    encode_positions,
    get_position_form,
    mask_largest,
)
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import uniform


@runtime_checkable
class Sparsifier(Protocol):
    """Keeps some values of a vector, and encodes which ones."""

    @property
    def name(self) -> str:
        """Its name in settings and errors."""
        ...

    def count_kept(self, count: int) -> int:
        """Count how many of `count` values are kept."""
        ...

    def get_form(self, count: int, /) -> Form:
        """Return the form of the parts that say which."""
        ...

    def encode(
        self, values: Float[Tensor, " count"], seed: int, /
    ) -> tuple[Float[Tensor, " kept"], Parts]:
        """Return the kept values, in the order of their positions, and the parts."""
        ...

    def decode(
        self, values: Float[Tensor, " kept"], parts: Parts, count: int, seed: int, /
    ) -> Float[Tensor, " count"]:
        """Restore the vector, with zeros where values were not kept."""
        ...


@dataclass(frozen=True)
class TopK:
    """Keep the values of largest magnitude over all leaves together; among equal ones, the first.

    Source: Stich et al. 2018, sparsified SGD with memory (arXiv:1809.07599).
    """

    density: float
    """Share of the values that is kept: above 0, at most 1."""

    name = "top-k"

    def __post_init__(self) -> None:
        _check_density(self.density)

    def count_kept(self, count: int) -> int:
        """ceil(density * count), at least one."""
        return _count_kept(self.density, count)

    def get_form(self, count: int) -> Form:
        """Return the form of a bitmap or of gaps, whichever is shorter at this density."""
        return get_position_form(count, self.count_kept(count))

    def encode(
        self, values: Float[Tensor, " count"], _seed: int
    ) -> tuple[Float[Tensor, " kept"], Parts]:
        """Return the kept values, in the order of their positions, and their positions."""
        mask = mask_largest(values.abs(), self.count_kept(values.numel()))
        return values[mask], encode_positions(mask)

    def decode(
        self, values: Float[Tensor, " kept"], parts: Parts, count: int, _seed: int
    ) -> Float[Tensor, " count"]:
        """Restore the vector; impossible positions are refused (`bad-positions`)."""
        return _scatter(values, decode_positions(parts, count, len(values)))


@dataclass(frozen=True)
class RandomK:
    """Keep values at positions that both sides draw from one seed, so that none are sent.

    Source: Konečný et al. 2016 (arXiv:1610.05492), its random masks.
    """

    density: float
    """Share of the values that is kept: above 0, at most 1."""
    scaled: bool = True
    """Whether the receiver multiplies by count / kept, so that the mean over seeds is the vector
    itself. The error can then be larger than the vector, so that error feedback diverges."""

    name = "random-k"

    def __post_init__(self) -> None:
        _check_density(self.density)

    def count_kept(self, count: int) -> int:
        """ceil(density * count), at least one."""
        return _count_kept(self.density, count)

    def get_form(self, _count: int) -> Form:
        """Return an empty form: the seed determines the positions."""
        return {}

    def encode(
        self, values: Float[Tensor, " count"], seed: int
    ) -> tuple[Float[Tensor, " kept"], Parts]:
        """Return the kept values, in the order of their positions."""
        return values[self._draw_mask(values.numel(), seed)], {}

    def decode(
        self, values: Float[Tensor, " kept"], _parts: Parts, count: int, seed: int
    ) -> Float[Tensor, " count"]:
        """Restore the vector, scaled or not."""
        factor = count / len(values) if self.scaled else 1.0
        return _scatter(values * factor, self._draw_mask(count, seed))

    def _draw_mask(self, count: int, seed: int) -> Tensor:
        return mask_largest(uniform(torch.tensor(seed), 0, (count,)), self.count_kept(count))


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ConfigError(f"density={density} must be above 0 and at most 1: 0.1 keeps a tenth")


def _count_kept(density: float, count: int) -> int:
    # use the decimal number of the setting: in floats, 0.07 * 100 is a little over 7
    return math.ceil(Fraction(str(density)) * count)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    vector = torch.zeros(mask.shape)
    vector[mask] = values
    return vector
