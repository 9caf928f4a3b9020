"""The LoRA layer: one adapter, or a stack of adapters over one shared, frozen layer.

A layer's update is `scale * B A` (Hu et al. 2021, arXiv:2106.09685), applied here and nowhere
else. Stacked leaves have a first axis of clients: the input's rows are `clients * batch`, client
by client, and each client's rows are multiplied by that client's factors.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from fedgen_edge.adapters.dropout import draw_mask
from fedgen_edge.adapters.layers import KINDS, Kind, Shape, find_kind
from fedgen_edge.adapters.targets import ALL_LINEAR, choose_layers, get_expert_share, list_adaptable
from fedgen_edge.config import Adapter
from fedgen_edge.errors import ConfigError
from fedgen_edge.types import CORE, RESIDUAL, Leaves


class AdaptedLayer(nn.Module):
    """A frozen layer and the factors currently bound to it; None leaves the layer unadapted."""

    def __init__(self, base: nn.Module, kind: Kind, number: int, dropout: float) -> None:
        super().__init__()
        self.base, self.kind, self.number, self.dropout = base, kind, number, dropout
        self.factors: tuple[Tensor, Tensor] | None = None
        self.seed: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which some models access."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the update's output."""
        y = self.base(x)
        if self.factors is None:
            return y
        a, b = (factor.to(y.dtype) for factor in self.factors)
        if self.seed is not None and self.dropout and x.is_floating_point():
            x = x * self._mask(x).to(x.dtype)
        return y + self.kind.product(self.base, x, a, b)

    def _mask(self, x: Tensor) -> Tensor:
        assert self.seed is not None
        client_shape = (x.shape[0] // max(1, self.seed.numel()), *x.shape[1:])
        return draw_mask(self.seed, self.number, client_shape, self.dropout).reshape(x.shape)


@dataclass(frozen=True)
class Lora:
    """Every adapted layer of one model."""

    layers: dict[str, AdaptedLayer]
    rank: int
    scale: float
    """alpha / rank, or alpha / sqrt(rank)."""
    targets: tuple[str, ...]
    """The layers, as listed in PEFT's configuration."""
    experts: float = 0.0
    """Fraction of the model's weights in routed experts, where all-linear leaves them frozen."""

    def shapes(self) -> dict[str, Shape]:
        """The shape of every leaf of one adapter."""
        leaf_shapes = {}
        for name, layer in self.layers.items():
            a, b = layer.kind.shapes(layer.base, self.rank)
            leaf_shapes |= {f"{name}.{layer.kind.a}": a, f"{name}.{layer.kind.b}": b}
        return leaf_shapes

    def init(self, rng: Generator) -> Leaves:
        """A fresh adapter whose update is zero: A is uniform as in PEFT, and B is zero.

        For an embedding, A is zero and B is normal.
        """
        return {name: _draw_leaf(name, shape, rng) for name, shape in self.shapes().items()}

    @contextmanager
    def bind(self, leaves: Leaves, seed: Tensor | None = None) -> Iterator[None]:
        """Inside the context, the model computes with these leaves; other layers are unadapted.

        Args:
            leaves: one adapter, or a stack.
            seed: one dropout seed per client; None disables dropout.
        """
        try:
            for name, layer in self.layers.items():
                layer.factors, layer.seed = self.factors(name, leaves), seed
            yield
        finally:
            for layer in self.layers.values():
                layer.factors = layer.seed = None

    def factors(self, name: str, leaves: Leaves) -> tuple[Tensor, Tensor] | None:
        """A and scaled B of one layer."""
        pair = self.pair(name, leaves)
        return pair and (pair[0], pair[1] * self.scale)

    def pair(self, name: str, leaves: Leaves) -> tuple[Tensor, Tensor] | None:
        """A and B of one layer, each extended by its frozen residual factor, if any.

        The core between them is multiplied into B; a frozen pair has no core.
        """
        kind = self.layers[name].kind
        names = f"{name}.{kind.a}", f"{name}.{kind.b}"
        if not leaves.keys() >= {*names}:
            return None
        a, b = (leaves[leaf_name] for leaf_name in names)
        if (core := f"{name}.{CORE}") in leaves:
            b = (b.flatten(kind.rank_axes[1]) @ leaves[core]).reshape(b.shape)
        a, b = (
            torch.cat([factor, leaves[RESIDUAL + own]], axis)
            if RESIDUAL + own in leaves
            else factor
            for factor, own, axis in zip((a, b), names, kind.rank_axes, strict=True)
        )
        return a, b

    def join_residuals(self, leaves: Leaves) -> tuple[Leaves, int]:
        """An adapter with the same products but without frozen pairs, and its rank.

        All layers have one rank, so those with smaller residuals are padded with zeros.
        """
        pairs = {n: pair for n in self.layers if (pair := self.pair(n, leaves)) is not None}
        rank = max((len(a) for a, _ in pairs.values()), default=self.rank)
        joined = {}
        for name, factors in pairs.items():
            kind = self.layers[name].kind
            for leaf, factor, axis in zip((kind.a, kind.b), factors, kind.rank_axes, strict=True):
                joined[f"{name}.{leaf}"] = _zero_pad(factor, axis, rank)
        return joined, rank

    def split_residuals(self, leaves: Leaves) -> Leaves:
        """The inverse of `join_residuals`: the frozen residuals become separate leaves again."""
        split = {}
        for name, layer in self.layers.items():
            kind = layer.kind
            for leaf, axis in zip((kind.a, kind.b), kind.rank_axes, strict=True):
                joined = leaves[full_name := f"{name}.{leaf}"]
                split[full_name] = joined.narrow(axis, 0, self.rank)
                extra = joined.shape[axis] - self.rank
                split[RESIDUAL + full_name] = joined.narrow(axis, self.rank, extra)
        return split

    def call(self, module: nn.Module, leaves: Leaves, batch: object, seed: Tensor | None) -> Tensor:
        """The module's output on the batch, computed with these leaves."""
        with self.bind(leaves, seed):
            return module(batch)


def _zero_pad(factor: Tensor, axis: int, rank: int) -> Tensor:
    shape = [*factor.shape]
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _draw_leaf(name: str, shape: Shape, rng: Generator) -> Float[Tensor, "..."]:
    if name.endswith("lora_A"):
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return torch.empty(shape).uniform_(-bound, bound, generator=rng)
    if name.endswith("lora_embedding_B"):
        return torch.empty(shape).normal_(generator=rng)
    return torch.zeros(shape)


def inject(model: nn.Module, settings: Adapter, default: Sequence[str] = ()) -> Lora:
    """Wrap the layers that the settings select, in place; weights are neither copied nor moved.

    All have one rank, as in PEFT; a layer with a smaller side, such as an embedding of ten classes,
    has more terms than its update needs.

    Args:
        model: frozen by this call.
        settings: the adapter's settings.
        default: the targets if the settings name none.

    Raises:
        ConfigError: no layer matches, one cannot be adapted, or the rank is above all their sides.
    """
    model.requires_grad_(False)
    targets = settings.target_modules or tuple(default)
    named = {n: m for n, m in model.named_modules() if n}
    names = choose_layers(model, named, targets, strict=bool(settings.target_modules))
    adapted_layers = {n: _make_layer(n, named, i, settings) for i, n in enumerate(names)}
    limit = max(map(_find_max_rank, adapted_layers.values()))
    if settings.rank > limit:
        raise ConfigError(
            f"adapter.rank={settings.rank} is above {limit}, the smaller side of every layer that "
            f"adapter.target_modules names: take at most {limit}, or name larger ones"
        )
    short_names = {name.rsplit(".", 1)[-1] for name in names}
    are_exact = {n for n in named if n.rsplit(".", 1)[-1] in short_names} == set(names)
    for name, adapted_layer in adapted_layers.items():
        model.set_submodule(name, adapted_layer)
    divisor = math.sqrt(settings.rank) if settings.rslora else settings.rank
    targets_found = tuple(sorted(short_names) if are_exact else names)
    experts = get_expert_share(model) if list(targets) == [ALL_LINEAR] else 0.0
    return Lora(adapted_layers, settings.rank, settings.alpha / divisor, targets_found, experts)


def _make_layer(
    name: str, named: Mapping[str, nn.Module], number: int, settings: Adapter
) -> AdaptedLayer:
    layer = named[name]
    kind = find_kind(layer)
    if kind is None:
        raise ConfigError(
            f"adapter.target_modules: {name} is a {type(layer).__name__}, which cannot be adapted: "
            f"of type {', '.join(k.__name__ for k in KINDS)} are {list_adaptable(named)}"
        )
    return AdaptedLayer(layer, kind, number, settings.dropout)


def _find_max_rank(layer: AdaptedLayer) -> int:
    """The highest rank of an update of this layer: its smaller side."""
    a, b = layer.kind.shapes(layer.base, 1)
    return min(math.prod(a[1:]), b[0])


def merge(model: nn.Module, lora: Lora, leaves: Leaves) -> None:
    """Add the updates to the weights and unwrap the layers, in place: a plain model remains."""
    for name, layer in lora.layers.items():
        factors = lora.factors(name, leaves)
        if factors is not None:
            weight = layer.weight
            update = layer.kind.dense(*(f.to(weight.device, torch.float32) for f in factors))
            merged = (weight.float() + update).to(weight.dtype)
            layer.base.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, layer.base)
