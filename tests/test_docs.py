import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import benchmark_tables
import fill
import items
import kept
import quotes
from fedgen_edge.errors import ConfigError
from fedgen_edge.runs.records import lines

ROOT = Path(__file__).parent.parent
PAGES = list(fill.find_pages())
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


def test_the_librarys_page_runs_and_its_adapter_is_served_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.S):
        exec(block, names)
    adapter = tmp_path / "runs" / "mine" / "adapters" / "global"
    assert adapter.is_dir()
    _serve_as_the_readme_says(str(adapter), capsys)


def _serve_as_the_readme_says(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
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
