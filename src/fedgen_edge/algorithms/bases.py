"""Fed-SB: between two fixed bases of every layer, a small square matrix R is all that is trained.

A layer's update is scale * B R A, with B of orthonormal columns and A of orthonormal rows: singular
vectors of the first clients' gradient G of the backbone's own weight. A mean of R is exact, and r^2
values a layer travel up.

The gradient itself, m x n, is never formed: nobody could send it. The first two rounds are the two
passes of a randomised SVD, made of gradients of factors. With B = 0 and A drawn at random, B's
gradient is scale * G A^T, whose columns are made orthonormal: Q. With B = Q and A = 0, A's gradient
is scale * Q^T G, whose singular vectors with Q are the bases. The model is the backbone's
meanwhile, as one factor is zero. R begins at zero after that.

Sources: Singhal et al. 2025, Fed-SB (arXiv:2502.15436); Ponkshe et al. 2024, LoRA-SB
(arXiv:2411.19557); of the SVD Halko et al. 2011 (arXiv:0909.4061), algorithms 4.1 and 5.1, as many
test vectors as the rank.
Differs: they take the SVD of whole gradients at one place, and R begins at the singular values. G
is the mean, by examples, of each client's clipped sum over its batches, and the two passes may meet
other clients. The bases travel down in every round, since a client may not have been there. Where G
has a lower rank than R, the rest of the bases is arbitrary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedgen_edge.algorithms import factors
from fedgen_edge.algorithms.factors import Pair, Product, pairs
from fedgen_edge.algorithms.merge import mean
from fedgen_edge.algorithms.share import is_drawn
from fedgen_edge.types import AVERAGE, CORE, Leaves, Update

SURVEYS = 2
"""First rounds, in which nothing is trained."""


def begins(adapter: Leaves) -> Leaves:
    """The adapter with R beside each pair, which is one while the bases are sought."""
    return adapter | {p.core: torch.eye(len(adapter[p.a])) for p in pairs(adapter)}


def surveys(round_: int) -> bool:
    """Whether clients send gradients."""
    return round_ < SURVEYS


def trains(name: str, round_: int, epoch: int) -> bool:
    """Factors that begin at zero, then those drawn at random, and R ever after."""
    del epoch
    if surveys(round_):
        return not name.endswith(CORE) and is_drawn(name) == bool(round_)
    return name.endswith(CORE)


def sends(names: Sequence[str], round_: int | None) -> set[str]:
    """Share what is trained; everything travels down."""
    return {name for name in names if round_ is None or trains(name, round_, 0)}


def merges(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The mean R; of the first two rounds, the bases."""
    found = mean(adapter, updates)
    round_ = updates[0].order.round
    if not surveys(round_):
        return found
    made: Leaves = {}
    for pair in pairs(name for name in adapter if not name.startswith(AVERAGE)):
        made |= (_ranged if round_ == 0 else _based)(adapter, found, pair)
    followed = {AVERAGE + k: v for k, v in made.items() if AVERAGE + k in adapter}
    return {k: (v - adapter[k].double()).float() for k, v in (made | followed).items()}


def _ranged(adapter: Leaves, found: Leaves, pair: Pair) -> Leaves:
    """The factor whose gradient was sent, made orthonormal; the other is zero."""
    (sent,) = found.keys() & {*pair}
    (other,) = {*pair} - {sent}
    matrix = found[sent].double().flatten(1)
    whole = torch.linalg.qr(matrix).Q if sent == pair.b else torch.linalg.qr(matrix.mT).Q.mT
    return {sent: _shaped(whole, adapter[sent]), other: torch.zeros_like(adapter[other])}


def _based(adapter: Leaves, found: Leaves, pair: Pair) -> Leaves:
    """Singular vectors of what the two passes make of the gradient."""
    whole: Product = factors.product({**adapter, **found}, pair)
    left, _, right = factors.spectrum(whole)
    a, b = _shaped(right, adapter[pair.a]), _shaped(left, adapter[pair.b])
    return {pair.a: a, pair.b: b, pair.core: torch.zeros_like(adapter[pair.core])}


def _shaped(matrix: Float[Tensor, "rows columns"], like: Tensor) -> Tensor:
    """With zeros where a layer has fewer dimensions than the rank."""
    rows, columns = like.flatten(1).shape
    whole = matrix.new_zeros(rows, columns)
    whole[: len(matrix), : matrix.shape[1]] = matrix
    return whole.reshape(like.shape)
