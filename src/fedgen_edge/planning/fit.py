"""Choose the rank that each client trains, by the memory of its device."""

from dataclasses import replace

import torch

from fedgen_edge.config import Settings
from fedgen_edge.errors import ConfigError
from fedgen_edge.planning.memory import estimate_client_bytes
from fedgen_edge.tasks.backbones.pretrained import choose_dtype
from fedgen_edge.tasks.language.config_only import load_config


def fit_ranks(settings: Settings, device: torch.device) -> Settings:
    """Return the settings with a rank for each device: the largest that fits in its memory.

    The ranks are those of `adapter.ranks`; without them there is only one, which must fit.
    The memory of training is counted, and differs little between ranks: most of it is the
    backbone's and the activations'.

    Args:
        settings: settings of the run.
        device: where a simulation computes, which may decide the backbone's precision.

    Raises:
        ConfigError: a device has no room for any adapter, or the task is one of images, whose
            memory cannot be counted beforehand.
    """
    device_memory, ranks = settings.devices.memory, sorted({*settings.adapter.ranks})
    if not device_memory:
        return settings
    if settings.task != "language":
        raise ConfigError(
            f"devices.memory={list(device_memory)} is for text, and "
            f"task={settings.task!r}: leave it out"
        )
    config = load_config(settings.backbone)
    precision_name = (
        "float32" if choose_dtype(settings.backbone, device) == torch.float32 else "bf16"
    )
    bytes_by_rank = {
        r: estimate_client_bytes(settings, config, precision_name, r)
        for r in ranks or [settings.adapter.rank]
    }
    for at, room in enumerate(device_memory):
        if room < min(bytes_by_rank.values()):
            raise ConfigError(
                f"devices.memory[{at}]={room:g} is below {min(bytes_by_rank.values())}, "
                "the bytes that "
                f"training takes with rank {min(bytes_by_rank)}: give more, or lower "
                "training.batch or "
                "data.length"
            )
    device_ranks = tuple(
        max(r for r, need in bytes_by_rank.items() if need <= room) for room in device_memory
    )
    return replace(settings, adapter=replace(settings.adapter, ranks=device_ranks if ranks else ()))
