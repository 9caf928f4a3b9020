"""The software in a kit: our own wheel, and exact versions of the rest with hashes.

Torch is not included: each machine chooses its build, for a CPU or a GPU.
"""

from importlib.metadata import version

from packaging.version import Version

from fedgen_edge.deploy.provision.wheel import build_wheel
from fedgen_edge.files import find_shipped

LOCK = "requirements-kit.lock"
"""Everything that any recipe needs at a site, written by `make lock`."""
PYTHONS = ("3.11", "3.12", "3.13")
"""Python versions that the lock covers."""


def pack_software() -> dict[str, bytes]:
    """Return this package's wheel and a requirements file for its dependencies, by name."""
    name, wheel = build_wheel()
    return {name: wheel, "requirements.txt": find_shipped(LOCK).read_bytes()}


def torch_version() -> str:
    """Return the release of the installed torch, without its build."""
    return Version(version("torch")).public
