import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = [
    (Requirement(line.partition("--hash")[0]), line.count("--hash=sha256:"))
    for line in LOCK.replace("\\\n", " ").splitlines()
]


def wanted() -> Iterator[Requirement]:
    """What quickstart, the tests and the build of the package ask for; torch comes by itself."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    lines = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *table["dependency-groups"]["lock"],
        *table["build-system"]["requires"],
    ]
    yield from (Requirement(line) for line in lines if not line.startswith("torch>"))


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_range_holds_exactly_one_locked_version(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0",
                   "platform_python_implementation": "CPython", "sys_platform": "linux",
                   "implementation_name": "cpython", "platform_machine": "x86_64"}  # fmt: skip
    for requirement in wanted():
        pins = [
            pin
            for pin, _ in PINS
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
            and (pin.marker is None or pin.marker.evaluate(environment))
        ]
        assert len(pins) == 1, requirement
        (exact,) = pins[0].specifier
        assert exact.operator == "=="
        assert exact.version in requirement.specifier, requirement


def test_what_is_locked_has_hashes_and_names_no_host() -> None:
    assert all(hashes for _, hashes in PINS)
    assert not re.search(r"https?:|index-url|find-links", LOCK)
    assert "torch" not in {pin.name for pin, _ in PINS}
