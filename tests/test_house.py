"""The catalogue is told whole; style, types and imports are `make lint`'s."""

import re
from pathlib import Path

import pytest

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS, method
from fedgen_edge.config import Method

ROOT = Path(__file__).parents[1]


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
