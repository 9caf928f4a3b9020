"""The catalogue is told whole; style, types and imports are `make lint`'s."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedgen_edge
import house_language
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS, make_algorithm
from fedgen_edge.algorithms.properties import MergeProperties
from fedgen_edge.config import Method

ROOT = Path(__file__).parents[1]


METHODS_PAGE = ROOT / "docs" / "methods" / "index.md"
CARD_PARTS = ("Idea", "Formula", "Settings", "Cost", "When to use", "Source")


def test_the_table_of_methods_in_the_docs_is_the_table_of_methods() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\(", METHODS_PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_card_where_its_row_points(name: str) -> None:
    (family,) = re.findall(rf"\[`{name}`\]\((\S+\.md)#{name}\)", METHODS_PAGE.read_text("utf-8"))
    page = (METHODS_PAGE.parent / family).read_text("utf-8")
    (card,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert tuple(re.findall(r"^\*\*([A-Z][a-z ]+)\.\*\*", card, re.MULTILINE)) == CARD_PARTS
    # the files that it names are there
    for path in re.findall(r"`((?:tests/)?[a-z_]+/[a-z_/]+\.py)`", card):
        assert (ROOT / path).exists() or (ROOT / "src" / "fedgen_edge" / path).exists(), path


def test_the_page_of_methods_says_what_they_declare_of_merging() -> None:
    page = METHODS_PAGE.read_text("utf-8")
    listed = re.findall(
        r"^- \*\*`(\w+)`\*\*, [^.]*\.\s+Of( all\s+but)?:([^.]*)\.$", page, re.MULTILINE
    )
    assert [law for law, *_ in listed] == [*MergeProperties._fields]
    for law, but, names in listed:
        holds = [n for n in METHODS if getattr(METHODS[n].properties, law) == (not but)]
        assert re.findall(r"`([^`]+)`", names) == holds


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_catalogue_says_what_it_is_and_can_be_made(name: str) -> None:
    entry = METHODS[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert entry.summary
    assert "\n" not in entry.summary
    assert isinstance(make_algorithm(Method(name=name)), Algorithm)


def test_the_public_names_are_those_that_can_be_seen_and_used() -> None:
    assert {*dir(fedgen_edge)} == {*fedgen_edge.__all__, "__version__"}
    assert {*fedgen_edge.__all__} == {*fedgen_edge._HOMES}
    for name in fedgen_edge.__all__:
        assert getattr(fedgen_edge, name) is not None
    with pytest.raises(AttributeError, match="no public name"):
        _ = fedgen_edge.nothing


@pytest.mark.parametrize("module", ["cli.main", "deploy.server.status", "report.summary"])
def test_what_only_reads_a_run_waits_for_no_torch(module: str) -> None:
    told = f"import sys, fedgen_edge.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0


SAMPLE = """
class Row: ...

def judged(updates):
    found = [u for u in updates]
    total = 0
    for update in found:
        total += update

    return total, len(found)

def split_rounds(one_round):
    rest = one_round
    return rest

def padded_up(x): ...
def feed(x): ...
"""


def test_names_are_counted_as_a_reader_would(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text(SAMPLE)
    (tmp_path / "room" / "b.py").write_text("class Row: ...\n")
    modules = house_language.read_modules(tmp_path)
    offenders = house_language.find_offenders(modules)
    by_kind = {(o.kind, o.name) for o in offenders}
    # `rest` is gone after two lines, `split` and `feed` are verbs
    assert by_kind == {
        ("participle", "judged"),
        ("participle", "padded_up"),
        ("pronoun", "found"),
        ("class", "Row"),
    }
    counts = house_language.count(tmp_path, modules, offenders)
    assert counts["functions"] == 4
    assert counts["participle functions, %"] == 50
    # updates, found, total, update, u; one_round, rest; x, x
    assert counts["bindings"] == 9
    assert counts["class names with two meanings"] == 1
    assert (counts["largest folder, files"], counts["loose modules"]) == (2, 0)
