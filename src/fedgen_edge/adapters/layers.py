"""LoRA for each type of layer: the factors' shapes, their product, and the dense update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedgen_edge.errors import ConfigError

Shape = tuple[int, ...]


class Kind(NamedTuple):
    """How LoRA adapts one type of layer."""

    a: str
    """Name of the first factor's leaf, as in PEFT."""
    b: str
    shapes: Callable[[nn.Module, int], tuple[Shape, Shape]]
    """Shapes of A and B for a rank."""
    product: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    """The update's output, given the layer, its input, A, and scaled B."""
    dense: Callable[[Tensor, Tensor], Tensor]
    """The update of the layer's weight, in the weight's layout, given A and scaled B."""
    rank_axes: tuple[int, int] = (-2, -1)
    """The dimensions of A and B that hold the rank."""


def _apply_linear(_: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 2:
        return F.linear(F.linear(x, a), b)
    rows = x.reshape(len(a), -1, x.shape[-1])
    return (rows @ a.mT @ b.mT).reshape(*x.shape[:-1], b.shape[-2])


def _apply_conv2d(layer: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    padding: Any = layer.padding  # a string or numbers: torch's stub knows only one of them
    conv_arguments = (layer.stride, padding, layer.dilation)
    if a.ndim == 4:
        return F.conv2d(F.conv2d(x, a, None, *conv_arguments), b)
    clients, rows = len(a), x.shape[0] // len(a)
    wide = x.reshape(clients, rows, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    narrow = F.conv2d(wide, a.flatten(0, 1), None, *conv_arguments, groups=clients)
    out = F.conv2d(narrow, b.flatten(0, 1), groups=clients)
    out = out.reshape(rows, clients, b.shape[1], *out.shape[2:]).transpose(0, 1)
    return out.reshape(-1, *out.shape[2:])


def _apply_embedding(_: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 2:
        return F.embedding(x, a.mT) @ b.mT
    clients, vocabulary = len(a), a.shape[-1]
    offsets = torch.arange(clients, device=x.device).view(-1, *[1] * x.ndim) * vocabulary
    ids = (x.reshape(clients, -1, *x.shape[1:]) + offsets).reshape(clients, -1)
    embedded = F.embedding(ids, a.mT.reshape(clients * vocabulary, -1))
    return (embedded @ b.mT).reshape(*x.shape, b.shape[-2])


def _get_conv_shapes(layer: nn.Module, rank: int) -> tuple[Shape, Shape]:
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1:
        raise ConfigError(
            "adapter.target_modules: a grouped Conv2d cannot be adapted, leave it out"
        )
    return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)


def _make_shape_reader(in_: str, out: str) -> Callable[[nn.Module, int], tuple[Shape, Shape]]:
    return lambda layer, rank: ((rank, getattr(layer, in_)), (getattr(layer, out), rank))


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind(
        "lora_A",
        "lora_B",
        _make_shape_reader("in_features", "out_features"),
        _apply_linear,
        lambda a, b: b @ a,
    ),
    Conv1D: Kind(
        "lora_A", "lora_B", _make_shape_reader("nx", "nf"), _apply_linear, lambda a, b: (b @ a).mT
    ),
    nn.Conv2d: Kind(
        "lora_A",
        "lora_B",
        _get_conv_shapes,
        _apply_conv2d,
        lambda a, b: torch.einsum("or,rihw->oihw", b.flatten(1), a),
        (-4, -3),
    ),
    nn.Embedding: Kind(
        "lora_embedding_A",
        "lora_embedding_B",
        _make_shape_reader("num_embeddings", "embedding_dim"),
        _apply_embedding,
        lambda a, b: (b @ a).mT,
    ),
}


EQUIVALENT_CLASSES = frozenset({"FalconLinear"})
"""Subclasses that override `forward` and still compute what their base class does."""


def find_kind(layer: nn.Module) -> Kind | None:
    """How to adapt a layer; None for a layer that computes something else, such as a router."""
    return next((kind for base, kind in KINDS.items() if _computes(layer, base)), None)


def _computes(layer: nn.Module, base: type[nn.Module]) -> bool:
    same = type(layer).forward is base.forward or type(layer).__name__ in EQUIVALENT_CLASSES
    return isinstance(layer, base) and same
