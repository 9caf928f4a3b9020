"""Seconds of a run, part by part, as far as speeds and links are known."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedgen_edge.config import Settings
from fedgen_edge.planning.speed import Speed
from fedgen_edge.planning.traffic import Parts, Road, Round, parts

SHOWN = 1000
"""Clients among whom the slowest is looked for."""


@dataclass(frozen=True)
class Time:
    """Seconds; none where nothing is known of it."""

    source: str
    """Whose speed a step's is."""
    step: float | None
    down: float | None
    """Of the slowest client, as the next two."""
    train: float | None
    up: float | None
    merge: float | None
    round: float | None
    """The mean of all rounds, with deadlines, over-selection and who drops out."""
    total: float | None


def time_of(
    settings: Settings,
    on: Road,
    done: Sequence[Round],
    speed: Speed | None,
    updates: int,
    steps: int | None,
) -> Time:
    """Of settings whose devices have a speed, if one is known."""
    devices = settings.devices
    each = (parts(devices, c, on.load(c, 0, steps or 0)) for c in range(min(SHOWN, on.among)))
    slowest: Parts = max(each, key=sum)
    knows = bool(devices.steps_per_second and steps)
    merge = 3 * updates * speed.per_byte if speed else None  # read, written side by side, read
    merge = merge or None
    mean = sum(r.seconds for r in done) / len(done) + (merge or 0.0) if knows else None
    return Time(
        source="",
        step=1 / min(devices.steps_per_second) if devices.steps_per_second else None,
        down=slowest.down if devices.down else None,
        train=slowest.train if knows else None,
        up=slowest.up if devices.up else None,
        merge=merge,
        round=mean,
        total=None if mean is None else mean * len(done),
    )
