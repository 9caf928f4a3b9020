"""What there is, what is needed of it, and what breaks first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgen_edge.config import Settings

GB = 1e9


@dataclass(frozen=True)
class Limits:
    """What a plan is told beside a run's settings."""

    memory: float | None = None
    """Of a client's device, in bytes."""
    server_memory: float | None = None
    """Of the server, in bytes."""
    server_link: float | None = None
    """Of the server, both ways together, in bytes a second."""
    examples: int | None = None
    """Blocks of text that a client has for training."""


@dataclass(frozen=True)
class Bound:
    """One limit, and what is needed of it."""

    what: str
    need: float
    limit: float
    unit: str
    """Bytes or seconds."""
    helps: str
    """What would bring the need down."""

    @property
    def share(self) -> float:
        """Of the limit; above 1 it breaks."""
        return self.need / self.limit


def bounds(
    settings: Settings,
    told: Limits,
    memory: Mapping[str, Any],
    server: Mapping[str, int],
    load: tuple[Any, Any],
) -> list[Bound]:
    """Every limit that is known, the nearest first.

    Args:
        settings: of the run.
        told: what there is.
        memory: a client's, by precision, the settings' own first.
        server: the server's bytes, by part.
        load: the plan's traffic and time.
    """
    traffic, time = load
    found: list[Bound] = []
    if told.memory:
        found.append(_device(told.memory, memory))
    if settings.federation.deadline:
        spent = {"down": time.down or 0.0, "train": time.train or 0.0, "up": time.up or 0.0}
        helps = {
            "down": "downlink.values='int8', or a lower adapter.rank",
            "train": "fewer training.steps, or a smaller training.batch",
            "up": "uplink.values='int8', or a lower adapter.rank",
        }[max(spent, key=lambda part: spent[part])]
        limit = settings.federation.deadline
        found.append(Bound("the slowest client's round", sum(spent.values()), limit, "s", helps))
    held = sum(server[part] for part in ("adapter", "state", "updates"))
    if told.server_memory:
        helps = "a smaller federation.cohort, or a lower adapter.rank"
        found.append(Bound("the server's memory", float(held), told.server_memory, "bytes", helps))
    window = settings.federation.deadline or time.round
    if told.server_link and window:
        seconds = (traffic.round_down + traffic.round_up) / told.server_link
        helps = "a smaller federation.cohort, or uplink.values='int8' and downlink.values='int8'"
        found.append(Bound("the server's link in a round", seconds, window, "s", helps))
    return sorted(found, key=lambda bound: -bound.share)


def _device(limit: float, memory: Mapping[str, Any]) -> Bound:
    """Of a client; only what a run can do is advised."""
    precision, needed = next(iter(memory.items()))
    helps = "a smaller training.batch, a shorter data.length, or a smaller backbone"
    if precision == "float32":
        helps = f"backbone.precision='bf16', {helps}"
    return Bound("the device's memory", float(needed.total), limit, "bytes", helps)


def sentence(found: Sequence[Bound]) -> str:
    """What breaks first, and what would help, in one line."""
    if not found:
        return (
            "no limit is known: say --memory, --server-memory, --server-link or federation.deadline"
        )
    first = found[0]
    told = f"{_said(first.need, first.unit)} of {_said(first.limit, first.unit)}"
    if first.share <= 1:
        return f"nothing breaks; nearest to its limit is {first.what}, {told}"
    return f"{first.what} breaks first, {told}: {first.helps}"


def _said(value: float, unit: str) -> str:
    return f"{value / GB:.3g} GB" if unit == "bytes" else f"{value:.3g} s"
