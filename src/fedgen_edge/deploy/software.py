"""What a kit carries to be installed: our own wheel, and exact versions of the rest with hashes.

Torch is not among them: which build it is, for a CPU or a GPU, is for each machine to choose.
"""

import re
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fedgen_edge.deploy.wheel import build_wheel
from fedgen_edge.errors import ConfigError
from fedgen_edge.files import find_shipped

LOCK = "requirements.lock"
PYTHONS = ("3.11", "3.12", "3.13")
"""Versions of Python that the lock is made for."""
CHOSEN_BY_SITE = "torch"


def pack_software(extras: Collection[str]) -> dict[str, bytes]:
    """The wheel of this package and a requirements file of all else that it needs, by name.

    Args:
        extras: of this package, which the federation needs.
    """
    name, wheel = build_wheel()
    locked = find_shipped(LOCK).read_text("utf-8")
    requirements = select_requirements(locked, find_required("fedgen-edge", extras))
    return {name: wheel, "requirements.txt": requirements.encode()}


def torch_version() -> str:
    """The release of torch that runs here, whatever its build."""
    return Version(version(CHOSEN_BY_SITE)).public


def find_required(package: str, extras: Collection[str]) -> set[str]:
    """Names of the libraries that a package needs with some extras, directly or not.

    Torch is left out, and so is what torch alone needs.
    """
    needed: set[tuple[str, frozenset[str]]] = set()
    waiting = [(package, frozenset(extras))]
    while waiting:
        for requirement in _direct_requirements(*waiting.pop()):
            entry = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if entry[0] != CHOSEN_BY_SITE and entry not in needed:
                needed.add(entry)
                waiting.append(entry)
    return {name for name, _ in needed}


def select_requirements(locked: str, names: Collection[str]) -> str:
    """The lines of a lock file, with their hashes, that pin some libraries.

    Raises:
        ConfigError: the lock has one of them not at all, or without a hash.
    """
    pins = [(name, lines) for name, lines in _pins(locked) if name in names]
    hashed = {name for name, lines in pins if "--hash=" in lines}
    if missing := sorted(set(names) - hashed):
        raise ConfigError(
            f"{LOCK} pins no {missing[0]} by a hash: make it again, from pyproject.toml"
        )
    return "".join(lines for _, lines in pins)


def _direct_requirements(package: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What a package asks for, under any Python of the lock; none where it is not installed."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({"python_version": p, "python_full_version": f"{p}.0", "extra": e})
            for p in PYTHONS
            for e in ("", *extras)
        ):
            yield requirement


def _pins(locked: str) -> Iterator[tuple[str, str]]:
    """Each pin of a lock: the library's name, and its lines without comments."""
    lines = [line for line in locked.splitlines() if not re.match(r"\s*(#|-[^-]|$)", line)]
    for pin in re.split(r"\n(?=\S)", "\n".join(lines)):
        if name := re.match(r"[\w.-]+", pin):
            yield canonicalize_name(name[0]), f"{pin}\n"
