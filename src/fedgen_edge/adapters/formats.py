"""PEFT's folders, read and written: what `PeftModel.from_pretrained` loads, and vLLM and the rest.

Only safetensors: a folder that holds a pickle alone is refused, and nothing in it is run.
"""

import json
import math
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
from fedgen_edge.adapters.ranks import padded
from fedgen_edge.config import Adapter
from fedgen_edge.errors import AdapterError
from fedgen_edge.types import Leaves

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
PIPELINE = "pytorch_lora_weights.safetensors"
"""What diffusers calls an adapter's file."""
UNSUPPORTED = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def write(
    folder: Path,
    leaves: Leaves,
    lora: Lora,
    settings: Adapter,
    *,
    backbone: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Fill a PEFT folder with one adapter, and `provenance.json` beside it.

    Args:
        folder: there already.
        leaves: one adapter, without an axis of clients.
        lora: the layers that it belongs to.
        settings: rank, alpha and dropout, as PEFT's configuration keeps them.
        backbone: what PEFT's configuration says of it: `base_model_name_or_path`, `task_type`.
        provenance: where it came from: backbone's hash, seed, settings, round, client.
    """
    alpha = settings.alpha
    config = LoraConfig(
        **backbone,
        r=settings.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=list(lora.targets),
        fan_in_fan_out=any(isinstance(s.base, Conv1D) for s in lora.sites.values()),
        inference_mode=True,
    )
    tensors = {to_peft(k): v.detach().float().contiguous().cpu() for k, v in leaves.items()}
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1, sort_keys=True))


def for_pipelines(folder: Path, part: str, leaves: Leaves, lora: Lora, settings: Adapter) -> None:
    """Add the file that diffusers' `load_lora_weights` and `load_lora_adapter` take from a folder.

    Its metadata, which diffusers 0.42 reads, tell the scale and the layers; embeddings are among
    them.

    Args:
        folder: there already.
        part: what a pipeline calls the network: `unet`.
        leaves: one adapter, without an axis of clients.
        lora: the layers that it belongs to.
        settings: rank and alpha.
    """
    told = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": list(lora.targets),
    }
    metadata = json.dumps({f"{part}.{k}": v for k, v in told.items()}, sort_keys=True)
    tensors = {f"{part}.{to_peft(k).removeprefix(PREFIX)}": v for k, v in leaves.items()}
    save_file(
        {k: v.detach().float().contiguous().cpu() for k, v in tensors.items()},
        folder / PIPELINE,
        metadata={"format": "pt", "lora_adapter_metadata": metadata},
    )


def of_rank(settings: Adapter, rank: int) -> Adapter:
    """The settings at another rank, with the alpha that keeps the scale."""
    ratio = rank / settings.rank
    alpha = settings.alpha * (math.sqrt(ratio) if settings.rslora else ratio)
    return replace(settings, rank=rank, alpha=alpha, ranks=())


def read(folder: Path, lora: Lora, *, any_rank: bool = False) -> Leaves:
    """One adapter from a PEFT folder, its scale turned into ours.

    Args:
        folder: as `write` or PEFT has made it.
        lora: the layers that it must belong to.
        any_rank: whether it may have another one: of a higher rank the rest is frozen beside the
            first ones, a lower one is filled with zeros.

    Raises:
        AdapterError: no such folder, a pickle, another rank, other layers, or a kind of adapter
            that is not plain LoRA.
    """
    config = _config(folder)
    rank = config["r"]
    if rank != lora.rank and not any_rank:
        raise AdapterError(
            f"{folder}: the adapter has rank {rank}, adapter.rank={lora.rank}: make them equal"
        )
    theirs = config["lora_alpha"] / rank ** (0.5 if config.get("use_rslora") else 1.0)
    found = {from_peft(k): v.float() for k, v in _tensors(folder).items()}
    _check(folder, found, replace(lora, rank=rank))
    ratio = theirs / lora.scale
    scaled = {k: v * ratio if k.endswith("_B") else v for k, v in found.items()}
    return lora.narrowed(scaled) if rank > lora.rank else padded(scaled, lora.shapes())


def to_peft(name: str) -> str:
    """Our leaf's name in PEFT's file."""
    suffix = "" if "lora_embedding_" in name else ".weight"
    return f"{PREFIX}{name}{suffix}"


def from_peft(name: str) -> str:
    """PEFT's tensor's name among our leaves."""
    return name.removeprefix(PREFIX).removesuffix(".weight")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{folder} is no PEFT folder: it has no adapter_config.json")
    try:
        config = json.loads(path.read_text())
        config["r"] = int(config["r"])
        plain = config["peft_type"] == "LORA" and config["r"] and float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read ({error!r}): write it with PEFT again") from None
    odd = [k for k, v in UNSUPPORTED.items() if config.get(k, v) not in (v, None)]
    if not plain or odd or config.get("modules_to_save"):
        raise AdapterError(
            f"{folder} is not plain LoRA ({', '.join(odd) or 'its type'}): train one"
        )
    return config


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS}: pickles are not read, save it again by PEFT"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged: {error}") from None


def _check(folder: Path, found: Leaves, lora: Lora) -> None:
    wanted = lora.shapes()
    for name in sorted(set(wanted) ^ set(found)):
        which = "lacks" if name in wanted else "has another layer,"
        raise AdapterError(f"{folder} {which} {name}: adapter.target_modules must be the adapter's")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise AdapterError(
                f"{folder}: {name} is {list(found[name].shape)}, this backbone needs {list(shape)}"
            )
        if not bool(found[name].isfinite().all()):
            raise AdapterError(f"{folder}: {name} is not finite: the adapter is unusable")
