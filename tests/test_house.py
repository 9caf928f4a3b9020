"""The catalogue is told whole; style, types and imports are `make lint`'s."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedgen_edge
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.laws import Laws
from fedgen_edge.algorithms.methods import METHODS, method
from fedgen_edge.config import Method

ROOT = Path(__file__).parents[1]


def test_the_catalogue_of_the_docs_is_the_catalogue() -> None:
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert re.findall(r"^\|\s*`([^`]+)`\s*\|", page, re.MULTILINE) == list(METHODS)


def test_the_page_of_methods_says_what_they_declare_of_merging() -> None:
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    told = re.findall(r"^- \*\*`(\w+)`\*\*, [^.]*\. Of( all but)?:([^.]*)\.$", page, re.MULTILINE)
    assert [law for law, *_ in told] == [*Laws._fields]
    for law, but, names in told:
        holds = [n for n in METHODS if getattr(METHODS[n].laws, law) == (not but)]
        assert re.findall(r"`([^`]+)`", names) == holds


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_catalogue_says_what_it_is_and_can_be_made(name: str) -> None:
    entry = METHODS[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert entry.about
    assert "\n" not in entry.about
    assert isinstance(method(Method(name=name)), Algorithm)


def test_the_public_names_are_those_that_can_be_seen_and_used() -> None:
    assert {*dir(fedgen_edge)} == {*fedgen_edge.__all__, "__version__"}
    assert {*fedgen_edge.__all__} == {*fedgen_edge._HOMES}
    for name in fedgen_edge.__all__:
        assert getattr(fedgen_edge, name) is not None
    with pytest.raises(AttributeError, match="no public name"):
        _ = fedgen_edge.nothing


@pytest.mark.parametrize("module", ["cli", "deploy.status", "experiments.summary"])
def test_what_only_reads_a_run_waits_for_no_torch(module: str) -> None:
    told = f"import sys, fedgen_edge.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
