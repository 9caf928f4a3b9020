import json
import re
from pathlib import Path

import pytest

from fedgen_edge.errors import CheckpointError
from fedgen_edge.report.compare import group_runs
from fedgen_edge.report.page import write
from fedgen_edge.report.summary import read
from fedgen_edge.tasks.language.task import MEASURE
from support.reports import make_run, several


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> str:
    here = tmp_path_factory.mktemp("several")
    return write(several(here), here / "report.html").read_text("utf-8")


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path: Path) -> None:
    runs = [read(make_run(tmp_path / f"{s}-{lr}", s, lr)) for s in (0, 1) for lr in (0.1, 0.2)]
    found = [(group.label, group.settings, len(group.runs)) for group in group_runs(runs)]
    assert found == [
        ("0-0.1 and 1 more", {"training.lr": "0.1"}, 2),
        ("0-0.2 and 1 more", {"training.lr": "0.2"}, 2),
    ]


def test_a_run_is_called_by_its_folder_and_by_more_of_the_path_where_names_are_alike(
    tmp_path: Path,
) -> None:
    alike = [read(make_run(tmp_path / name / "run", lr=lr)) for name, lr in (("a", 1), ("b", 2))]
    assert [group.label for group in group_runs(alike)] == ["a/run", "b/run"]
    assert [group.label for group in group_runs(alike[:1])] == ["run"]
    assert [group.label for group in group_runs([alike[0], alike[0]])] == ["run and 1 more"]


def test_results_come_before_the_settings_and_settings_that_are_alike_are_left_out(
    comparison: str,
) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", comparison)
    assert headings.index("Mean test perplexity") < headings.index("Settings that differ")
    assert headings.index("What helps") < headings.index("Settings that differ")
    table = comparison[comparison.index("Settings that differ") :].split("</table>", maxsplit=1)[0]
    assert re.findall(r"<tr><th>(.*?)</th>", table) == ["setting", "training.lr"]
    assert re.findall(r'<td class="text">(.*?)</td>', table) == ["0.001", "0.1"]
    assert "slow0 and 2 more" in table


def test_only_settings_that_differ_are_compared(comparison: str) -> None:
    assert "training.lr" in comparison
    assert "method.name" not in comparison


def test_differences_are_paired_by_seed(comparison: str) -> None:
    # Backbone 64, global 16 x 2^0, 2^0.1, 2^0.2: the differences are -48, -46.85, -45.62,
    # their mean -46.83, deviation 1.19; 4.3027 x 1.19 / sqrt(3) = 2.96.
    minus = "\N{MINUS SIGN}"
    assert f"{minus}46.8 <span" in comparison
    assert f"[{minus}49.8, {minus}43.9]" in comparison
    # The faster rate doubles them: 16, 17.15, 18.38 higher, 17.2 on average, 2.96 either way.
    assert "+17.2 <span" in comparison
    assert "[+14.2, +20.1]" in comparison


def test_runs_of_different_tasks_are_not_compared(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    facts = json.loads((two / "run.json").read_text())
    told = {**facts, "measure": MEASURE._replace(name="denoising error")}
    (two / "run.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"one by perplexity and .*two by denoising error"):
        write([one, two], tmp_path / "page.html")


def test_runs_without_results_can_be_compared(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.toml").write_text("")
        (tmp_path / name / "run.json").write_text(json.dumps({"measure": MEASURE}))
    assert write([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html").exists()
