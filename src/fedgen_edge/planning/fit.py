"""What each device has room for: the rank that its client trains."""

from dataclasses import replace

import torch

from fedgen_edge.config import Settings
from fedgen_edge.errors import ConfigError
from fedgen_edge.planning.memory import client_bytes
from fedgen_edge.tasks.backbones import precision
from fedgen_edge.tasks.outline import config_of


def fitted(settings: Settings, device: torch.device) -> Settings:
    """The settings with a rank for each device: the largest that its memory holds.

    Ranks are those of `adapter.ranks`; without them there is but one, and a device has room for it.
    What training takes is counted, and differs little from rank to rank: most of it is the
    backbone's, and what a batch leaves behind.

    Args:
        settings: of the run.
        device: where a simulation computes, by which a backbone's precision may go.

    Raises:
        ConfigError: a device holds no adapter at all, or pictures are learnt, of which nothing can
            be counted beforehand.
    """
    told, ranks = settings.devices.memory, sorted({*settings.adapter.ranks})
    if not told:
        return settings
    if settings.task != "language":
        raise ConfigError(
            f"devices.memory={list(told)} is for text, and task={settings.task!r}: leave it out"
        )
    config = config_of(settings.backbone)
    how = "float32" if precision(settings.backbone, device) == torch.float32 else "bf16"
    needs = {r: client_bytes(settings, config, how, r) for r in ranks or [settings.adapter.rank]}
    for at, room in enumerate(told):
        if room < min(needs.values()):
            raise ConfigError(
                f"devices.memory[{at}]={room:g} is below {min(needs.values())}, the bytes that "
                f"training takes with rank {min(needs)}: give more, or lower training.batch or "
                "data.length"
            )
    each = tuple(max(r for r, need in needs.items() if need <= room) for room in told)
    return replace(settings, adapter=replace(settings.adapter, ranks=each if ranks else ()))
