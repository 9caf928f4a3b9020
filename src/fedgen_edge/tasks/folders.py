"""Networks in diffusers' folders: found, made anew, loaded whole, adapted, written."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedgen_edge.config import Backbone, Settings
from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks import backbones
from fedgen_edge.tasks.adapted import Adapted, adapt
from fedgen_edge.tasks.loading import FAILURES, describe
from fedgen_edge.tasks.task import untrained
from fedgen_edge.types import Leaves

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""What diffusers calls the file of a network's weights."""


def chosen(settings: Backbone, task: str) -> Backbone:
    """The same, and where it says `tiny` the folder of a task's untrained one for the digits."""
    if settings.path != "tiny":
        return settings
    return replace(settings, path=str(untrained(task, "tiny", (1, 8, 8), 10)))


def place(settings: Backbone) -> Path:
    """The folder of the network itself; of a pipeline's folder, its UNet's.

    Raises:
        ConfigError: there is none.
    """
    if settings.path.startswith(("./", "../", "/")) and not Path(settings.path).is_dir():
        raise ConfigError(
            f"backbone.path={settings.path!r} is not there: make it by `fedgen pretrain RECIPE`, "
            "or give a folder of diffusers', or a hub id"
        )
    folder = backbones.find(settings)
    return folder / "unet" if (folder / "model_index.json").is_file() else folder


def network(settings: Backbone, kind: Any, device: torch.device) -> tuple[Any, Path, str]:
    """A network of diffusers', the folder it came from, and the SHA-256 of its weights.

    A pipeline's folder gives its UNet.

    Raises:
        ConfigError: there is none, or it is another kind of network, or only a pickle.
    """
    folder = place(settings)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"backbone.path={settings.path!r}: {folder} holds no safetensors weights (pickles are "
            "not read): make one by `fedgen pretrain RECIPE`, or give a folder of diffusers'"
        )
    kept = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    try:
        made = whole(kind, folder, kept).to(device)
    except FAILURES as error:
        reason = describe(error)
        raise ConfigError(
            f"backbone.path={settings.path!r} is no {kind.__name__} ({reason}): take another"
        ) from None
    return made.eval(), folder, backbones.digest(weights)


def whole(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of diffusers' from a folder that holds every weight of it, and no other.

    Raises:
        ValueError: the folder is another kind's, or a weight is missing or unknown: diffusers alone
            would read it as far as it fits.
    """
    told = kind.load_config(folder, local_files_only=True).get("_class_name", kind.__name__)
    if told != kind.__name__:
        raise ValueError(f"it holds {told}")
    made, loading = kind.from_pretrained(
        folder,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if odd := [*loading["missing_keys"], *loading["unexpected_keys"]]:
        raise ValueError(f"{len(odd)} weights are missing or unknown, {sorted(odd)[0]!r} first")
    return made


def adapted(
    name: str, kind: Any, targets: Sequence[str], settings: Settings, *, full: bool, **how: Any
) -> Adapted:
    """A network of ours, loaded, frozen and adapted.

    Args:
        name: of the task.
        kind: of the network.
        targets: the layers to adapt where the settings name none.
        settings: of the run.
        full: train every weight instead of an adapter.
        how: `device`, where the network goes; and what else an `Adapted` knows.
    """
    net, folder, digest = network(chosen(settings.backbone, name), kind, how.pop("device"))
    where = {"folder": folder, "sha256": digest, "weights": WEIGHTS, "write": partial(write, net)}
    return adapt(net, settings.adapter, targets, full=full, **where, **how)


def write(network: Any, folder: Path, weights: Leaves) -> None:
    """A folder that diffusers loads: a network's configuration, and these weights."""
    network.save_config(folder)
    save_file(
        {k: v.detach().float().contiguous().cpu() for k, v in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
