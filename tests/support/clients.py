"""Clients of any method, on every kind of layer, and the model that their leaves make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgen_edge.adapters.lora import inject
from fedgen_edge.adapters.ranks import mask_rank
from fedgen_edge.algorithms import ifca
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Adapter, Method
from fedgen_edge.leaves import shapes
from fedgen_edge.seeds import generator
from fedgen_edge.types import CORE, RESIDUAL, Leaves, Order, ServerState, Update

RANK = 8
RANKS = (2, RANK, 4)
"""Of three clients, where a method takes them."""
STEPS = (3, 1, 4)
KINDS = [nn.Embedding(12, 10), nn.Conv2d(3, 10, 2), nn.Conv2d(12, 10, 1), Conv1D(10, 12),
         nn.Linear(12, 10)]  # fmt: skip
LORA = inject(
    nn.ModuleDict({"blocks": nn.ModuleList(KINDS)}),
    Adapter(rank=RANK, target_modules=tuple(f"blocks.{i}" for i in range(len(KINDS)))),
)


@dataclass(frozen=True)
class Case:
    """What a law may not depend on."""

    seed: int = 0
    """Of the server's adapter and of the three clients."""
    rounds: int = 0
    """Since the server began."""
    weights: tuple[float, ...] = (1.0, 5.0, 2.0)
    order: tuple[int, ...] = (1, 2, 0)
    which: int = 0
    """Of the clients, the one that the law is about."""
    scales: tuple[float, ...] = (-8.0, 0.25, 2.0)
    """What clients move from A to B: powers of two, so that nothing is rounded."""


def made(name: str) -> Algorithm:
    return METHODS[name].make(Method())


def random(like: Mapping[str, Sequence[int]], *key: object) -> Leaves:
    rng = generator("merging", *map(str, key))
    return {k: torch.randn(*shape, generator=rng) / 2 for k, shape in like.items()}


def rank(name: str, client: int) -> int | None:
    return RANKS[client] if METHODS[name].mixed_ranks else None


def end(name: str, state: ServerState, key: object, held: int | None) -> Leaves:
    """What a client ends with: the server's adapter at its rank, and moved where it trains."""
    algorithm = made(name)
    own = {
        k: v
        for k, v in random(shapes(state.adapter), key, state.round).items()
        if algorithm.trains(k, state.round, 0) and not k.startswith(RESIDUAL)
    }
    if algorithm.clusters:
        own = ifca.select_cluster(own, 0)
    return mask_rank({**state.adapter, **own}, held)


def update(name: str, state: ServerState, own: Leaves, client: int, held: int | None) -> Update:
    """What comes back of a client of a rank that ended with these leaves."""
    algorithm, start = made(name), mask_rank(state.adapter, held)
    delta = {k: v - start[k] for k, v in own.items() if algorithm.trains(k, state.round, 0)}
    if algorithm.clusters:
        delta = ifca.select_cluster(delta, 0)
    told = mask_rank(algorithm.make_broadcast(state, 5), held)
    behind = client if algorithm.buffer else 0
    order = Order((client,), state.round - behind, told, rank=held, strides={"": 0.1})
    return Update(
        order, algorithm.select_shared(delta, state.round), {}, 1.0, 0.0, STEPS[client], 0
    )


def cohort(name: str, state: ServerState, case: Case) -> list[Update]:
    found = []
    for i, weight in enumerate(case.weights):
        held = rank(name, i)
        own = end(name, state, (case.seed, i), held)
        found.append(replace(update(name, state, own, i, held), weight=weight))
    return found


@cache
def begun(name: str, seed: int, rounds: int) -> ServerState:
    """A server that remembers some rounds."""
    state = made(name).init(random({**LORA.shapes(), "norm.bias": (7,)}, seed))
    for _ in range(rounds):
        state = made(name).step(state, cohort(name, state, Case(seed)))
    return state


def trained(name: str, case: Case) -> ServerState:
    """A server whose clients train in the next round, and survey nothing."""
    return begun(name, case.seed, 2 + case.rounds % 2)


def seen(adapter: Leaves) -> Leaves:
    """What a model computes with: every layer's update of its weight, and leaves that are no pair.

    Where something stands between two bases, also what they span.
    """
    adapter = ifca.split_clusters(adapter).get(0, adapter)
    rest, found = {k: v.double() for k, v in adapter.items()}, {}
    for layer, site in LORA.layers.items():
        pair = LORA.pair(layer, rest)
        if pair is None:
            continue
        found[layer] = site.kind.dense(*pair)
        if f"{layer}.{CORE}" in rest:
            a, b = (rest[f"{layer}.{k}"].flatten(1) for k in (site.kind.a, site.kind.b))
            found |= {f"{layer} in": a.mT @ a, f"{layer} out": b @ b.mT}
        rest = {k: v for k, v in rest.items() if f"{layer}." not in k}
    return found | rest


def gap(found: Leaves, expected: Leaves) -> float:
    """The largest distance of a tensor, as a share of its size."""
    assert found.keys() == expected.keys()
    return max(
        float((found[k] - v).norm() / (v.norm() if v.any() else 1.0)) for k, v in expected.items()
    )


def after(name: str, state: ServerState, updates: Sequence[Update]) -> Leaves:
    return made(name).step(state, updates).adapter
