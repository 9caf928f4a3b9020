"""Cohorts of adapters of every kind of layer, and what they come to as dense matrices."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fedgen_edge.adapters.lora import KINDS
from fedgen_edge.algorithms import merge, merge_products
from fedgen_edge.algorithms.low_rank import FactorNames, get_product
from fedgen_edge.leaves import add, subtract
from fedgen_edge.seeds import generator
from fedgen_edge.types import AVERAGE, RESIDUAL, Leaves, Order, Update

Rule = Callable[[Leaves, Sequence[Update]], Leaves]
RULES: dict[str, Rule] = {
    "mean": merge.weighted_average,
    "flexlora": merge_products.flexlora,
    "refined": merge_products.lora_fair(0.1),
    "fedex_lora": merge_products.fedex_lora(99),
    "flora": merge_products.flora(99),
}
EXACT = ("fedex_lora", "flora")
LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (nn.Linear, (2, 9), (7, 2)),
    "pointwise": (nn.Conv2d, (2, 9, 1, 1), (7, 2, 1, 1)),
    "convolution": (nn.Conv2d, (2, 4, 3, 3), (7, 2, 1, 1)),
    "embedding": (nn.Embedding, (2, 9), (7, 2)),
}
LINEAR = FactorNames("linear.lora_A", "linear.lora_B")
every_rule = pytest.mark.parametrize("name", RULES)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def names(layer: str) -> FactorNames:
    kind = KINDS[LAYERS[layer.removeprefix(AVERAGE)][0]]
    return FactorNames(f"{layer}.{kind.a}", f"{layer}.{kind.b}")


def drawn(seed: object, layers: Sequence[str] = tuple(LAYERS), rank: int | None = None) -> Leaves:
    """Random factors of some layers."""
    rng, found = generator("adapter", str(seed)), {}
    for layer in layers:
        _, a, b = LAYERS[layer]
        if rank:
            a, b = (rank, *a[1:]), (b[0], rank, *b[2:])
        pair = names(layer)
        found |= {pair.a: torch.randn(a, generator=rng), pair.b: torch.randn(b, generator=rng)}
    return found


def untrained(seed: object, layers: Sequence[str] = tuple(LAYERS)) -> Leaves:
    """Fresh factors: their product is zero."""
    zero = [names(k).a if k == "embedding" else names(k).b for k in layers]
    return {k: v * (k not in zero) for k, v in drawn(seed, layers).items()}


def cohort(received: Leaves, own: Sequence[Leaves], weights: Sequence[float]) -> list[Update]:
    """What comes back of clients that ended with these factors."""
    return [
        Update(Order((i,), 0, received), subtract(end, received), {}, float(w), 0.0, 1, 0)
        for i, (end, w) in enumerate(zip(own, weights, strict=True))
    ]


def cohort_of(seed: object, clients: int, received: Leaves | None = None) -> list[Update]:
    """Random clients of different weights, and a residual that is not zero."""
    if received is None:
        beside = {RESIDUAL + k: v for k, v in drawn(f"{seed} beside", rank=7).items()}
        received = {**drawn(seed), **beside}
    own = [drawn(f"{seed} {i}") for i in range(clients)]
    return cohort(received, own, [1.0, 5.0, 2.0, 4.0][:clients])


def dense(adapter: Leaves, layer: str) -> Tensor:
    """The whole update of a layer's weight, with its residual, as the model computes it."""
    kind, found = KINDS[LAYERS[layer.removeprefix(AVERAGE)][0]], torch.zeros(())
    for pair in (names(layer), names(layer).residual):
        if pair.a in adapter:
            found = found + kind.dense(adapter[pair.a].double(), adapter[pair.b].double())
    return found


def ideal(updates: Sequence[Update], layer: str) -> Tensor:
    """The mean of the products that clients computed with."""
    total = sum(weights(updates))
    ends = [dense(add(u.order.received, u.delta), layer) * u.weight / total for u in updates]
    return torch.stack(ends).sum(0)


def changed(rule: Rule, updates: Sequence[Update]) -> Leaves:
    """The change of a server's adapter that all clients received as it is."""
    return rule(updates[0].order.received, updates)


def after(name: str, updates: Sequence[Update]) -> Leaves:
    """The global adapter after a rule."""
    return add(updates[0].order.received, changed(RULES[name], updates))


def close(left: Tensor, right: Tensor, relative: float = 1e-6) -> bool:
    return float((left - right).norm()) <= relative * float(right.norm())


def averaged(adapter: Leaves, slow: Leaves) -> Leaves:
    """An adapter and another one as its moving average."""
    return {**adapter, **{AVERAGE + k: v for k, v in slow.items()}}


def matrix(adapter: Leaves, pair: FactorNames) -> Tensor:
    """A pair's product."""
    return get_product(adapter, pair).b @ get_product(adapter, pair).a


def weights(updates: Sequence[Update]) -> list[float]:
    return [u.weight for u in updates]
