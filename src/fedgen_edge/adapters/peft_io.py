"""Read and write PEFT's folders, which `PeftModel.from_pretrained`, vLLM, and others load.

Only safetensors are read: a folder that holds only a pickle is refused, and none of it is run.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from fedgen_edge.adapters.lora import Lora
from fedgen_edge.adapters.ranks import pad_ranks
from fedgen_edge.config import Adapter
from fedgen_edge.errors import AdapterError
from fedgen_edge.types import Leaves

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
PIPELINE_WEIGHTS = "pytorch_lora_weights.safetensors"
"""diffusers' name for an adapter's file."""
CONFIG = "adapter_config.json"
PROVENANCE = "provenance.json"
FROZEN_SUFFIX = ".base_layer.weight"
"""Suffix of the frozen weights that PEFT writes beside adapters of embeddings and heads."""
ALLOWED_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
    "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
"""Fields of LoraConfig that are read, or that do not affect what an adapter computes."""
PLAIN_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the backbone's weights unchanged."""
MAX_NUMBER = 2**31


def write(
    folder: Path,
    leaves: Leaves,
    lora: Lora,
    settings: Adapter,
    *,
    backbone: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write one adapter and its `provenance.json` into a PEFT folder.

    Args:
        folder: an existing folder.
        leaves: one adapter, without a client axis.
        lora: the layers that it adapts.
        settings: rank, alpha, and dropout for PEFT's configuration.
        backbone: PEFT's fields for the backbone: `base_model_name_or_path`, `task_type`.
        provenance: the adapter's origin: backbone's hash, seed, settings, round, client.
    """
    alpha = _plain_alpha(settings)
    config = LoraConfig(
        **backbone,
        r=settings.rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=list(lora.targets),
        fan_in_fan_out=any(isinstance(s.base, Conv1D) for s in lora.layers.values()),
        inference_mode=True,
    )
    tensors = {to_peft(k): v.detach().float().contiguous().cpu() for k, v in leaves.items()}
    config.save_pretrained(str(folder))
    _sort_targets(folder / CONFIG)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1, sort_keys=True))


def _plain_alpha(settings: Adapter) -> int | float:
    """The alpha for which alpha / rank is the scale: some readers support no other formula."""
    alpha = settings.alpha * (math.sqrt(settings.rank) if settings.rslora else 1)
    return int(alpha) if alpha == int(alpha) else alpha


def _sort_targets(path: Path) -> None:
    """Sort the target layers: PEFT keeps them in a set, whose order differs between processes."""
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def write_pipeline_weights(
    folder: Path, component: str, leaves: Leaves, lora: Lora, settings: Adapter
) -> None:
    """Add the file that diffusers' `load_lora_weights` and `load_lora_adapter` read from a folder.

    Its metadata, which diffusers 0.42 reads, contain the scale and the layers, including
    embeddings.

    Args:
        folder: an existing folder.
        component: the network's name in a pipeline: `unet`.
        leaves: one adapter, without a client axis.
        lora: the layers that it adapts.
        settings: rank and alpha.
    """
    adapter_metadata = {
        "r": settings.rank,
        "lora_alpha": _plain_alpha(settings),
        "use_rslora": False,
        "target_modules": sorted(lora.targets),
    }
    metadata = json.dumps(
        {f"{component}.{k}": v for k, v in adapter_metadata.items()}, sort_keys=True
    )
    tensors = {f"{component}.{to_peft(k).removeprefix(PREFIX)}": v for k, v in leaves.items()}
    save_file(
        {k: v.detach().float().contiguous().cpu() for k, v in tensors.items()},
        folder / PIPELINE_WEIGHTS,
        metadata={"lora_adapter_metadata": metadata},  # the order of several keys would be random
    )


def change_rank(settings: Adapter, rank: int) -> Adapter:
    """The settings with another rank, and with the alpha that preserves the scale."""
    ratio = rank / settings.rank
    alpha = settings.alpha * (math.sqrt(ratio) if settings.rslora else ratio)
    return replace(settings, rank=rank, alpha=alpha, ranks=())


def read(folder: Path, lora: Lora, *, any_rank: bool = False) -> Leaves:
    """One adapter from a PEFT folder, converted to our scale.

    Args:
        folder: a folder from `write` or PEFT.
        lora: the layers that it must adapt.
        any_rank: whether another rank is allowed: a higher one's extra terms become a frozen
            residual, and a lower one is padded with zeros.

    Raises:
        AdapterError: no such folder, a pickle, another rank, other layers, or a kind of adapter
            that is not plain LoRA.
    """
    config = _read_config(folder)
    rank = config["r"]
    if rank != lora.rank and not any_rank:
        raise AdapterError(
            f"{folder}: the adapter has rank {rank}, adapter.rank={lora.rank}: make them equal"
        )
    file_scaling = config["lora_alpha"] / rank ** (0.5 if config.get("use_rslora") else 1.0)
    tensors = _read_tensors(folder)
    _check_frozen(folder, {k: v for k, v in tensors.items() if k.endswith(FROZEN_SUFFIX)}, lora)
    leaves = {from_peft(k): v.float() for k, v in tensors.items() if not k.endswith(FROZEN_SUFFIX)}
    _check_leaves(folder, leaves, replace(lora, rank=rank))
    ratio = file_scaling / lora.scale
    ratio = 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-12) else ratio  # the same scale
    scaled = {k: v * ratio if k.endswith("_B") else v for k, v in leaves.items()}
    return lora.split_residuals(scaled) if rank > lora.rank else pad_ranks(scaled, lora.shapes())


def to_peft(name: str) -> str:
    """The name of our leaf in PEFT's file."""
    suffix = "" if "lora_embedding_" in name else ".weight"
    return f"{PREFIX}{name}{suffix}"


def from_peft(name: str) -> str:
    """The name of PEFT's tensor among our leaves."""
    return name.removeprefix(PREFIX).removesuffix(".weight")


def check_origin(folder: Path, backbone: str) -> None:
    """Refuse an adapter whose folder records that it was trained on another backbone.

    Args:
        folder: a folder from `write` or PEFT; PEFT's own records no backbone.
        backbone: SHA-256 of the current weights.

    Raises:
        AdapterError: the backbones differ, or the provenance cannot be read.
    """
    path = folder / PROVENANCE
    origin = _read_json(path) if path.is_file() else {}
    trained_on = origin.get("backbone_sha256")
    if trained_on is not None and trained_on != backbone:
        raise AdapterError(
            f"{folder} was trained on another backbone, of SHA-256 {str(trained_on)[:16]}... and "
            f"not {backbone[:16]}...: set backbone.path to that one, or take another adapter"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AdapterError(f"{path} cannot be read ({reason}): write it with PEFT again") from None
    if not isinstance(table, dict):
        raise AdapterError(f"{path} cannot be read (it is no object): write it with PEFT again")
    return table


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a plain LoRA adapter, with its numbers checked."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} is no PEFT folder: it has no {CONFIG}")
    config = _read_json(path)
    if "peft_type" not in config:
        raise AdapterError(f"{path} cannot be read (no peft_type): write it with PEFT again")
    if config["peft_type"] != "LORA":
        raise AdapterError(_format_not_plain(folder, "peft_type", config["peft_type"]))
    for name in sorted(config.keys() - ALLOWED_FIELDS):
        if not _is_plain(name, config[name]):
            raise AdapterError(_format_not_plain(folder, name, config[name]))
    for name, kind in (("r", int), ("lora_alpha", int | float)):
        value: Any = config.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not value < MAX_NUMBER:
            raise AdapterError(
                f"{path} cannot be read ({name}={reprlib.repr(value)} is no number it may be): "
                "write it with PEFT again"
            )
        if value <= 0:
            raise AdapterError(_format_not_plain(folder, name, value))
    return config


def _is_plain(name: str, value: Any) -> bool:
    """Whether a field leaves an adapter plain; an unknown field must be empty."""
    if name == "bias":
        return value in ("none", None)
    if name == "init_lora_weights":
        return any(value is plain or value == plain for plain in PLAIN_INITIAL)
    return not value


def _format_not_plain(folder: Path, name: str, value: Any) -> str:
    return (
        f"{folder} is not plain LoRA ({name}={reprlib.repr(value)}), which alone is computed here: "
        "convert it by PEFT, or train another"
    )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS}: pickles are not read, save it again by PEFT"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged: {error}") from None


