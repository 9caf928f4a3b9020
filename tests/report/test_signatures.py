import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import sentences
from fedgen_edge.config import from_table
from fedgen_edge.report.signatures import rank_collapses
from fedgen_edge.report.summary import Row, RunFiles, read
from fedgen_edge.runs.federate import federate
from fedgen_edge.runs.run import create
from fedgen_edge.tasks.language.task import MEASURE

EMPTY = RunFiles(Path("run"), {}, {}, MEASURE, [], [], {}, [], [], [], [])


@pytest.mark.parametrize(
    "layers",
    [
        {"begins at zero": (0, 1, 1.5, 1.5, 1.5)},
        {"never had two": (1.5, 1.9, 1.4, 1.2, 1.1)},
        {"fell to a third": (8, 6, 4, 3, 2.7)},
        {"came back": (5, 1.1, 2, 3, 3)},
        {"one of three": (5, 4, 3, 2, 1), "x": (5, 5, 5, 5, 5), "y": (4, 4, 4, 4, 4)},
    ],
    ids=lambda layers: next(iter(layers)),
)
def test_a_rank_that_is_low_for_other_reasons_is_no_collapse(
    layers: Mapping[str, Sequence[float]],
) -> None:
    told = [{k: {"rank": float(each[at])} for k, each in layers.items()} for at in range(5)]
    rounds: list[Row] = [{"round": at, "layers": ranks} for at, ranks in enumerate(told, 1)]
    assert rank_collapses(replace(EMPTY, rounds=rounds)) is None


@pytest.mark.parametrize(("decay", "collapses"), [(0.0, False), (20.0, True)])
def test_weight_decay_that_is_too_strong_makes_adapters_lose_their_rank(
    tmp_path: Path, decay: float, collapses: bool
) -> None:
    # |A|^2 + |B|^2, which decay lowers, is at least twice the sum of the product's singular values:
    # directions with little gradient fade from both factors at once.
    told = [{"text": text, "who": c} for c in (0, 1) for text in sentences(40, c)]
    (tmp_path / "data").write_text("".join(json.dumps(row) + "\n" for row in told))
    table = {
        "backbone": {"path": "tiny"},
        "data": {
            "source": "jsonl",
            "path": str(tmp_path / "data"),
            "client_field": "who",
            "length": 16,
        },
        "federation": {"rounds": 11},
        "training": {"lr": 0.01, "steps": 4, "weight_decay": decay},
        "evaluation": {"blocks": 2},
    }
    for _ in federate(create(from_table(table), tmp_path / "run"), tmp_path / "run"):
        pass
    found = rank_collapses(read(tmp_path / "run"))
    assert bool(found) == collapses, found
