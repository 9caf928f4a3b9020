"""Networks in diffusers' folders: find, load, adapt, and write them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedgen_edge.config import Backbone, Settings
from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.adapted import AdaptedModel, adapt
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.backbones.loading import FAILURES, describe
from fedgen_edge.tasks.task import make_untrained
from fedgen_edge.types import Leaves

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""diffusers' name for the file of a network's weights."""


def resolve_tiny(settings: Backbone, task: str) -> Backbone:
    """The settings, with `tiny` replaced by the folder of an untrained network for the digits."""
    if settings.path != "tiny":
        return settings
    return replace(settings, path=str(make_untrained(task, "tiny", (1, 8, 8), 10)))


def find_network_folder(settings: Backbone) -> Path:
    """The folder of the network; for a pipeline's folder, its UNet's.

    Raises:
        ConfigError: the folder does not exist.
    """
    if settings.path.startswith(("./", "../", "/")) and not Path(settings.path).is_dir():
        raise ConfigError(
            f"backbone.path={settings.path!r} is not there: make it by `fedgen pretrain RECIPE`, "
            "or give a folder of diffusers', or a hub id"
        )
    folder = pretrained.find_folder(settings)
    return folder / "unet" if (folder / "model_index.json").is_file() else folder


def load_network(settings: Backbone, kind: Any, device: torch.device) -> tuple[Any, Path, str]:
    """A diffusers network, its folder, and the SHA-256 of its weights.

    A pipeline's folder gives its UNet.

    Raises:
        ConfigError: there is none, it is another kind of network, or it is only a pickle.
    """
    folder = find_network_folder(settings)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"backbone.path={settings.path!r}: {folder} holds no safetensors weights (pickles are "
            "not read): make one by `fedgen pretrain RECIPE`, or give a folder of diffusers'"
        )
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    try:
        model = load_complete(kind, folder, dtype).to(device)
    except FAILURES as error:
        reason = describe(error)
        raise ConfigError(
            f"backbone.path={settings.path!r} is no {kind.__name__} ({reason}): take another"
        ) from None
    return model.eval(), folder, pretrained.hash_weights(weights)


def load_complete(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A diffusers network from a folder that contains exactly its weights.

    Raises:
        ValueError: the folder has another kind of network, or a weight is missing or unknown, which
            diffusers itself would tolerate.
    """
    class_name = kind.load_config(folder, local_files_only=True).get("_class_name", kind.__name__)
    if class_name != kind.__name__:
        raise ValueError(f"it holds {class_name}")
    model, loading = kind.from_pretrained(
        folder,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if faulty_keys := [*loading["missing_keys"], *loading["unexpected_keys"]]:
        raise ValueError(
            f"{len(faulty_keys)} weights are missing or unknown, {sorted(faulty_keys)[0]!r} first"
        )
    return model


def load_adapted(
    name: str, kind: Any, targets: Sequence[str], settings: Settings, *, full: bool, **options: Any
) -> AdaptedModel:
    """A network of this package, loaded, frozen, and adapted.

    Args:
        name: the task's name.
        kind: the network's class.
        targets: the layers to adapt if the settings name none.
        settings: the run's settings.
        full: train every weight instead of an adapter.
        options: `device`, where the network goes, and other fields of `AdaptedModel`.
    """
    net, folder, digest = load_network(
        resolve_tiny(settings.backbone, name), kind, options.pop("device")
    )
    common_options = {
        "folder": folder,
        "sha256": digest,
        "weights": WEIGHTS,
        "write": partial(write, net),
    }
    return adapt(net, settings.adapter, targets, full=full, **common_options, **options)


def write(network: Any, folder: Path, weights: Leaves) -> None:
    """Write a folder that diffusers loads: a network's configuration and these weights."""
    network.save_config(folder)
    save_file(
        {k: v.detach().float().contiguous().cpu() for k, v in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
