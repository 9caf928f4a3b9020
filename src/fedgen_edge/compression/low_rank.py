"""A stage that sends a matrix as two thin ones whose product is near it."""

import math
from dataclasses import dataclass

import torch

from fedgen_edge.compression.serialize import Schema
from fedgen_edge.types import Leaves

LEFT, RIGHT = "/left", "/right"
"""End the names of the two thin matrices of a leaf."""


@dataclass(frozen=True)
class LowRank:
    """The closest product of a rank to each leaf, where its factors have fewer values than it has.

    A leaf is taken as a matrix of its first axis by all others. Singular values are split evenly
    between both factors, so that they are of one size.

    Source: Konečný et al. 2016 (arXiv:1610.05492), its structured updates.
    Differs: the closest product of all, where theirs draws one factor and trains the other.
    """

    rank: int

    name = "low-rank"

    def get_sent_shapes(self, schema: Schema) -> dict[str, tuple[int, ...]]:
        """Shapes of what is sent of leaves of these shapes."""
        sent_shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in schema.items():
            if self._is_factorized(shape):
                sent_shapes[name + LEFT] = (shape[0], self.rank)
                sent_shapes[name + RIGHT] = (self.rank, math.prod(shape[1:]))
            else:
                sent_shapes[name] = tuple(shape)
        return sent_shapes

    def encode(self, leaves: Leaves) -> Leaves:
        """The factors of each leaf that has some, and the other leaves."""
        encoded: Leaves = {}
        for name, leaf in leaves.items():
            if self._is_factorized(leaf.shape):
                left, values, right = torch.linalg.svd(leaf.flatten(1).double(), False)
                root_values = values[: self.rank].sqrt()
                encoded[name + LEFT] = (left[:, : self.rank] * root_values).float()
                encoded[name + RIGHT] = (root_values[:, None] * right[: self.rank]).float()
            else:
                encoded[name] = leaf
        return encoded

    def decode(self, encoded: Leaves, schema: Schema) -> Leaves:
        """The leaves of this schema."""
        return {
            name: (encoded[name + LEFT] @ encoded[name + RIGHT]).reshape(shape)
            if self._is_factorized(shape)
            else encoded[name]
            for name, shape in schema.items()
        }

    def _is_factorized(self, shape: tuple[int, ...]) -> bool:
        if len(shape) < 2:
            return False
        rows, columns = shape[0], math.prod(shape[1:])
        return self.rank * (rows + columns) < rows * columns
