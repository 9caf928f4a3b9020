"""The house's own rules: imports run one way, the style is kept, and the catalogue is told."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS, method
from fedgen_edge.config import Method

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
PLAIN = {
    "NO_COLOR": "1",
    "TERM": "dumb",
    "PATH": f"{TOOLS}:/usr/bin:/bin",
    "HOME": str(Path.home()),
}


@pytest.mark.parametrize(
    "command",
    ["lint-imports --no-cache", "ruff check .", "ruff format --check .", "basedpyright"],
    ids=["house-imports", "house-ruff", "house-format", "house-types"],
)
def test_the_house_is_in_order(command: str) -> None:
    tool, *rest = command.split()
    told = [str(TOOLS / tool), *rest]
    found = subprocess.run(told, cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_catalogue_of_the_docs_is_the_catalogue() -> None:
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert re.findall(r"^\|\s*`([^`]+)`\s*\|", page, re.MULTILINE) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_catalogue_says_what_it_is_and_can_be_made(name: str) -> None:
    entry = METHODS[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert entry.about
    assert "\n" not in entry.about
    assert isinstance(method(Method(name=name)), Algorithm)
