"""What a kit carries to be installed: our own wheel, and exact versions of the rest with hashes.

Torch is not among them: which build it is, for a CPU or a GPU, is for each machine to choose.
"""

from importlib.metadata import version

from packaging.version import Version

from fedgen_edge.deploy.provision.wheel import build_wheel
from fedgen_edge.files import find_shipped

LOCK = "requirements-kit.lock"
"""All that any recipe needs at a site, whatever is installed here; `make lock` makes it."""
PYTHONS = ("3.11", "3.12", "3.13")
"""Versions of Python that the lock is made for."""


def pack_software() -> dict[str, bytes]:
    """The wheel of this package and a requirements file of all else that it needs, by name."""
    name, wheel = build_wheel()
    return {name: wheel, "requirements.txt": find_shipped(LOCK).read_bytes()}


def torch_version() -> str:
    """The release of torch that runs here, whatever its build."""
    return Version(version("torch")).public
