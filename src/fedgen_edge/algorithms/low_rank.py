"""Algebra of low-rank products B A on their factors: the product itself, m x n, is never formed.

Factors are float64 here, and matrices: a convolution's are flattened. QR and SVD of a product
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
"""A side of fewer times as many values as there are columns: QR costs more there than the product,
and two factors have as many values."""


class FactorNames(NamedTuple):
    """The names of two factors of one product."""

    a: str
    b: str

    @property
    def layer(self) -> str:
        """Whose product it is; a moving average counts as a layer of its own."""
        return self.a.rpartition(".")[0]

    @property
    def residual(self) -> "FactorNames":
        """The frozen pair beside it."""
        return FactorNames(RESIDUAL + self.a, RESIDUAL + self.b)

    @property
    def core(self) -> str:
        """What stands between them, where anything does."""
        return f"{self.layer}.{CORE}"


class Product(NamedTuple):
    """B A, as its factors."""

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in_"]


class Spectrum(NamedTuple):
    """A product's singular value decomposition, the largest first."""

    left: Float[Tensor, "out rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank in_"]


def find_pairs(names: Iterable[str]) -> list[FactorNames]:
    """The pairs of which both names are there."""
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
    """What is frozen beside a pair; of rank 0 where nothing is."""
    if pair.residual.a in adapter:
        return get_product(adapter, pair.residual)
    trained = get_product(adapter, pair)
    return Product(trained.b[:, :0], trained.a[:0])


def sum_products(products: Sequence[Product], coefficients: Sequence[float] = ()) -> Product:
    """The sum of the products, each times its factor (none: 1): their columns side by side."""
    coefficients = coefficients or [1.0] * len(products)
    b = [p.b * scale for p, scale in zip(products, coefficients, strict=True)]
    return Product(torch.cat(b, 1), torch.cat([p.a for p in products]))


def transpose(matrix: Product) -> Product:
    """(B A)^T = A^T B^T."""
    return Product(matrix.a.mT, matrix.b.mT)


def compute_svd(matrix: Product) -> Spectrum:
    """By QR of both factors and the SVD of what is between them.

    The largest element of each left vector is positive, so that signs do not hang on the library.
    """
    outer, inner = torch.linalg.qr(matrix.b), torch.linalg.qr(matrix.a.mT)
    left, values, right = torch.linalg.svd(outer.R @ inner.R.mT, full_matrices=False)
    left, right = outer.Q @ left, right @ inner.Q.mT
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return Spectrum(left * signs, values, right * signs.mT)


def truncate_svd(matrix: Product, rank: int, tolerance: float = 0.0) -> Product:
    """The closest product of a rank in the Frobenius norm, each singular value split evenly.

    Args:
        matrix: the product.
        rank: the most columns; there are fewer where the product needs no more.
        tolerance: singular values up to this are taken for zero.
    """
    left, values, right = compute_svd(matrix)
    count = min(rank, int((values > tolerance).sum()))
    root = values[:count].sqrt()
    return Product(left[:, :count] * root, right[:count] * root[:, None])


def pad_rank(matrix: Product, rank: int) -> Product:
    """The same product with zeros up to a rank."""
    missing = rank - len(matrix.a)
    return Product(F.pad(matrix.b, (0, missing)), F.pad(matrix.a, (0, 0, 0, missing)))


def refill_rank(matrix: Product, before: Product) -> Product:
    """The same product at the rank of another, whose A lends rows where B is zero.

    They are the largest orthogonal ones of what is left of its A outside of the rows that are here,
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
    """The same product, its factors turned by one orthogonal matrix to be closest to another's.

    Source: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    left, _, right = torch.linalg.svd(matrix.b.mT @ reference.b + matrix.a @ reference.a.mT)
    return Product(matrix.b @ left @ right, (left @ right).mT @ matrix.a)


def compact_columns(matrix: Product) -> Product:
    """The same product with one side's columns where that is the smaller way to hold it."""
    out, in_ = len(matrix.b), matrix.a.shape[1]
    if QR_MIN_RATIO * len(matrix.a) <= min(out, in_):
        return matrix
    dense = matrix.b @ matrix.a
    identity = torch.eye(min(out, in_), dtype=dense.dtype)
    return Product(identity, dense) if out <= in_ else Product(dense, identity)


def norm(matrix: Product) -> float:
    """Frobenius norm; by QR, as sums of small Gram matrices lose half of the digits."""
    return float(torch.linalg.matrix_norm(_reduce_rows(matrix.b) @ _reduce_rows(matrix.a.mT).mT))


def _reduce_rows(factor: Float[Tensor, "side rank"]) -> Float[Tensor, "less rank"]:
    """The same lengths and angles in as many rows as columns; a factor that is wide as it is."""
    side, rank = factor.shape
    return factor if side <= QR_MIN_RATIO * rank else torch.linalg.qr(factor, mode="r").R


def effective_rank(matrix: Product) -> float:
    """The exponential of the entropy of its singular values as shares; 0 of a product of zero.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = compute_svd(matrix).values
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp()) if values.any() else 0.0
