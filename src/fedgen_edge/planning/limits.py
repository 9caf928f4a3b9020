"""Compare the resources with the needs, and find the limit that breaks first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgen_edge.config import Settings

GB = 1e9


@dataclass(frozen=True)
class Resources:
    """Resources that a plan assumes, in addition to a run's settings."""

    memory: float | None = None
    """Memory of a client's device, in bytes."""
    server_memory: float | None = None
    """Memory of the server, in bytes."""
    server_link: float | None = None
    """Bandwidth of the server, both directions together, in bytes per second."""
    examples: int | None = None
    """Blocks of text that a client has for training."""


@dataclass(frozen=True)
class ResourceLimit:
    """One limit, and the need for it."""

    what: str
    need: float
    limit: float
    unit: str
    """Bytes or seconds."""
    helps: str
    """What would reduce the need."""

    @property
    def share(self) -> float:
        """Return the need over the limit; above 1 the limit breaks."""
        return self.need / self.limit


def find_limits(
    settings: Settings,
    resources: Resources,
    memory: Mapping[str, Any],
    server: Mapping[str, int],
    estimates: tuple[Any, Any],
) -> list[ResourceLimit]:
    """List every known limit, the tightest first.

    Args:
        settings: settings of the run.
        resources: the available resources.
        memory: a client's memory by precision; that of the settings comes first.
        server: the server's bytes, by part.
        estimates: the plan's traffic and time.
    """
    traffic, time = estimates
    resource_limits: list[ResourceLimit] = []
    if resources.memory:
        resource_limits.append(_make_device_limit(resources.memory, memory))
    if settings.federation.deadline:
        seconds_by_part = {
            "down": time.down or 0.0,
            "train": time.train or 0.0,
            "up": time.up or 0.0,
        }
        advice = {
            "down": "downlink.dtype='int8', or a lower adapter.rank",
            "train": "fewer training.steps, or a smaller training.batch",
            "up": "uplink.dtype='int8', or a lower adapter.rank",
        }[max(seconds_by_part, key=lambda part: seconds_by_part[part])]
        limit = settings.federation.deadline
        resource_limits.append(
            ResourceLimit(
                "the slowest client's round", sum(seconds_by_part.values()), limit, "s", advice
            )
        )
    server_bytes = sum(server[part] for part in ("adapter", "state", "updates"))
    if resources.server_memory:
        advice = "a smaller federation.cohort, or a lower adapter.rank"
        resource_limits.append(
            ResourceLimit(
                "the server's memory", float(server_bytes), resources.server_memory, "bytes", advice
            )
        )
    round_seconds = settings.federation.deadline or time.round
    if resources.server_link and round_seconds:
        seconds = (traffic.round_down + traffic.round_up) / resources.server_link
        advice = "a smaller federation.cohort, or uplink.dtype='int8' and downlink.dtype='int8'"
        resource_limits.append(
            ResourceLimit("the server's link in a round", seconds, round_seconds, "s", advice)
        )
    return sorted(resource_limits, key=lambda bound: -bound.share)


def _make_device_limit(limit: float, memory: Mapping[str, Any]) -> ResourceLimit:
    """Make a client's limit; the advice only names what a run can do."""
    precision, estimate = next(iter(memory.items()))
    advice = "a smaller training.batch, a shorter data.length, or a smaller backbone"
    if precision == "float32":
        advice = f"backbone.precision='bf16', {advice}"
    return ResourceLimit("the device's memory", float(estimate.total), limit, "bytes", advice)


def describe_nearest_limit(resource_limits: Sequence[ResourceLimit]) -> str:
    """Say in one line what breaks first, and what would help."""
    if not resource_limits:
        return (
            "no limit is known: say --memory, --server-memory, --server-link or federation.deadline"
        )
    nearest = resource_limits[0]
    amounts = (nearest.need, nearest.limit)
    comparison = " of ".join(_format_amount(amount, nearest.unit) for amount in amounts)
    if nearest.share <= 1:
        return f"nothing breaks; nearest to its limit is {nearest.what}, {comparison}"
    return f"{nearest.what} breaks first, {comparison}: {nearest.helps}"


def _format_amount(value: float, unit: str) -> str:
    return f"{value / GB:.3g} GB" if unit == "bytes" else f"{value:.3g} s"
