"""Load an adapter's folder with plain PEFT into the current model, and compare it with ours.

The model is not copied: PEFT wraps its layers, and they are restored afterwards.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Generator, Tensor, nn

from fedgen_edge.adapters.lora import Lora
from fedgen_edge.adapters.peft_io import PREFIX, to_peft
from fedgen_edge.errors import is_out_of_memory
from fedgen_edge.seeds import seed_global_generators
from fedgen_edge.types import Leaves

Forward = Callable[[], Tensor]
"""One short forward pass through a model, always on the same input."""
RELATIVE_TOLERANCE = 1e-2
"""How much PEFT's outputs may differ, relative to the change that the adapter makes."""
ULP_TOLERANCE = 16
"""The same tolerance in units in the last place of the outputs."""


def draw_noisy(lora: Lora, rng: Generator) -> Leaves:
    """An adapter without zeros, whose updates are about as large as typical weights."""
    std = 0.5 / (lora.scale * math.sqrt(lora.rank))
    return {
        name: torch.randn(shape, generator=rng) * (_get_std(name, shape) or std)
        for name, shape in lora.shapes().items()
    }


def _get_std(name: str, shape: tuple[int, ...]) -> float | None:
    """The standard deviation of a first factor; None for a second one."""
    if name.endswith("lora_A"):
        return 1 / math.sqrt(math.prod(shape[1:]))
    return 0.1 if name.endswith("lora_embedding_A") else None


@torch.no_grad()
def compare(
    folder: Path, model: nn.Module, lora: Lora, leaves: Leaves, forward: Forward
) -> str | None:
    """How PEFT's model of a folder differs from ours with these leaves; None if they agree.

    Args:
        folder: written from the leaves.
        model: contains the layers of `lora`; unchanged afterwards.
        lora: the adapted layers.
        leaves: one adapter.
        forward: a forward pass through the model.
    """
    device = next(model.parameters()).device
    backbone_outputs = forward().float()
    with lora.bind({k: v.to(device) for k, v in leaves.items()}):
        adapted_outputs = forward().float()
    try:
        with _unwrap_layers(model, lora):
            if fault := _load(model, folder, lora.join_residuals(leaves)[0]):
                return fault
            peft_outputs = forward().float()
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return f"it refuses: {' '.join(str(error).split())[:160]}"
    if not bool(adapted_outputs.isfinite().all()):
        return None  # training diverged: the factors are equal, and nothing else can be compared
    difference, change = (
        float((peft_outputs - adapted_outputs).norm()),
        float((adapted_outputs - backbone_outputs).norm()),
    )
    last_place = torch.finfo(next(model.parameters()).dtype).eps * float(adapted_outputs.norm())
    if difference <= RELATIVE_TOLERANCE * change + ULP_TOLERANCE * last_place:
        return None
    return f"its outputs differ by {difference:.2g} where the adapter changes them by {change:.2g}"


def _load(model: nn.Module, folder: Path, leaves: Leaves) -> str | None:
    """Have PEFT wrap a model's layers, and return where its tensors differ from the leaves."""
    device = str(next(model.parameters()).device)
    plain: Any = model  # PEFT's annotation accepts only transformers' models
    wrapped = PeftModel.from_pretrained(
        plain, str(folder), autocast_adapter_dtype=False, torch_device=device
    )
    loaded = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    written = {to_peft(k): v for k, v in leaves.items()}
    for name in sorted(written.keys() | loaded.keys()):
        layer = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        if name not in written or name not in loaded:
            return f"it adapts other weights instead of {layer}"
        if not torch.equal(loaded[name].cpu(), written[name].to(loaded[name].dtype).cpu()):
            return f"its factors of {layer} are others"
    return None


@contextmanager
def _unwrap_layers(model: nn.Module, lora: Lora) -> Iterator[None]:
    """Inside the context, the model is as its library built it; later wrappers are removed."""
    layers = {module: dict(module._modules) for module in model.modules()}
    attributes = {*vars(model)}
    try:
        for name, layer in lora.layers.items():
            model.set_submodule(name, layer.base)
        with (
            warnings.catch_warnings(),
            seed_global_generators("peft"),
        ):  # PEFT draws before it loads
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, children in layers.items():
            module._modules.clear()
            module._modules.update(children)
        for name in {*vars(model)} - attributes:
            delattr(model, name)
