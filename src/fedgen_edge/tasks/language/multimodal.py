"""The text part of a model that also reads images or sound."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fedgen_edge.adapters.targets import ALL_LINEAR, is_expression
from fedgen_edge.config import Adapter
from fedgen_edge.errors import ConfigError


def is_multimodal(model: Any) -> bool:
    """Whether a model's configuration contains that of a language model as a part."""
    return model.config.get_text_config() is not model.config


def keep_to_text(adapter: Adapter, model: Any, default: Sequence[str]) -> Adapter:
    """The adapter's settings, with layer names restricted to the text part.

    Other parts have layers of the same names that text does not pass through. A regular expression
    is unchanged.

    Args:
        adapter: the user's settings.
        model: a model of transformers.
        default: the targets if the settings name none.
    """
    targets = adapter.target_modules or tuple(default)
    if not is_multimodal(model) or is_expression(targets):
        return adapter
    prefix, part = _find_text_part(model)
    linear = (name for name, layer in part.named_modules() if isinstance(layer, nn.Linear))
    names = (
        sorted({n.rpartition(".")[2] for n in linear}) if list(targets) == [ALL_LINEAR] else targets
    )
    alternatives = "|".join(map(re.escape, names))
    return replace(adapter, target_modules=(rf"{re.escape(prefix)}\.(.*\.)?({alternatives})",))


def check_text_layers(model: Any, layers: Iterable[str], setting: str) -> None:
    """Refuse to adapt layers that text does not pass through: nothing would train them.

    Args:
        model: a model of transformers.
        layers: names of the trained layers.
        setting: the setting that names them, with its value.

    Raises:
        ConfigError: there are such layers.
    """
    if not is_multimodal(model):
        return
    prefix, _ = _find_text_part(model)
    head = model.get_output_embeddings()
    heads = {name for name, layer in model.named_modules() if layer is head}
    non_text_layers = [n for n in layers if not n.startswith(f"{prefix}.") and n not in heads]
    if non_text_layers:
        raise ConfigError(
            f"{setting} would train layers that no text passes in a {model.config.model_type} "
            f"({len(non_text_layers)}, {non_text_layers[0]} first): adapt layers below "
            f"{prefix}, such as q_proj"
        )


def _find_text_part(model: Any) -> tuple[str, nn.Module]:
    part = model.get_decoder()
    return next(name for name, layer in model.named_modules() if layer is part), part
