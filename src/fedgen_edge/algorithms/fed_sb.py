"""Fed-SB: only a small square matrix R is trained, between two fixed bases of every layer.

A layer's update is scale * B R A, where B has orthonormal columns and A has orthonormal rows: the
singular vectors of the first clients' gradient G of the backbone's weight. A mean of R is exact,
and clients send r^2 values per layer.

The m x n gradient is never formed, since no client could send it. The first two rounds are the two
passes of a randomized SVD, computed from gradients of factors. With B = 0 and random A, B's
gradient is scale * G A^T, whose columns are orthonormalized: Q. With B = Q and A = 0, A's gradient
is scale * Q^T G, whose singular vectors, with Q, are the bases. During these rounds one factor is
zero, so the model is the backbone. R then starts at zero.

Sources: Singhal et al. 2025, Fed-SB (arXiv:2502.15436); Ponkshe et al. 2024, LoRA-SB
(arXiv:2411.19557); for the SVD, Halko et al. 2011 (arXiv:0909.4061), algorithms 4.1 and 5.1, with
as many test vectors as the rank.
Differs: they take the SVD of complete gradients in one place, and R starts at the singular values.
G is the mean, weighted by examples, of each client's clipped sum over its batches, and the two
passes may see different clients. The server broadcasts the bases in every round, because a client
may have missed earlier ones. Where G has a lower rank than R, the remaining basis is arbitrary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge.algorithms import low_rank
from fedgen_edge.algorithms.low_rank import FactorNames, Product, find_pairs
from fedgen_edge.algorithms.merge import weighted_average
from fedgen_edge.algorithms.share import is_random_init
from fedgen_edge.types import AVERAGE, CORE, Leaves, Update

SURVEY_ROUNDS = 2
"""Number of initial rounds, in which nothing is trained."""


def begins(adapter: Leaves) -> Leaves:
    """The adapter with an R for each pair, the identity until the bases are computed."""
    return adapter | {p.core: torch.eye(len(adapter[p.a])) for p in find_pairs(adapter)}


def surveys(round_: int) -> bool:
    """Whether clients send gradients."""
    return round_ < SURVEY_ROUNDS


def trains(name: str, round_: int, _epoch: int) -> bool:
    """Train the factors that start at zero, then the random ones, and from then on R."""
    if surveys(round_):
        return not name.endswith(CORE) and is_random_init(name) == bool(round_)
    return name.endswith(CORE)


def sends(names: Sequence[str], round_: int | None) -> set[str]:
    """Send the trained leaves; the server broadcasts all leaves."""
    return {name for name in names if round_ is None or trains(name, round_, 0)}


def merges(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The mean R; in the first two rounds, the bases."""
    mean_update = weighted_average(adapter, updates)
    round_ = updates[0].order.round
    if not surveys(round_):
        return mean_update
    new_factors: Leaves = {}
    for pair in find_pairs(name for name in adapter if not name.startswith(AVERAGE)):
        new_factors |= (_find_range if round_ == 0 else _find_bases)(adapter, mean_update, pair)
    averages = {AVERAGE + k: v for k, v in new_factors.items() if AVERAGE + k in adapter}
    return {k: (v - adapter[k].double()).float() for k, v in (new_factors | averages).items()}


def _find_range(adapter: Leaves, gradients: Leaves, pair: FactorNames) -> Leaves:
    """The orthonormalized gradient as its factor; the other factor is zero."""
    (sent_name,) = gradients.keys() & {*pair}
    (other_name,) = {*pair} - {sent_name}
    matrix = gradients[sent_name].double().flatten(1)
    orthonormal = (
        torch.linalg.qr(matrix).Q if sent_name == pair.b else torch.linalg.qr(matrix.mT).Q.mT
    )
    return {
        sent_name: _zero_pad(orthonormal, adapter[sent_name]),
        other_name: torch.zeros_like(adapter[other_name]),
    }


def _find_bases(adapter: Leaves, gradients: Leaves, pair: FactorNames) -> Leaves:
    """Singular vectors of the gradient as approximated by the two passes."""
    gradient: Product = low_rank.get_product({**adapter, **gradients}, pair)
    left, _, right = low_rank.compute_svd(gradient)
    a, b = _zero_pad(right, adapter[pair.a]), _zero_pad(left, adapter[pair.b])
    return {pair.a: a, pair.b: b, pair.core: torch.zeros_like(adapter[pair.core])}


def _zero_pad(matrix: Float[Tensor, "rows columns"], like: Tensor) -> Tensor:
    """The matrix, padded with zeros where a layer has fewer dimensions than the rank."""
    rows, columns = like.flatten(1).shape
    padded_matrix = matrix.new_zeros(rows, columns)
    padded_matrix[: len(matrix), : matrix.shape[1]] = matrix
    return padded_matrix.reshape(like.shape)
