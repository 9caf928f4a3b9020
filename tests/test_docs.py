import importlib.util
import math
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from fedgen_edge.experiments.records import lines

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


@pytest.mark.parametrize("claim", ["quickstart", "local-only-tuned"])
def test_a_claims_table_is_made_of_its_records(claim: str) -> None:
    reproduce, results = script("reproduce"), ROOT / "paper" / "results"
    told = tomllib.loads((ROOT / "paper" / f"{claim}.toml").read_text())
    rows = lines(results / f"{claim}.jsonl")
    assert reproduce.table(told, rows) == (results / f"{claim}.md").read_text()


SWEPT = [p.stem for p in (ROOT / "paper").glob("*.toml") if "variants" in p.read_text()]


@pytest.mark.parametrize("claim", SWEPT)
def test_a_sweeps_tables_are_made_of_its_records(
    monkeypatch: pytest.MonkeyPatch, claim: str
) -> None:
    monkeypatch.syspath_prepend(ROOT / "paper")
    target = ROOT / "paper" / "results" / f"{claim}.jsonl"
    if not target.exists():
        pytest.skip("not measured yet")
    told = {"name": claim, **tomllib.loads((ROOT / "paper" / f"{claim}.toml").read_text())}
    assert script("sweep").table(told, lines(target)) == target.with_suffix(".md").read_text()


def test_a_sweeps_table_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "paper")
    claim = {"name": "toy", "recipe": "r.toml", "seeds": [0, 1], "reference": "a", "within": 0.01,
             "variants": {"a": {}, "b": {}}}  # fmt: skip
    facts = {"division": "", "hardware": "H", "precision": "float32", "bytes_full": 1000}

    def row(variant: str, seed: int, test: float, up: int, last: float) -> dict[str, object]:
        way = [[1, up // 2, 7, 2.0], [2, up, 14, last]]
        return {**facts, "variant": variant, "seed": seed, "bytes_up": up, "bytes_down": 14,
                "test": {"global": test}, "way": way}  # fmt: skip

    rows = [row("a", 0, 10.0, 100, 1.0), row("a", 1, 12.0, 100, 1.1)]
    rows += [row("b", 0, 11.0, 10, 1.009), row("b", 1, 13.0, 10, 1.1)]
    found = script("sweep").table(claim, rows)
    # of 1000 bytes 100 and 10 were sent; b ends 1 above a in both seeds, so its interval is a point
    # and within log(1.01) = 0.00995 of a's last loss, 1.0 and 1.1, in its second judged round
    down = "14 bytes (100.0 %)"
    assert (
        f"| a | 11.00 |  | 100 bytes (100.0 %) | {down} | 90.00 % | 100 bytes | 14 bytes | 2.0 |"
        in found
    )
    assert (
        f"| b | 12.00 | +1.00 (+1.00 to +1.00) | 10 bytes (10.0 %) | {down} | 99.00 % "
        "| 10 bytes | 14 bytes | 2.0 |" in found
    )
    rows[2]["way"] = [[2, 10, 14, 1.02]]
    assert "| 99.00 % | - | - | - |" in script("sweep").table(claim, rows)


def test_a_variant_runs_with_its_best_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "paper")
    sweep = script("sweep")
    few, many = ({"training": {"lr": rate}} for rate in (1e-3, 1e-2))
    claim = {
        "divisions": {"d": {"partition": {"by": "iid"}}},
        "tuning": {"seed": 7, "division": "d", "trials": [few, many]},
        "seeds": [0],
        "variants": {
            "a": {"method": {"name": "ffa-lora"}},
            "b": {"trials": [{"method": {"server_lr": 0.1}}], "method": {"name": "fedadam"}},
        },
    }
    tried = [*sweep.trials(claim)]
    assert [(case.variant, case.seed, case.trial) for case in tried] == [
        ("a", 7, few), ("a", 7, many), ("b", 7, {"method": {"server_lr": 0.1}})
    ]  # fmt: skip
    assert tried[2].overrides == {
        "partition": {"by": "iid"}, "method": {"name": "fedadam", "server_lr": 0.1}
    }  # fmt: skip
    losses = [math.nan, 3.0, 4.0]
    rows = [
        {"variant": case.variant, "trial": case.trial, "validation": loss}
        for case, loss in zip(tried, losses, strict=True)
    ]
    chosen = sweep.best(rows)
    assert chosen == {"a": many, "b": {"method": {"server_lr": 0.1}}}
    found = {case.variant: case.overrides for case in sweep.cases(claim, chosen)}
    assert found["a"]["training"] == {"lr": 1e-2}


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


def test_the_librarys_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.S):
        exec(block, names)
    assert (tmp_path / "runs" / "mine" / "adapters" / "global").is_dir()
