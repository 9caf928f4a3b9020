"""The one Flower that the files beside this work with, checked before any of it is imported.

They use its private helpers, which change with every release; so a file of ours that imports any of
them imports this first.
"""

from importlib.metadata import PackageNotFoundError, version

from fedgen_edge.errors import CarrierError, MissingExtraError

FLOWER = "1.41.0"


def check_version(installed_version: str | None) -> None:
    """Let this Flower pass, and no other.

    Raises:
        MissingExtraError: there is none.
        CarrierError: it is of another version.
    """
    if installed_version is None:
        raise MissingExtraError("a federation over a network", "flower")
    if installed_version != FLOWER:
        raise CarrierError(
            f"flwr {installed_version} is installed, and only {FLOWER} carries messages here: "
            f'pip install "flwr=={FLOWER}"'
        )


def get_installed_version() -> str | None:
    """Version of the Flower that is installed, if any."""
    try:
        return version("flwr")
    except PackageNotFoundError:
        return None


check_version(get_installed_version())
