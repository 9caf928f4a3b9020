"""The LoRA layer: one adapter, or a stack of them over one shared, frozen layer.

A layer's update is `scale * B A` (Hu et al. 2021, arXiv:2106.09685), applied here and nowhere
else. Stacked leaves have a first axis of clients: the input's rows are `clients * batch`, client
by client, and each client's rows meet that client's own factors.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from fedgen_edge.adapters.dropout import mask
from fedgen_edge.adapters.layers import KINDS, Kind, Shape, kind_of
from fedgen_edge.adapters.targets import ALL, adaptable, choose_layers, share_of_experts
from fedgen_edge.config import Adapter
from fedgen_edge.errors import ConfigError
from fedgen_edge.types import CORE, RESIDUAL, Leaves


class Site(nn.Module):
    """A frozen layer, and the factors that are bound to it at present (none: as it was)."""

    def __init__(self, base: nn.Module, kind: Kind, number: int, dropout: float) -> None:
        super().__init__()
        self.base, self.kind, self.number, self.dropout = base, kind, number, dropout
        self.factors: tuple[Tensor, Tensor] | None = None
        self.seed: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at it."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, plus the update's."""
        y = self.base(x)
        if self.factors is None:
            return y
        a, b = (factor.to(y.dtype) for factor in self.factors)
        if self.seed is not None and self.dropout and x.is_floating_point():
            x = x * self._mask(x).to(x.dtype)
        return y + self.kind.product(self.base, x, a, b)

    def _mask(self, x: Tensor) -> Tensor:
        assert self.seed is not None
        own = (x.shape[0] // max(1, self.seed.numel()), *x.shape[1:])
        return mask(self.seed, self.number, own, self.dropout).reshape(x.shape)


@dataclass(frozen=True)
class Lora:
    """Every adapted layer of one model."""

    sites: dict[str, Site]
    rank: int
    scale: float
    """alpha / rank, or alpha / sqrt(rank)."""
    targets: tuple[str, ...]
    """The layers, as PEFT's configuration lists them."""
    experts: float = 0.0
    """Share of the model's weights in routed experts, where all-linear leaves them frozen."""

    def shapes(self) -> dict[str, Shape]:
        """The shape of every leaf of one adapter."""
        found = {}
        for name, site in self.sites.items():
            a, b = site.kind.shapes(site.base, self.rank)
            found |= {f"{name}.{site.kind.a}": a, f"{name}.{site.kind.b}": b}
        return found

    def init(self, rng: Generator) -> Leaves:
        """A fresh adapter whose update is zero: A uniform as PEFT draws it, B zero.

        Of an embedding it is the other way round: A zero, B normal.
        """
        return {name: _fresh(name, shape, rng) for name, shape in self.shapes().items()}

    @contextmanager
    def bound(self, leaves: Leaves, seed: Tensor | None = None) -> Iterator[None]:
        """Within it, the model computes with these leaves; a site without leaves is as it was.

        Args:
            leaves: one adapter, or a stack.
            seed: of the dropout, one a client; none is without dropout.
        """
        try:
            for name, site in self.sites.items():
                site.factors, site.seed = self.factors(name, leaves), seed
            yield
        finally:
            for site in self.sites.values():
                site.factors = site.seed = None

    def factors(self, name: str, leaves: Leaves) -> tuple[Tensor, Tensor] | None:
        """A and scaled B of one site."""
        pair = self.pair(name, leaves)
        return pair and (pair[0], pair[1] * self.scale)

    def pair(self, name: str, leaves: Leaves) -> tuple[Tensor, Tensor] | None:
        """A and B of one site, each with the frozen factor beside it: of a higher rank then.

        What stands between them is multiplied into B; no frozen pair has it.
        """
        kind = self.sites[name].kind
        names = f"{name}.{kind.a}", f"{name}.{kind.b}"
        if not leaves.keys() >= {*names}:
            return None
        a, b = (leaves[own] for own in names)
        if (core := f"{name}.{CORE}") in leaves:
            b = (b.flatten(kind.ranks[1]) @ leaves[core]).reshape(b.shape)
        a, b = (
            torch.cat([factor, leaves[RESIDUAL + own]], axis)
            if RESIDUAL + own in leaves
            else factor
            for factor, own, axis in zip((a, b), names, kind.ranks, strict=True)
        )
        return a, b

    def widened(self, leaves: Leaves) -> tuple[Leaves, int]:
        """One adapter without frozen pairs, of the same products, and its rank.

        Layers of which less is frozen are filled with zeros, as all have one rank.
        """
        pairs = {n: pair for n in self.sites if (pair := self.pair(n, leaves)) is not None}
        rank = max((len(a) for a, _ in pairs.values()), default=self.rank)
        found = {}
        for name, factors in pairs.items():
            kind = self.sites[name].kind
            for leaf, factor, axis in zip((kind.a, kind.b), factors, kind.ranks, strict=True):
                found[f"{name}.{leaf}"] = _filled(factor, axis, rank)
        return found, rank

    def narrowed(self, leaves: Leaves) -> Leaves:
        """What `widened` has made, with what is frozen apart again."""
        found = {}
        for name, site in self.sites.items():
            kind = site.kind
            for leaf, axis in zip((kind.a, kind.b), kind.ranks, strict=True):
                whole = leaves[own := f"{name}.{leaf}"]
                found[own] = whole.narrow(axis, 0, self.rank)
                more = whole.shape[axis] - self.rank
                found[RESIDUAL + own] = whole.narrow(axis, self.rank, more)
        return found

    def call(self, module: nn.Module, leaves: Leaves, batch: object, seed: Tensor | None) -> Tensor:
        """The module's output on the batch, computed with these leaves."""
        with self.bound(leaves, seed):
            return module(batch)


def _filled(factor: Tensor, axis: int, rank: int) -> Tensor:
    shape = [*factor.shape]
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _fresh(name: str, shape: Shape, rng: Generator) -> Float[Tensor, "..."]:
    if name.endswith("lora_A"):
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return torch.empty(shape).uniform_(-bound, bound, generator=rng)
    if name.endswith("lora_embedding_B"):
        return torch.empty(shape).normal_(generator=rng)
    return torch.zeros(shape)


def inject(model: nn.Module, settings: Adapter, default: Sequence[str] = ()) -> Lora:
    """Wrap the layers that the settings name, in place; their weights are neither copied nor moved.

    All have one rank, as in PEFT; a layer of a smaller side, as a table of ten classes, has more
    factors than its update has need of.

    Args:
        model: frozen here.
        settings: of the adapter.
        default: the targets where the settings name none.

    Raises:
        ConfigError: no layer matches, one cannot be adapted, or the rank is above all their sides.
    """
    model.requires_grad_(False)
    targets = settings.target_modules or tuple(default)
    named = {n: m for n, m in model.named_modules() if n}
    chosen = choose_layers(model, named, targets, strict=bool(settings.target_modules))
    sites = {n: _site(n, named, i, settings) for i, n in enumerate(chosen)}
    limit = max(map(_most, sites.values()))
    if settings.rank > limit:
        raise ConfigError(
            f"adapter.rank={settings.rank} is above {limit}, the smaller side of every layer that "
            f"adapter.target_modules names: take at most {limit}, or name larger ones"
        )
    short = {name.rsplit(".", 1)[-1] for name in chosen}
    exact = {n for n in named if n.rsplit(".", 1)[-1] in short} == set(chosen)
    for name, site in sites.items():
        model.set_submodule(name, site)
    root = math.sqrt(settings.rank) if settings.rslora else settings.rank
    layers = tuple(sorted(short) if exact else chosen)
    experts = share_of_experts(model) if list(targets) == [ALL] else 0.0
    return Lora(sites, settings.rank, settings.alpha / root, layers, experts)


def _site(name: str, named: Mapping[str, nn.Module], number: int, settings: Adapter) -> Site:
    layer = named[name]
    kind = kind_of(layer)
    if kind is None:
        raise ConfigError(
            f"adapter.target_modules: {name} is a {type(layer).__name__}, which cannot be adapted: "
            f"of type {', '.join(k.__name__ for k in KINDS)} are {adaptable(named)}"
        )
    return Site(layer, kind, number, settings.dropout)


def _most(site: Site) -> int:
    """The highest rank that an update of this layer can have: its smaller side."""
    a, b = site.kind.shapes(site.base, 1)
    return min(math.prod(a[1:]), b[0])


def merge(model: nn.Module, lora: Lora, leaves: Leaves) -> None:
    """Add the updates to the weights and take the sites out again: a plain model, in place."""
    for name, site in lora.sites.items():
        factors = lora.factors(name, leaves)
        if factors is not None:
            weight = site.weight
            update = site.kind.dense(*(f.to(weight.device, torch.float32) for f in factors))
            merged = (weight.float() + update).to(weight.dtype)
            site.base.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, site.base)
