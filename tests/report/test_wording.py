"""Where clients chose from several adapters, no page speaks of a global one."""

import json
from pathlib import Path

import pytest

from fedgen_edge.report.diagnose import SIGNATURES, diagnose
from fedgen_edge.report.page import headline, write
from fedgen_edge.report.summary import RunFiles, read
from support.reports import make_run

GLOBAL, CHOSEN = "the global adapter", "the chosen cluster's adapter"


def choosing(folder: Path, log: str = "personal") -> Path:
    """A run of IFCA; each client was tuned, or trained in the last round, from the second one."""
    make_run(folder, bits=3)
    path = folder / f"{log}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for own in rows if log == "personal" else rows[-1]["clients"]:
        own["cluster"] = 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = folder / "settings.toml"
    settings.write_text(settings.read_text().replace("fedgen-edge", "ifca"))
    return folder


@pytest.mark.parametrize("log", ["personal", "rounds"])
def test_the_headline_names_the_chosen_clusters_adapter(tmp_path: Path, log: str) -> None:
    # the model's 4 bits are 7, which is 128
    told = headline(read(choosing(tmp_path / "run", log)))
    assert f"128.0 with {CHOSEN}, 8.00 with personal adapters" in told


def findings(run: RunFiles) -> str:
    return json.dumps(diagnose(run))


def test_findings_name_it_too_in_titles_and_evidence_and_advice(tmp_path: Path) -> None:
    plain = findings(read(make_run(tmp_path / "plain", bits=3)))
    told = findings(read(choosing(tmp_path / "ifca")))
    # worse than the backbone's 64, and than training alone
    assert "The global adapter is worse than the backbone for some clients" in plain
    assert "The chosen cluster's adapter is worse than the backbone for some clients" in told
    assert f"with {GLOBAL} is" in plain
    assert f"with {CHOSEN} is" in told
    assert "global" not in told


def test_no_advice_speaks_of_the_global_adapter_in_other_words() -> None:
    for _, title, _, advice in SIGNATURES:
        for text in (title, advice):
            assert "global" not in text.lower().replace(GLOBAL, "")


def test_pages_of_one_run_and_of_several_say_what_the_column_is(tmp_path: Path) -> None:
    run, other = choosing(tmp_path / "run"), make_run(tmp_path / "other")
    note = "is the chosen cluster&#39;s adapter: what each client chose."
    page = write([run], tmp_path / "one.html").read_text()
    assert f"The row or column global {note}" in page
    assert GLOBAL not in page.lower()
    page = write([run, other], tmp_path / "two.html").read_text()
    assert f"The row or column global of run {note}" in page
    assert note not in write([other], tmp_path / "plain.html").read_text()
