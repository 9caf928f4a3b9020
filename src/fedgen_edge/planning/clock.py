"""Estimate the seconds of a run, part by part, as far as speeds and links are known."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedgen_edge.config import Settings
from fedgen_edge.planning.speed import Speed
from fedgen_edge.planning.traffic import (
    ClientSeconds,
    ClientTraffic,
    RoundTraffic,
    estimate_client_seconds,
)

MAX_CLIENTS = 1000
"""Maximum clients among which the slowest is sought."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds by part; None if unknown."""

    source: str
    """Where the speed of a step comes from."""
    step: float | None
    down: float | None
    """Seconds of the slowest client, as in the next two fields."""
    train: float | None
    up: float | None
    merge: float | None
    round: float | None
    """Mean over all rounds, including deadlines, over-selection and dropouts."""
    total: float | None


def estimate_time(
    settings: Settings,
    client_traffic: ClientTraffic,
    round_traffic: Sequence[RoundTraffic],
    speed: Speed | None,
    update_bytes: int,
    steps: int | None,
) -> TimeEstimate:
    """Estimate the time for settings whose devices have a speed, if one is known."""
    devices = settings.devices
    per_client = (
        estimate_client_seconds(devices, c, client_traffic.compute_load(c, 0, steps or 0))
        for c in range(min(MAX_CLIENTS, client_traffic.num_clients))
    )
    slowest: ClientSeconds = max(per_client, key=sum)
    is_known = bool(devices.steps_per_second and steps)
    merge = 3 * update_bytes * speed.per_byte if speed else None  # read, written as a stack, read
    merge = merge or None
    mean = (
        sum(r.seconds for r in round_traffic) / len(round_traffic) + (merge or 0.0)
        if is_known
        else None
    )
    return TimeEstimate(
        source="",
        step=1 / min(devices.steps_per_second) if devices.steps_per_second else None,
        down=slowest.down if devices.down else None,
        train=slowest.train if is_known else None,
        up=slowest.up if devices.up else None,
        merge=merge,
        round=mean,
        total=None if mean is None else mean * len(round_traffic),
    )
