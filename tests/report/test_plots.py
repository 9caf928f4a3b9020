import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedgen_edge.report.layer_plots import MERGING
from fedgen_edge.report.plots import label_distribution, sorted_gains
from fedgen_edge.report.style import draw_line, finish_figure, make_figure
from fedgen_edge.report.summary import RunFiles, read
from support.reports import CLIENTS, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    """Gains over global of 50, 0 and -100 %, and the first client never took part."""
    folder = make_run(tmp_path / "run")
    rows = [json.loads(text) for text in (folder / "evaluation.jsonl").read_text().splitlines()]
    bits = dict(zip(CLIENTS, (3, 4, 5), strict=True))
    told = [
        {
            **row,
            "participated": row["client"] != CLIENTS[0],
            "total": row["total"] * (bits[row["client"]] / 3 if row["model"] == "personal" else 1),
        }
        for row in rows
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return read(folder)


def axes_of(figure: Figure | None) -> Axes:
    assert figure
    return figure.axes[0]


def drawn(axes: Axes) -> dict[str, list[Any]]:
    """The named lines."""
    return {str(ln.get_label()): np.asarray(ln.get_xydata()).tolist() for ln in axes.lines}


def test_gains_are_drawn_from_the_least_to_the_largest_at_the_middle_of_their_share(
    run: RunFiles,
) -> None:
    # Perplexities 8, 16 and 32 for 16; of two clients, the first quarter and the third.
    found = drawn(axes_of(sorted_gains(run)))
    assert found["over global"] == [[25, pytest.approx(-100)], [75, pytest.approx(0, abs=1e-9)]]
    assert found["over global (new)"] == [[50, pytest.approx(50)]]
    assert "over local-only" in found
    assert "over local-only (new)" not in found


def test_a_gain_over_one_model_alone_says_over_which(run: RunFiles) -> None:
    kept = [row for row in run.evaluation if row["model"] != "local-only"]
    figure = sorted_gains(replace(run, evaluation=[r for r in kept if r["client"] != CLIENTS[0]]))
    assert figure
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["over global"]


def test_layers_are_drawn_by_their_median_and_the_band_spans_them(run: RunFiles) -> None:
    # Errors 0.1 and 0.2 over the round's number.
    axes = axes_of(MERGING["error"](run))
    assert drawn(axes)["fedgen-edge"] == [[r, pytest.approx(0.15 / r)] for r in (1, 2, 3)]
    band = axes.collections[0].get_datalim(axes.transData)
    assert (band.y0, band.y1) == (pytest.approx(0.1 / 3), pytest.approx(0.2))


def test_a_against_b_is_two_lines(run: RunFiles) -> None:
    found = drawn(axes_of(MERGING["norms"](run)))
    assert found == {"A": [[1, 2], [2, 2], [3, 2]], "B": [[1, 1], [2, 2], [3, 3]]}


def test_who_sends_nothing_has_no_drift_and_no_cosine(run: RunFiles) -> None:
    # Three unit changes of equal weight: 0.81 = 3/9 + 6/9 cos, so cos = 0.715.
    assert drawn(axes_of(MERGING["drift"](run))) == {"fedgen-edge": [[1, 1], [2, 1], [3, 1]]}
    found = drawn(axes_of(MERGING["cosine"](run)))
    assert found["fedgen-edge"] == [[r, pytest.approx(0.715)] for r in (1, 2, 3)]
    assert "local-only" not in found


def test_without_numbers_there_is_no_picture(run: RunFiles) -> None:
    for rounds in (run.rounds, *run.baselines.values()):
        for row in rounds:
            row["layers"] = {}
            row["bytes_up"] = 0
    run.evaluation.clear()
    assert [draw(run) for draw in (*MERGING.values(), sorted_gains)] == [None] * 6


@pytest.mark.parametrize(
    ("high", "ticks"), [(50.0, [1, 2, 5, 10, 20, 50]), (1e4, [1, 10, 100, 1e3, 1e4])]
)
def test_many_decades_are_told_by_few_ticks(high: float, ticks: list[float]) -> None:
    figure, axes = make_figure()
    draw_line(axes, [(1, 1.0), (2, high)], "x", "k")
    finish_figure(figure, axes, "round", "y")
    told = [t for t in axes.get_yticks() if 1 <= t <= high]
    assert told == pytest.approx(ticks)


@pytest.mark.parametrize("labelled", [False, True])
def test_who_holds_what_is_sorted_by_what_it_draws_and_says_how_many_it_shows(
    run: RunFiles, labelled: bool
) -> None:
    # Tokens grow with the client's number, examples fall: labels count examples.
    clients = [
        {
            "client": f"c{n}",
            "train": 51 - n,
            "items": 1000 * (n + 1),
            "labels": {"x": 50 - n, "y": 1} if labelled else {},
        }
        for n in range(51)
    ]
    axes = axes_of(label_distribution(replace(run, clients=clients)))
    kinds = 2 if labelled else 1
    assert len(axes.patches) == 30 * kinds
    widths = [bar.get_width() for bar in axes.patches]  # kind by kind, from below
    totals = [sum(widths[at::30]) for at in range(30)]
    assert totals == sorted(totals)
    assert (totals[0], totals[-1]) == ((1, 51) if labelled else (1000, 51000))
    what = "training examples" if labelled else "training tokens"
    assert axes.get_xlabel() == f"{what} (30 of 51 clients)"
    few = axes_of(label_distribution(replace(run, clients=clients[:3])))
    assert few.get_xlabel() == what
