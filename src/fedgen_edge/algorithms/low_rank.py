"""Algebra of low-rank products B A through their factors, without forming the m x n product.

Factors here are float64 matrices: a convolution's factors are flattened. QR and SVD of a product
whose factors have R columns take O((m + n) R^2 + R^3).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgen_edge.types import CORE, PAIRS, RESIDUAL, Leaves

QR_MIN_RATIO = 2
"""Least ratio of a side to the number of columns for QR: below it, QR costs more than the dense
product, and the two factors have as many values."""


class FactorNames(NamedTuple):
    """The names of a product's two factors."""

    a: str
    b: str

    @property
    def layer(self) -> str:
        """The layer's name; a moving average counts as a layer of its own."""
        return self.a.rpartition(".")[0]

    @property
    def residual(self) -> "FactorNames":
        """The names of the frozen residual pair."""
        return FactorNames(RESIDUAL + self.a, RESIDUAL + self.b)

    @property
    def core(self) -> str:
        """The name of the matrix between the factors, if there is one."""
        return f"{self.layer}.{CORE}"


class Product(NamedTuple):
    """B A, as its factors."""

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in_"]


class Spectrum(NamedTuple):
    """A product's singular value decomposition, largest values first."""

    left: Float[Tensor, "out rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank in_"]


def find_pairs(names: Iterable[str]) -> list[FactorNames]:
    """The pairs whose names are both present."""
    known_names = dict.fromkeys(names)
    candidates = [
        FactorNames(name, name.removesuffix(a) + b)
        for name in known_names
        for a, b in PAIRS
        if name.endswith(f".{a}")
    ]
    return [pair for pair in candidates if pair.b in known_names]


def get_product(adapter: Leaves, pair: FactorNames) -> Product:
    """A pair's product."""
    return Product(adapter[pair.b].double().flatten(1), adapter[pair.a].double().flatten(1))


def get_residual(adapter: Leaves, pair: FactorNames) -> Product:
    """A pair's frozen residual, of rank 0 if there is none."""
    if pair.residual.a in adapter:
        return get_product(adapter, pair.residual)
    trained = get_product(adapter, pair)
    return Product(trained.b[:, :0], trained.a[:0])


def sum_products(products: Sequence[Product], coefficients: Sequence[float] = ()) -> Product:
    """The sum of products, each times its coefficient (default 1), by concatenating columns."""
    coefficients = coefficients or [1.0] * len(products)
    b = [p.b * scale for p, scale in zip(products, coefficients, strict=True)]
    return Product(torch.cat(b, 1), torch.cat([p.a for p in products]))


def transpose(matrix: Product) -> Product:
    """(B A)^T = A^T B^T."""
    return Product(matrix.a.mT, matrix.b.mT)


def compute_svd(matrix: Product) -> Spectrum:
    """The SVD of a product, by QR of both factors and an SVD of the small matrix between them.

    The largest element of each left vector is positive, so signs do not depend on the library.
    """
    outer, inner = torch.linalg.qr(matrix.b), torch.linalg.qr(matrix.a.mT)
    left, values, right = torch.linalg.svd(outer.R @ inner.R.mT, full_matrices=False)
    left, right = outer.Q @ left, right @ inner.Q.mT
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return Spectrum(left * signs, values, right * signs.mT)


def truncate_svd(matrix: Product, rank: int, tolerance: float = 0.0) -> Product:
    """The closest product of a rank in the Frobenius norm, with singular values split evenly.

    Args:
        matrix: the product.
        rank: the maximum number of columns; a product of a lower rank gets fewer.
        tolerance: singular values up to this count as zero.
    """
    left, values, right = compute_svd(matrix)
    count = min(rank, int((values > tolerance).sum()))
    root = values[:count].sqrt()
    return Product(left[:, :count] * root, right[:count] * root[:, None])


def pad_rank(matrix: Product, rank: int) -> Product:
    """The same product, padded with zeros to a rank."""
    missing = rank - len(matrix.a)
    return Product(F.pad(matrix.b, (0, missing)), F.pad(matrix.a, (0, 0, 0, missing)))


def refill_rank(matrix: Product, before: Product) -> Product:
    """The same product at the rank of `before`, whose A supplies rows where B is zero.

    These are the largest orthogonal rows of the part of its A outside the span of the present rows,
    and zeros where the rank is above what A can have.
    """
    rows = torch.linalg.qr(matrix.a.mT).Q
    remainder = before.a - (before.a @ rows) @ rows.mT
    _, values, right = torch.linalg.svd(remainder, full_matrices=False)
    missing = len(before.a) - len(matrix.a)
    lent_rows = values[:missing, None] * right[:missing]
    rows = torch.cat([matrix.a, lent_rows])
    return pad_rank(Product(F.pad(matrix.b, (0, len(rows) - len(matrix.a))), rows), len(before.a))


def align_factors(matrix: Product, reference: Product) -> Product:
    """The same product, with factors rotated by one orthogonal matrix to be closest to a reference.

    Source: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    left, _, right = torch.linalg.svd(matrix.b.mT @ reference.b + matrix.a @ reference.a.mT)
    return Product(matrix.b @ left @ right, (left @ right).mT @ matrix.a)


def compact_columns(matrix: Product) -> Product:
    """The same product with as many columns as its smaller side, where that takes less memory."""
    out, in_ = len(matrix.b), matrix.a.shape[1]
    if QR_MIN_RATIO * len(matrix.a) <= min(out, in_):
        return matrix
    dense = matrix.b @ matrix.a
    identity = torch.eye(min(out, in_), dtype=dense.dtype)
    return Product(identity, dense) if out <= in_ else Product(dense, identity)


def norm(matrix: Product) -> float:
    """Frobenius norm, by QR, because sums of small Gram matrices lose half of the digits."""
    return float(torch.linalg.matrix_norm(_reduce_rows(matrix.b) @ _reduce_rows(matrix.a.mT).mT))


def _reduce_rows(factor: Float[Tensor, "side rank"]) -> Float[Tensor, "less rank"]:
    """A square factor with the same lengths and angles; a wide factor is unchanged."""
    side, rank = factor.shape
    return factor if side <= QR_MIN_RATIO * rank else torch.linalg.qr(factor, mode="r").R


def effective_rank(matrix: Product) -> float:
    """The exponential of the entropy of the normalized singular values; 0 for a zero product.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = compute_svd(matrix).values
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp()) if values.any() else 0.0
