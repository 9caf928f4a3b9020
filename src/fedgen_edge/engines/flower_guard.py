"""The one Flower that the files beside this work with, checked before any of it is imported.

They use its private helpers, which change with every release; so a file of ours that imports any of
them imports this first.
"""

from importlib.metadata import PackageNotFoundError, version

from fedgen_edge.errors import CarrierError, MissingExtraError

FLOWER = "1.41.0"


def check(found: str | None) -> None:
    """Let this Flower pass, and no other.

    Raises:
        MissingExtraError: there is none.
        CarrierError: it is of another version.
    """
    if found is None:
        raise MissingExtraError("a federation over a network", "flower")
    if found != FLOWER:
        raise CarrierError(
            f"flwr {found} is installed, and only {FLOWER} carries messages here: "
            f'pip install "flwr=={FLOWER}"'
        )


def installed() -> str | None:
    """Version of the Flower that is installed, if any."""
    try:
        return version("flwr")
    except PackageNotFoundError:
        return None


check(installed())
