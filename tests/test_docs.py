import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from fedgen_edge.runs.records import lines

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    """A script of `paper`, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "paper" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_quote_what_the_records_say() -> None:
    fill = script("fill")
    for page in fill.PAGES:
        above = page.parent == fill.ROOT
        assert fill.filled(page.read_text(), above=above) == page.read_text()


@pytest.mark.parametrize("kind", ["speed", "compiled", "memory", "peak"])
def test_a_benchmarks_table_names_the_backbone_that_its_record_names(kind: str) -> None:
    for label, record in script("fill")._benchmarks(kind).items():
        backbone = label.removesuffix("-AMX").removesuffix("-EPYC").removesuffix("-no-kernels")
        # a folder of a GGUF file is called MODEL.TYPE-HASH
        assert record["backbone"].split(".")[0] == backbone


@pytest.mark.parametrize("claim", ["quickstart", "local-only-tuned"])
def test_a_claims_table_is_made_of_its_records(claim: str) -> None:
    reproduce, results = script("reproduce"), ROOT / "paper" / "results"
    told = tomllib.loads((ROOT / "paper" / f"{claim}.toml").read_text())
    rows = lines(results / f"{claim}.jsonl")
    assert reproduce.table(told, rows) == (results / f"{claim}.md").read_text()


def test_the_table_of_trials_is_made_of_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "paper")
    target = ROOT / "paper" / "results" / "quickstart-tuning"
    rows = lines(target.with_suffix(".jsonl"))
    assert script("tune").table(rows) == target.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["diffusion", "gan", "gan-skew", "vae"])
def test_a_table_of_pictures_is_made_of_its_records(name: str) -> None:
    target = ROOT / "paper" / "results" / f"cifar10-{name}"
    rows = lines(target.with_suffix(".jsonl"))
    assert script("pictures").table(rows) == target.with_suffix(".md").read_text().strip()
    # no fewer than the paper's comparison may have
    assert {row["made"] >= 2000 and row["clients"] >= 20 for row in rows} == {True}


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
