"""Ranks by what devices have room for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import sentences
from fedgen_edge.config import Settings, from_table
from fedgen_edge.errors import ConfigError
from fedgen_edge.planning.fit import fit_ranks
from fedgen_edge.planning.memory import estimate_client_bytes
from fedgen_edge.runs.run import create, proceed
from fedgen_edge.tasks.language.config_only import load_config

CPU = torch.device("cpu")


def settings(ranks: list[int], memory: list[float], **more: Any) -> Settings:
    table: dict[str, Any] = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"rank": 8, "ranks": ranks},
        "method": {"name": "hetlora"},
        "data": {"length": 32},
        "training": {"batch": 2},
        "devices": {"memory": memory},
    }
    return from_table({**table, **more})


@pytest.fixture(scope="module")
def needs() -> dict[int, int]:
    told = settings([], [])
    config = load_config(told.backbone)
    return {rank: estimate_client_bytes(told, config, "float32", rank) for rank in (2, 4, 8)}


def test_each_takes_the_largest_rank_that_its_memory_holds(needs: dict[int, int]) -> None:
    assert needs[2] < needs[4] < needs[8]
    room = [needs[4], needs[4] - 1, 1e12, needs[8]]
    found = fit_ranks(settings([8, 2, 4], [float(r) for r in room]), CPU)
    assert found.adapter.ranks == (4, 2, 8, 8)
    assert fit_ranks(found, CPU) == found  # as it is written down


def test_with_one_rank_it_is_only_looked_whether_there_is_room(needs: dict[int, int]) -> None:
    told = settings([], [float(needs[8])])
    assert fit_ranks(told, CPU) == told
    with pytest.raises(ConfigError, match=rf"devices\.memory\[1\].* below {needs[8]}, .* rank 8"):
        fit_ranks(settings([], [1e12, needs[8] - 1.0]), CPU)


def test_without_memory_nothing_is_counted() -> None:
    told = settings([2, 4], [])
    assert fit_ranks(told, CPU) is told


def test_of_pictures_nothing_can_be_counted() -> None:
    with pytest.raises(ConfigError, match="for text, and task='vae'"):
        fit_ranks(settings([], [1.0], task="vae"), CPU)


def test_a_run_sends_by_what_devices_hold(tmp_path: Path, needs: dict[int, int]) -> None:
    path = tmp_path / "stories.jsonl"
    rows = [{"text": text, "who": str(c)} for c in range(2) for text in sentences(8, c)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = settings(
        [2, 8],
        [float(needs[2]), 1e12],
        data={"source": "jsonl", "path": str(path), "client_field": "who", "length": 32},
        federation={"rounds": 1},
        personal={"epochs": 0},
        evaluation={"sample_tokens": 0},
        engine={"threads": 1},
    )
    run = tmp_path / "run"
    for _ in proceed(create(told, run), run):
        pass
    (line,) = [json.loads(row) for row in (run / "rounds.jsonl").read_text().splitlines()]
    small, large = (client["bytes_up"] for client in line["clients"])
    values = 2 * (32 + 32 + 32 + 16)  # of each rank: q and v of two layers, float32
    assert large - small == pytest.approx((8 - 2) * values * 4, abs=16)  # numbers' digits
    assert "clock" not in line  # memory alone takes no time
