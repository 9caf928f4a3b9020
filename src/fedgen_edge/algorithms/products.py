"""Slots that merge layers by their products B A: a product of means is not the mean of products.

Both factors of a layer are merged together. Other leaves, and factors whose partner is not sent,
are averaged as `merge.mean` does. A residual's change is to be added as it is: a server's optimiser
has no use for it. Arithmetic is float64. Costs are for one layer of m x n,
K clients and rank r; where they say R, it is O((m + n) R^2 + R^3).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fedgen_edge import leaves
from fedgen_edge.algorithms import factors
from fedgen_edge.algorithms.factors import Pair, Product, pairs, product
from fedgen_edge.algorithms.merge import mean
from fedgen_edge.types import AVERAGE, RESIDUAL, Leaves, Update

NOISE = torch.finfo(torch.float32).eps
"""Singular values below this share of the clients' products are the rounding of float32 factors."""

Rule = Callable[[Pair, Leaves, Sequence[Product], Sequence[float]], Leaves]
"""One layer's change, from its names, the server's adapter, the clients' factors and shares."""


def by_svd(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The best product of the adapter's rank for the mean of the clients' products.

    Each singular value is split evenly between B and A, so that both see gradients of one size; the
    largest element of each column of B is positive.

    Where the mean has fewer ranks than the adapter, B and A would both be zero in the others, and
    so would both their gradients from then on. There the factor that is drawn at the start (A; of
    an embedding B) keeps what the clients received, as far as the ranks in use do not have it, and
    its partner is zero, as at the start of training. So the drawn factor never loses rank.

    A moving average's factors are turned towards those that it follows, as clients mix the two
    factor by factor; a turn of both leaves their product as it is.

    Cost: R = K r.

    Raises:
        ValueError: no client has a positive weight.

    Source: Bai et al. 2024, FlexLoRA (arXiv:2402.11505).
    Differs: singular values are split, not all in B; by QR of the factors, where theirs decomposes
    the dense product. A client of a lower rank receives the first columns, as there: the largest.
    """
    change = _by_layer(adapter, updates, _closest)
    for pair in pairs(updates[0].delta):
        led = Pair(*(name.removeprefix(AVERAGE) for name in pair))
        if led != pair and {*led} <= change.keys():
            after = leaves.add(adapter, change)
            turned = factors.turned(product(after, pair), product(after, led))
            change |= _change(pair, turned, adapter)
    return change


def _closest(
    pair: Pair, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
) -> Leaves:
    before, whole = product(adapter, pair), factors.total(clients, shares)
    largest = max(factors.norm(c) * w for c, w in zip(clients, shares, strict=True))
    found = factors.closest(whole, len(before.a), NOISE * largest)
    if pair.b.endswith("lora_embedding_B"):
        turned = factors.refilled(factors.transposed(found), factors.transposed(before))
        return _change(pair, factors.transposed(turned), adapter)
    return _change(pair, factors.refilled(found, before), adapter)


def refined(ridge: float) -> Callable[[Leaves, Sequence[Update]], Leaves]:
    """The means of A and of B, and B corrected for what their product misses.

    The correction D has the least |ideal - (B + D) A|^2 + ridge |D|^2 in Frobenius norms, where
    the ideal is the mean of the clients' products. It is E A^T (A A^T + ridge I)^-1, where
    E = sum of p_k (B_k - B) (A_k - A) is what is missed: r equations are solved, for m rows.

    Cost: O(K (m + n) r^2).

    Args:
        ridge: above 0, in the units of A A^T, so without alpha / rank.

    Raises:
        ValueError: no client has a positive weight; or the ridge is not above 0.

    Source: Bian et al. 2024, LoRA-FAIR (arXiv:2411.14961).
    Differs: the closed solution for the Frobenius norm, where theirs iterates on a measure of
    similarity.
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be above 0")

    def rule(
        pair: Pair, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
    ) -> Leaves:
        middle = _mean(clients, shares)
        missed = _missed(clients, middle, shares)
        gram = middle.a @ middle.a.mT + ridge * torch.eye(len(middle.a), dtype=torch.float64)
        seen = missed.b @ (missed.a @ middle.a.mT)
        more = torch.linalg.solve(gram, seen, left=False)
        return _change(pair, Product(middle.b + more, middle.a), adapter)

    return lambda adapter, updates: _by_layer(adapter, updates, rule)


def with_residual(cap: int) -> Callable[[Leaves, Sequence[Update]], Leaves]:
    """The means of A and of B, and what their product misses in a frozen pair beside them.

    That is the sum of p_k (B_k - B) (A_k - A), of rank (K - 1) r at most. It joins the residual of
    the rounds before, and the sum is cut to the closest product of rank `cap`. So a layer is exact
    while `cap` is at least the smaller of its sides, or (K - 1) r times the rounds.

    Cost: R = K r + cap. Clients receive a pair of rank `cap` more, and send no more.

    Args:
        cap: rank of the residual, whose leaves the adapter has: see `residuals`.

    Raises:
        ValueError: no client has a positive weight; or the residual has another rank.
        KeyError: the adapter has no residual.

    Source: Singhal et al. 2024, FedEx-LoRA (arXiv:2410.09432).
    Differs: theirs goes into the backbone, whole or cut in each round; here the backbone stays as
    it is, and the residual of all rounds is cut as one. `adapter.dropout` reaches it too.
    """

    def rule(
        pair: Pair, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
    ) -> Leaves:
        middle = _mean(clients, shares)
        kept = [product(adapter, pair.residual), _missed(clients, middle, shares)]
        return {
            **_change(pair, middle, adapter),
            **_kept(pair.residual, factors.total(kept), cap, adapter),
        }

    return lambda adapter, updates: _beside(adapter, updates, rule)


def stacked(cap: int) -> Callable[[Leaves, Sequence[Update]], Leaves]:
    """The mean of products joins a frozen pair, and the trained pair stays as it was.

    The frozen one is cut to the closest product of rank `cap`: exact while `cap` is at least the
    smaller of a layer's sides, or K r times the rounds. A trained pair begins with a product of
    zero; should it have another, that is taken off what joins.

    Cost: R = (K + 1) r + cap. Clients receive a pair of rank `cap` more, and send no more.

    Args:
        cap: rank of the residual, whose leaves the adapter has: see `residuals`.

    Raises:
        ValueError: no client has a positive weight; or the residual has another rank.
        KeyError: the adapter has no residual.

    Source: Wang et al. 2024, FLoRA (arXiv:2409.05976).
    Differs: A is not drawn anew in each round; the clients' factors side by side are neither sent
    nor added to the backbone, but cut to a pair of bounded rank.
    """

    def rule(
        pair: Pair, adapter: Leaves, clients: Sequence[Product], shares: Sequence[float]
    ) -> Leaves:
        start = product(adapter, pair)
        parts = [product(adapter, pair.residual), *clients, start]
        joined = factors.total(parts, [1.0, *shares, -1.0])
        return {
            **_change(pair, start, adapter),
            **_kept(pair.residual, joined, cap, adapter),
        }

    return lambda adapter, updates: _beside(adapter, updates, rule)


def residuals(adapter: Leaves, cap: int) -> Leaves:
    """An adapter's residual pairs before the first round: zero.

    Args:
        adapter: its trained leaves.
        cap: their rank, or the smaller side of a layer where that is less.
    """
    found: Leaves = {}
    for pair in pairs(adapter):
        a, b = adapter[pair.a], adapter[pair.b]
        rank = _rank(product(adapter, pair), cap)
        found[pair.residual.a] = a.new_zeros(rank, *a.shape[1:])
        found[pair.residual.b] = b.new_zeros(len(b), rank, *b.shape[2:])
    return found


def _by_layer(adapter: Leaves, updates: Sequence[Update], rule: Rule) -> Leaves:
    """The plain mean, with the rule's own change of each pair."""
    change, shares = mean(adapter, updates), _shares(updates)
    for pair in pairs(updates[0].delta):
        change |= rule(pair, adapter, _clients(updates, pair), shares)
    return change


def _beside(adapter: Leaves, updates: Sequence[Update], rule: Rule) -> Leaves:
    """The same, and the frozen pair of a moving average is that of what it follows: no lag."""
    change = _by_layer(adapter, updates, rule)
    for pair in pairs(updates[0].delta):
        if pair.a.startswith(AVERAGE):
            led = (RESIDUAL + name.removeprefix(AVERAGE) for name in pair)
            change |= zip(pair.residual, map(change.__getitem__, led), strict=True)
    return change


def _shares(updates: Sequence[Update]) -> list[float]:
    total = sum(u.weight for u in updates)
    if total <= 0:
        raise ValueError("a mean needs at least one member with a positive weight")
    return [u.weight / total for u in updates]


def _clients(updates: Sequence[Update], pair: Pair) -> list[Product]:
    """Each client's own factors: what it received, and its change."""
    starts = [product(u.order.received, pair) for u in updates]
    moved = [product(u.delta, pair) for u in updates]
    return [Product(s.b + m.b, s.a + m.a) for s, m in zip(starts, moved, strict=True)]


def _mean(clients: Sequence[Product], shares: Sequence[float]) -> Product:
    """Each factor's own mean."""
    members = [c._asdict() for c in clients]
    return Product(**leaves.mean(members, torch.tensor(shares, dtype=torch.float64)))


def _missed(clients: Sequence[Product], middle: Product, shares: Sequence[float]) -> Product:
    """The mean of products less the product of means: the covariance of B and A over clients."""
    return factors.total([Product(c.b - middle.b, c.a - middle.a) for c in clients], shares)


def _rank(whole: Product, cap: int) -> int:
    """Of a residual: no product has more than its smaller side."""
    return min(cap, len(whole.b), whole.a.shape[1])


def _kept(pair: Pair, whole: Product, cap: int, adapter: Leaves) -> Leaves:
    """The change of a residual to the closest product of its rank."""
    rank = _rank(whole, cap)
    if len(adapter[pair.a]) != rank:
        raise ValueError(f"{pair.a} has rank {len(adapter[pair.a])}, and not {rank}")
    return _change(pair, factors.padded(factors.closest(whole, rank), rank), adapter)


def _change(pair: Pair, now: Product, adapter: Leaves) -> Leaves:
    """What makes the adapter's factors these, in their own shapes."""
    named = {pair.a: now.a, pair.b: now.b}
    old = {name: adapter[name] for name in named}
    return {k: (named[k].reshape(v.shape) - v.double()).float() for k, v in old.items()}


class Size(NamedTuple):
    """How large one layer's product and factors are."""

    rank: float
    """Effective rank of the product with its residual."""
    a: float
    b: float
    """Frobenius norms of A and B, without the residual's."""


def sizes(adapter: Leaves) -> dict[str, Size]:
    """Every layer's, by its name. Cost: R = r + cap."""
    found = {}
    for pair in pairs(k for k in adapter if not k.startswith(RESIDUAL)):
        a, b = (float(torch.linalg.vector_norm(adapter[k].double())) for k in pair)
        found[pair.layer] = Size(factors.effective_rank(_whole(adapter, pair)), a, b)
    return found


def errors(updates: Sequence[Update], after: Leaves) -> dict[str, float]:
    """How far each layer's new product is from the ideal one, as a share of it, by any rule.

    Ideal is the weighted mean of what the clients computed with: their product, and the residual
    that they received. New is the server's adapter after the round, in float32, so 1e-7 is none.
    Norms are Frobenius; where the ideal is zero it is the new one's norm.

    Cost: R = (K + 1) r and both residuals' ranks.

    Raises:
        ValueError: no client has a positive weight.
    """
    shares, found = _shares(updates), {}
    for pair in pairs(updates[0].delta):
        sent = factors.total(_clients(updates, pair), shares)
        ideal = factors.narrowed(factors.total([sent, _beside_them(updates, pair, shares)]))
        off = factors.norm(factors.total([_whole(after, pair), ideal], [1.0, -1.0]))
        size = factors.norm(ideal)
        found[pair.layer] = off / (size or 1.0)
    return found


def _beside_them(updates: Sequence[Update], pair: Pair, shares: Sequence[float]) -> Product:
    """The mean of the residuals that the clients received; most often it is one for all."""
    received = {id(u.order.received): u.order.received for u in updates}
    held = dict.fromkeys(received, 0.0)
    for update, share in zip(updates, shares, strict=True):
        held[id(update.order.received)] += share
    own = [factors.residual(one, pair) for one in received.values()]
    return factors.total(own, list(held.values()))


def _whole(adapter: Leaves, pair: Pair) -> Product:
    """A pair's product, with what stands between its factors, and its residual."""
    own = product(adapter, pair)
    if pair.core in adapter:
        own = own._replace(b=own.b @ adapter[pair.core].double())
    return factors.total([own, factors.residual(adapter, pair)])
