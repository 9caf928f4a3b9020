"""A stage that sends a matrix as two low-rank factors whose product approximates it."""

import math
from dataclasses import dataclass

import torch

from fedgen_edge.compression.serialize import Schema
from fedgen_edge.types import Leaves

LEFT, RIGHT = "/left", "/right"
"""Suffixes of the names of a leaf's two factors."""


@dataclass(frozen=True)
class LowRank:
    """The best low-rank approximation of each leaf whose factors have fewer values than the leaf.

    A leaf is viewed as a matrix of its first axis by all others. Singular values are split evenly
    between both factors, so that they have the same scale.

    Source: Konečný et al. 2016 (arXiv:1610.05492), its structured updates.
    Differs: we take the best approximation; they draw one factor and train the other.
    """

    rank: int

    name = "low-rank"

    def get_sent_shapes(self, schema: Schema) -> dict[str, tuple[int, ...]]:
        """Return the shapes that are sent for leaves of these shapes."""
        sent_shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in schema.items():
            if self._is_factorized(shape):
                sent_shapes[name + LEFT] = (shape[0], self.rank)
                sent_shapes[name + RIGHT] = (self.rank, math.prod(shape[1:]))
            else:
                sent_shapes[name] = tuple(shape)
        return sent_shapes

    def encode(self, leaves: Leaves) -> Leaves:
        """Return the factors of each leaf that is factorized, and the other leaves."""
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
        """Restore the leaves of this schema."""
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
