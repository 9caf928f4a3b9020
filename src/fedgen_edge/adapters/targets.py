"""Which layers of a model the settings select, by PEFT's rules."""

import re
from collections.abc import Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgen_edge.adapters.layers import KINDS, find_kind
from fedgen_edge.errors import ConfigError

ALL_LINEAR = "all-linear"
"""Selects every linear layer except the head."""


def choose_layers(
    model: nn.Module, named: Mapping[str, nn.Module], targets: Sequence[str], *, strict: bool
) -> list[str]:
    """The names of the layers to adapt.

    Args:
        model: the model that contains the layers.
        named: its modules, by name.
        targets: `all-linear`, one regular expression, or names.
        strict: whether every target must match a layer.

    Raises:
        ConfigError: no layer matches, or `strict` is set and a target matches none.
    """
    chosen = [n for n, m in named.items() if _matches(model, n, m, targets)]
    missing = [t for t in targets if not any(_is_called(n, t) for n in chosen)]
    several = len(targets) > 1  # a single target may be an expression
    if not chosen or (strict and several and missing):
        raise ConfigError(
            f"adapter.target_modules={list(targets)}: {', '.join(missing)} match no layer: this "
            f"backbone has {list_adaptable(named)}, or say all-linear"
        )
    return chosen


def list_adaptable(named: Mapping[str, nn.Module]) -> str:
    """The last name components of the layers that can be adapted."""
    return ", ".join(sorted({n.rsplit(".", 1)[-1] for n, m in named.items() if find_kind(m)}))


def get_expert_share(model: nn.Module) -> float:
    """Fraction of a model's weights in routed experts, stored as tensors `[experts, ...]`."""
    sizes = [
        weight.numel()
        for module in model.modules()
        for weight in module.parameters(recurse=False)
        if weight.ndim == 3 and len(weight) > 1 and not isinstance(module, nn.Conv1d)
    ]
    return sum(sizes) / sum(p.numel() for p in model.parameters())


def is_expression(targets: Sequence[str]) -> bool:
    """Whether the targets are one regular expression rather than names or `all-linear`."""
    return len(targets) == 1 and targets[0] != ALL_LINEAR and bool(re.search(r"[^\w.]", targets[0]))


def _matches(model: nn.Module, name: str, layer: nn.Module, targets: Sequence[str]) -> bool:
    """Whether PEFT's `target_modules` (`all-linear`, one expression, or names) select a layer."""
    if list(targets) == [ALL_LINEAR]:
        heads = [m for get in ("get_output_embeddings",) if (m := getattr(model, get, lambda: 0)())]
        linear = find_kind(layer) in (KINDS[nn.Linear], KINDS[Conv1D])
        return linear and all(layer is not head for head in heads)
    if is_expression(targets):
        return _full_match(targets[0], name)
    return any(_is_called(name, t) for t in targets)


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(
            f"adapter.target_modules={pattern!r} is no regular expression ({error}): "
            "give names of layers, or correct it"
        ) from None
