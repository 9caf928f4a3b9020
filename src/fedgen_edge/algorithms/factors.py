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

WIDE = 2
"""A side of fewer times as many values as there are columns: QR costs more there than the product,
and two factors have as many values."""


class Pair(NamedTuple):
    """The names of two factors of one product."""

    a: str
    b: str

    @property
    def layer(self) -> str:
        """Whose product it is; a moving average counts as a layer of its own."""
        return self.a.rpartition(".")[0]

    @property
    def residual(self) -> "Pair":
        """The frozen pair beside it."""
        return Pair(RESIDUAL + self.a, RESIDUAL + self.b)

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


def pairs(names: Iterable[str]) -> list[Pair]:
    """The pairs of which both names are there."""
    there = dict.fromkeys(names)
    found = [
        Pair(name, name.removesuffix(a) + b)
        for name in there
        for a, b in PAIRS
        if name.endswith(f".{a}")
    ]
    return [pair for pair in found if pair.b in there]


def product(adapter: Leaves, pair: Pair) -> Product:
    """A pair's product."""
    return Product(adapter[pair.b].double().flatten(1), adapter[pair.a].double().flatten(1))


def residual(adapter: Leaves, pair: Pair) -> Product:
    """What is frozen beside a pair; of rank 0 where nothing is."""
    if pair.residual.a in adapter:
        return product(adapter, pair.residual)
    own = product(adapter, pair)
    return Product(own.b[:, :0], own.a[:0])


def total(products: Sequence[Product], factors: Sequence[float] = ()) -> Product:
    """The sum of the products, each times its factor (none: 1): their columns side by side."""
    scales = factors or [1.0] * len(products)
    b = [p.b * scale for p, scale in zip(products, scales, strict=True)]
    return Product(torch.cat(b, 1), torch.cat([p.a for p in products]))


def transposed(whole: Product) -> Product:
    """(B A)^T = A^T B^T."""
    return Product(whole.a.mT, whole.b.mT)


def spectrum(whole: Product) -> Spectrum:
    """By QR of both factors and the SVD of what is between them.

    The largest element of each left vector is positive, so that signs do not hang on the library.
    """
    outer, inner = torch.linalg.qr(whole.b), torch.linalg.qr(whole.a.mT)
    left, values, right = torch.linalg.svd(outer.R @ inner.R.mT, full_matrices=False)
    left, right = outer.Q @ left, right @ inner.Q.mT
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return Spectrum(left * signs, values, right * signs.mT)


def closest(whole: Product, rank: int, least: float = 0.0) -> Product:
    """The closest product of a rank in the Frobenius norm, each singular value split evenly.

    Args:
        whole: the product.
        rank: the most columns; there are fewer where the product needs no more.
        least: singular values up to this are taken for zero.
    """
    left, values, right = spectrum(whole)
    count = min(rank, int((values > least).sum()))
    root = values[:count].sqrt()
    return Product(left[:, :count] * root, right[:count] * root[:, None])


def padded(whole: Product, rank: int) -> Product:
    """The same product with zeros up to a rank."""
    more = rank - len(whole.a)
    return Product(F.pad(whole.b, (0, more)), F.pad(whole.a, (0, 0, 0, more)))


def refilled(whole: Product, before: Product) -> Product:
    """The same product at the rank of another, whose A lends rows where B is zero.

    They are the largest orthogonal ones of what is left of its A outside of the rows that are here,
    and zeros where the rank is above what A can have.
    """
    rows = torch.linalg.qr(whole.a.mT).Q
    rest = before.a - (before.a @ rows) @ rows.mT
    _, values, right = torch.linalg.svd(rest, full_matrices=False)
    more = len(before.a) - len(whole.a)
    lent = values[:more, None] * right[:more]
    rows = torch.cat([whole.a, lent])
    return padded(Product(F.pad(whole.b, (0, len(rows) - len(whole.a))), rows), len(before.a))


def turned(whole: Product, towards: Product) -> Product:
    """The same product, its factors turned by one orthogonal matrix to be closest to another's.

    Source: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    left, _, right = torch.linalg.svd(whole.b.mT @ towards.b + whole.a @ towards.a.mT)
    return Product(whole.b @ left @ right, (left @ right).mT @ whole.a)


def narrowed(whole: Product) -> Product:
    """The same product with one side's columns where that is the smaller way to hold it."""
    out, in_ = len(whole.b), whole.a.shape[1]
    if WIDE * len(whole.a) <= min(out, in_):
        return whole
    dense = whole.b @ whole.a
    one = torch.eye(min(out, in_), dtype=dense.dtype)
    return Product(one, dense) if out <= in_ else Product(dense, one)


def norm(whole: Product) -> float:
    """Frobenius norm; by QR, as sums of small Gram matrices lose half of the digits."""
    return float(torch.linalg.matrix_norm(_turned(whole.b) @ _turned(whole.a.mT).mT))


def _turned(factor: Float[Tensor, "side rank"]) -> Float[Tensor, "less rank"]:
    """The same lengths and angles in as many rows as columns; a factor that is wide as it is."""
    side, rank = factor.shape
    return factor if side <= WIDE * rank else torch.linalg.qr(factor, mode="r").R


def effective_rank(whole: Product) -> float:
    """The exponential of the entropy of its singular values as shares; 0 of a product of zero.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = spectrum(whole).values
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp()) if values.any() else 0.0