def _check_frozen(folder: Path, frozen: Mapping[str, torch.Tensor], lora: Lora) -> None:
    """Check that frozen weights match the backbone's, to the precision of bf16."""
    for name, file_tensor in frozen.items():
        layer = name.removeprefix(PREFIX).removesuffix(FROZEN_SUFFIX)
        adapted_layer = lora.layers.get(layer)
        weight = None if adapted_layer is None else adapted_layer.weight.detach().float().cpu()
        if weight is None or weight.shape != file_tensor.shape:
            raise AdapterError(
                f"{folder} has another layer, {layer}: adapter.target_modules must be the adapter's"
            )
        if not torch.allclose(file_tensor.float(), weight, rtol=2**-7, atol=1e-6):
            raise AdapterError(
                f"{folder} holds another {layer} than backbone.path: take the backbone that the "
                "adapter was trained on"
            )


def _check_leaves(folder: Path, leaves: Leaves, lora: Lora) -> None:
    wanted = lora.shapes()
    for name in sorted(set(wanted) ^ set(leaves)):
        which = "lacks" if name in wanted else "has another layer,"
        raise AdapterError(f"{folder} {which} {name}: adapter.target_modules must be the adapter's")
    for name, shape in wanted.items():
        if tuple(leaves[name].shape) != shape:
            raise AdapterError(
                f"{folder}: {name} is {list(leaves[name].shape)}, this backbone needs {list(shape)}"
            )
        if not bool(leaves[name].isfinite().all()):
            raise AdapterError(f"{folder}: {name} is not finite: the adapter is unusable")
