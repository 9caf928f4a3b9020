"""What keeps Flower from the internet; it must stand before Flower is imported."""

from collections.abc import Mapping
from pathlib import Path

ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""For every process that imports it."""


def environment(home: Path) -> dict[str, str]:
    """`ENVIRONMENT`, and the folder where Flower keeps what it likes."""
    return {**ENVIRONMENT, "FLWR_HOME": str(home.resolve())}
