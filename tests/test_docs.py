import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import benchmark_tables
import docs_settings
import fill
import items
import kept
import quotes
from fedgen_edge.config import Settings, iter_settings
from fedgen_edge.errors import ConfigError
from fedgen_edge.runs.records import lines

ROOT = Path(__file__).parent.parent
PAGES = list(fill.find_pages())
DOCS = sorted((ROOT / "docs").rglob("*.md"))
SETTINGS = {name for name, _ in iter_settings(Settings())}
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_quote_what_the_records_say(page: Path) -> None:
    assert fill.fill_page(page) == page.read_text()


def test_a_mark_that_nothing_fills_is_one_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- quote:nothing -->1<!-- end -->")
    with pytest.raises(ConfigError, match=r"page.md: nothing is called quote:nothing"):
        fill.fill_page(page)


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.stem)
def test_no_measured_number_of_a_finding_is_typed_by_hand(page: Path) -> None:
    prose = fill.MARK.sub("", page.read_text())
    prose = re.sub(r"`[^`]*`|95 %", "", prose)  # settings, and the confidence level
    assert re.findall(r"\d+\.\d+|\d+ %", prose) == []


def test_every_item_that_has_records_and_every_quote_is_on_a_page() -> None:
    marks = {
        m.groups()[:2] for page in fill.find_pages() for m in fill.MARK.finditer(page.read_text())
    }
    for name, scale in items.list_shown():
        if kept.path_of(items.read(name, scale)).exists():
            assert ("results", f"{name}-{scale}") in marks
    assert {name for kind, name in marks if kind == "quote"} == {*quotes.read_quotes()}


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.stem)
def test_links_of_the_results_lead_somewhere(page: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if path.suffix == ".md" and anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in {
                re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads
            }


@pytest.mark.parametrize("kind", ["speed", "compiled", "memory", "peak"])
def test_a_benchmarks_table_names_the_backbone_that_its_record_names(kind: str) -> None:
    for label, record in benchmark_tables.read_benchmarks(kind).items():
        backbone = label.removesuffix("-AMX").removesuffix("-EPYC").removesuffix("-no-kernels")
        # a folder of a GGUF file is called MODEL.TYPE-HASH
        assert record["backbone"].split(".")[0] == backbone


@pytest.mark.parametrize("name", ["diffusion", "gan", "gan-skew", "vae"])
def test_samples_of_recipes_are_no_fewer_than_the_papers_comparison_may_have(name: str) -> None:
    rows = lines(kept.RESULTS / f"cifar10-{name}-recipe.jsonl")
    assert {row["clients"] >= 20 for row in rows} == {True}
    assert {test["made"] >= 2000 for row in rows for test in row["test"].values()} == {True}


def test_the_librarys_page_runs_and_its_adapter_is_served_as_the_quickstart_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    names: dict[str, object] = {}
    page = (ROOT / "docs" / "reference" / "library.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    adapter = tmp_path / "runs" / "mine" / "adapters" / "global"
    assert adapter.is_dir()
    _serve_as_the_quickstart_says(str(adapter), capsys)


def _serve_as_the_quickstart_says(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (block,) = [block for block in blocks if "AutoPeftModelForCausalLM" in block]
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(block.replace("runs/quickstart-1/adapters/clients/email", adapter), names)
    assert capsys.readouterr().out.startswith("Return the")
    # what the folder holds is what answers
    saved = load_file(f"{adapter}/adapter_model.safetensors")
    served = get_peft_model_state_dict(names["model"])
    assert saved.keys() == served.keys()
    assert all(torch.equal(saved[name], served[name]) for name in saved)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_links_of_the_pages_outside_of_the_site_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    parts = "|".join({name.partition(".")[0] for name in SETTINGS if "." in name})
    named = set(re.findall(rf"`\"?((?:{parts})\.[a-z_0-9]+)\b(?!\.)", page.read_text()))
    files_of_a_run = {f"{stem}.json" for stem in ("evaluation", "personal")}
    suffixes = (".toml", ".jsonl", ".md", ".json")
    assert {n for n in named if not f"{n}".endswith(suffixes)} - files_of_a_run <= SETTINGS


def test_the_page_of_settings_has_every_setting_once_with_what_it_does() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.*) \|$", docs_settings.make_page(), re.M)
    shown = [name for name, *_ in rows]
    assert set(shown) >= SETTINGS
    assert all(about for *_, about in rows)
    of_runs = [name for name in shown if name in SETTINGS]
    assert len(of_runs) == len(set(of_runs))
    assert {"quorum", "largest_weight"} <= set(shown)


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.stem)
def test_no_line_of_a_paragraph_begins_with_a_mark_which_would_end_it(page: Path) -> None:
    assert re.findall(r"^<!-- quote:.*", page.read_text(), re.MULTILINE) == []
