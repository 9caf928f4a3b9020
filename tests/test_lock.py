import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK, KIT = "requirements.lock", "requirements-kit.lock"
KIT_EXTRAS = ("flower", "images", "hub", "compress")


def pins(lock: str) -> list[tuple[Requirement, frozenset[str]]]:
    """Each pin of a lock, with its hashes."""
    lines = (ROOT / lock).read_text().replace("\\\n", " ").splitlines()
    return [
        (
            Requirement(line.partition("--hash")[0]),
            frozenset(re.findall(r"--hash=sha256:(\w+)", line)),
        )
        for line in lines
    ]


def wanted(lock: str) -> Iterator[Requirement]:
    """What quickstart, the tests and the build ask for, or a kit; torch comes by itself."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    extras = KIT_EXTRAS if lock == KIT else ("test", "docs")
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    if lock == LOCK:
        lines += [*table["dependency-groups"]["lock"], *table["build-system"]["requires"]]
    lines += project["dependencies"]
    yield from (Requirement(line) for line in lines if not line.startswith("torch>"))


@pytest.mark.parametrize("lock", [LOCK, KIT])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_range_holds_exactly_one_locked_version(python: str, lock: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0",
                   "platform_python_implementation": "CPython", "sys_platform": "linux",
                   "implementation_name": "cpython", "platform_machine": "x86_64"}  # fmt: skip
    for requirement in wanted(lock):
        matching = [
            pin
            for pin, _ in pins(lock)
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
            and (pin.marker is None or pin.marker.evaluate(environment))
        ]
        assert len(matching) == 1, requirement
        (exact,) = matching[0].specifier
        assert exact.operator == "=="
        assert exact.version in requirement.specifier, requirement


@pytest.mark.parametrize("lock", [LOCK, KIT])
def test_what_is_locked_has_hashes_and_names_no_host(lock: str) -> None:
    assert all(hashes for _, hashes in pins(lock))
    assert not re.search(r"https?:|index-url|find-links", (ROOT / lock).read_text())
    assert "torch" not in {pin.name for pin, _ in pins(lock)}


def test_a_kit_installs_the_versions_of_the_tests_with_the_same_hashes() -> None:
    tested = {(pin.name, str(pin.specifier), hashes) for pin, hashes in pins(LOCK)}
    assert {(pin.name, str(pin.specifier), hashes) for pin, hashes in pins(KIT)} < tested
