"""What a quality costs, by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge.report import plots
from fedgen_edge.report.costs import PLOTS, TargetCost, costs
from fedgen_edge.report.page import write
from fedgen_edge.report.summary import RunFiles, read
from fedgen_edge.tasks.language.task import MEASURE


def rows(bits: Sequence[float | None], up: int, seconds: float | None) -> list[dict[str, Any]]:
    """Rounds of this many bits a token, by which the perplexity is 2 to their power."""
    found = []
    for number, each in enumerate(bits, 1):
        held = None if each is None else {"total": 100 * each * math.log(2), "count": 100}
        row = {"round": number, "cohort": ["a"], "loss": 1.0, "validation": held}
        sent = {"bytes_up": up, "bytes_down": 10 * up, "clients": [], "update_norm": 1.0}
        clock = {} if seconds is None else {"clock": seconds * number, "dropped": []}
        found.append({**row, **sent, **clock})
    return found


def make(
    folder: Path, settings: str, own: list[dict[str, Any]], **beside: list[dict[str, Any]]
) -> RunFiles:
    folder.mkdir(exist_ok=True)
    (folder / "settings.toml").write_text(f'[method]\nname = "fedbuff"\n{settings}')
    (folder / "run.json").write_text(json.dumps({"measure": MEASURE, "finished": True}))
    logs = {"rounds.jsonl": own} | {f"baselines/{k}/rounds.jsonl": v for k, v in beside.items()}
    for name, lines in logs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(folder)


def test_each_methods_cost_is_told_to_what_all_of_them_reach(tmp_path: Path) -> None:
    # perplexities 16, 8, 4, 2 every second; 32, unjudged, 4, 8 every 10: all reach 4, in rounds 3
    run = make(
        tmp_path / "run", "", rows([4, 3, 2, 1], 5, 1.0), fedavg=rows([5, None, 2, 3], 7, 10.0)
    )
    found = costs(run)
    assert found
    assert (found.target, found.is_target_set, found.has_seconds) == (pytest.approx(4), False, True)
    assert found.methods == [
        TargetCost("fedbuff", pytest.approx(2), 3, 15, 150, 3.0),
        TargetCost("fedavg", pytest.approx(4), 3, 21, 210, 30.0),
    ]


def test_a_target_that_is_asked_for_may_never_be_reached(tmp_path: Path) -> None:
    # 3 is below 4 and above 2; 5 is reached in the round of 4
    own, other = rows([4, 3, 2, 1], 5, None), rows([5, None, 2, 3], 7, None)
    run = make(tmp_path / "run", "[evaluation]\ntarget = 3.0\n", own, fedavg=other)
    found = costs(run)
    assert found
    assert (found.is_target_set, found.has_seconds) == (True, False)
    assert found.methods[0][:5] == ("fedbuff", pytest.approx(2), 4, 20, 200)
    assert math.isnan(found.methods[0].seconds)
    assert found.methods[1][:2] == ("fedavg", pytest.approx(4))
    assert all(math.isnan(value) for value in found.methods[1][2:])
    alone = make(tmp_path / "alone", "[evaluation]\ntarget = 5.0\n", own)
    assert [cost.rounds for cost in (costs(alone) or found).methods] == [3]


def test_a_method_that_diverges_does_not_make_the_target_easy(tmp_path: Path) -> None:
    # 8, then no number: 8 is the best that both reach
    run = make(
        tmp_path / "run", "", rows([4, 3, 2], 5, 1.0), wild=rows([3, math.inf, math.nan], 5, 1.0)
    )
    found = costs(run)
    assert found
    assert found.target == pytest.approx(8)
    assert [cost.rounds for cost in found.methods] == [2, 1]


def test_one_method_without_a_target_has_no_table(tmp_path: Path) -> None:
    assert costs(make(tmp_path / "run", "", rows([4, 3], 5, 1.0))) is None
    assert costs(make(tmp_path / "run", "", [])) is None


def test_the_page_has_the_table_and_the_picture_where_there_is_a_clock(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "", rows([4, 3, 2], 5, 1.5), fedavg=rows([5, 3, 2], 7, 10.0))
    page = write([run.folder], tmp_path / "page.html").read_text()
    assert "To a validation perplexity of 4.00" in page
    row = "<tr><th>fedavg</th><td>4.00</td><td>3</td><td>21 bytes</td><td>210 bytes</td>"
    assert f"{row}<td>30.0</td></tr>" in page
    assert (run.folder / "plots" / "clock.svg").exists()
    assert "virtual seconds" in plots.draw_plots(run, PLOTS)["clock"]
    plain = make(tmp_path / "plain", "", rows([4, 3], 5, None), fedavg=rows([5, 3], 7, None))
    page = write([plain.folder], tmp_path / "page.html").read_text()
    assert "To a validation perplexity of 8.00" in page
    assert "virtual seconds" not in page
    assert not (plain.folder / "plots" / "clock.svg").exists()


def test_a_round_that_nobody_finished_is_no_mistake(tmp_path: Path) -> None:
    own = rows([4, 4, 3], 5, 1.0)
    own[1] |= {"loss": None, "cohort": [], "clients": []}
    folder = make(tmp_path / "run", "", own).folder
    assert write([folder], tmp_path / "page.html").exists()
