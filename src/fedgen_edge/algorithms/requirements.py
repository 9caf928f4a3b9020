"""What a method requires of the other settings: the conflict, or None."""

from collections.abc import Callable

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Compression, Settings

PLAIN_SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0}
"""Fields of `training` with which a step is the learning rate times the gradient."""


def find_no_conflict(_settings: Settings) -> str | None:
    """Accept any settings."""
    return None


def find_downlink_conflict(settings: Settings) -> str | None:
    """Reject a lossy downlink: values that it drops would be merged as if clients had lost them."""
    if settings.downlink.sparsify == "all":
        return None
    return (
        "merges what clients hold, and cannot where they receive a part of it by "
        f"downlink.sparsify={settings.downlink.sparsify!r}: say downlink.sparsify='all', and "
        "shorten by downlink.dtype"
    )


def find_bases_conflict(settings: Settings) -> str | None:
    """Reject settings under which the first rounds cannot compute bases that all sides share."""
    if settings.downlink != Compression():
        return "needs its bases as they are, and [downlink] changes them: leave it out"
    if (settings.uplink.low_rank, settings.uplink.sparsify) != (0, "all"):
        return (
            "finds its bases in whole gradients, and uplink.low_rank and uplink.sparsify send a "
            "part: leave them out, or say uplink.dtype='int8'"
        )
    if settings.adapter.initial is not None:
        initial = str(settings.adapter.initial)
        return f"seeks bases of its own, and cannot with adapter.initial={initial!r}: leave it out"
    if (rounds := settings.federation.rounds) < 3:
        return f"trains after two rounds, and federation.rounds={rounds}: set it to 3 or more"
    absence_settings = {
        "devices.available": settings.devices.available,
        "devices.fails": settings.devices.fails,
        "federation.deadline": settings.federation.deadline,
    }
    for name, value in absence_settings.items():
        if value:
            return (
                f"finds its bases in the first two rounds, and with {name}={value} nobody may "
                "finish one of them: leave it out"
            )
    return None


def find_sgd_conflict(settings: Settings) -> str | None:
    """Require that a client's change, as sent, is learning rate times steps times mean gradient."""
    if (settings.uplink, settings.downlink) != (Compression(), Compression()):
        return (
            "has both sides reckon with what was sent, and [uplink] and [downlink] change it: "
            "leave them out"
        )
    values = {k: getattr(settings.training, k) for k in PLAIN_SGD}
    conflicting = [k for k, value in values.items() if value != PLAIN_SGD[k]]
    if not conflicting:
        return None
    current = ", ".join(f"training.{k}={values[k]!r}" for k in conflicting)
    remedy = ", ".join(f"training.{k}={PLAIN_SGD[k]!r}" for k in conflicting)
    return f"takes plain steps of SGD for gradients, and cannot with {current}: set {remedy}"


def find_adapter_conflict(algorithm: Algorithm, settings: Settings) -> str | None:
    """Reject stacking full models and starting them from an adapter."""
    if algorithm.adapts == "lora":
        return None
    if settings.engine.name == "stacked":
        return (
            "trains a whole model for each client, and engine.name='stacked' cannot carry it: say "
            "serial, or auto"
        )
    if settings.adapter.initial is not None:
        return (
            f"trains every weight, and adapter.initial={str(settings.adapter.initial)!r} cannot "
            "begin it: leave it out, or merge it into the backbone first"
        )
    return None


def find_epochs_conflict(algorithm: Algorithm, settings: Settings) -> str | None:
    """Require epochs for the shared leaves after those for the personal leaves."""
    t, head_epochs = settings.training, algorithm.head_epochs
    if not head_epochs or (not t.steps and t.epochs > head_epochs):
        return None
    epoch_setting = f"training.steps={t.steps}" if t.steps else f"training.epochs={t.epochs}"
    return (
        f"trains what stays at the client for method.head_epochs={head_epochs}, and "
        f"{epoch_setting} leaves no "
        f"epoch for what is shared: say training.epochs={head_epochs + 1} or more, and no steps"
    )


def find_sums_conflict(algorithm: Algorithm, settings: Settings) -> str | None:
    """Reject sums on workers for a method that needs every client's own change."""
    if (
        algorithm.partial_aggregation
        or settings.engine.name != "ray"
        or not settings.engine.aggregate_on_workers
    ):
        return None
    return (
        "needs each client's change by itself, and cannot with engine.aggregate_on_workers=true: "
        "leave it out"
    )


Requirement = Callable[[Algorithm, Settings], str | None]
COMMON_REQUIREMENTS: tuple[Requirement, ...] = (
    find_adapter_conflict,
    find_epochs_conflict,
    find_sums_conflict,
)
"""Requirements of every method."""
