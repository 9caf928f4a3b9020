"""What a plan says of bytes and clocks is what a run then records, to the byte."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import suited
from fedgen_edge.algorithms.methods import METHODS, make_algorithm
from fedgen_edge.cli import main as cli
from fedgen_edge.config import Backbone, Settings, from_table
from fedgen_edge.federation.rounds import Roster
from fedgen_edge.federation.rounds import rounds as run
from fedgen_edge.planning.plan import count_clients
from fedgen_edge.planning.traffic import (
    ClientTraffic,
    estimate_rounds,
    estimate_server_bytes,
    make_client_traffic,
)
from fedgen_edge.runs.build import build
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.language.config_only import build_from_config, load_config

SLOW = {"steps_per_second": [1.0, 2.0, 0.5], "up": [900.0, 5000.0], "down": [4000.0]}
CHAINS = {
    "int8 of the largest": {"uplink": {"sparsify": "top-k", "density": 0.1, "dtype": "int8"}},
    "both ways": {
        "uplink": {"sparsify": "random-k", "density": 0.2, "dtype": "fp16"},
        "downlink": {"sparsify": "top-k", "density": 0.3, "dtype": "int4"},
    },
    "low rank": {"uplink": {"low_rank": 1, "dtype": "bf16"}},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clients' texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": f"Sentence {i} of {who}, a line.", "who": who} for who in "abcde"
            for i in range(12)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random GPT-2, whose layers hold their weights the other way round."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(pretrained.find_folder(Backbone(path="tiny")))
    config = GPT2Config(n_embd=24, n_layer=3, n_head=2, n_positions=128, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(texts: Path, **more: dict[str, Any]) -> Settings:
    table = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"rank": 4},
        "data": {"source": "jsonl", "path": str(texts), "client_field": "who", "length": 16},
        "federation": {"clients": 5, "cohort": 3, "rounds": 4},
        "training": {"steps": 1, "batch": 2},
        "engine": {"name": "serial", "device": "cpu"},
        "evaluation": {"sample_tokens": 0},
    }
    return from_table({k: {**table.get(k, {}), **more.get(k, {})} for k in {*table, *more}})


def on(told: Settings) -> ClientTraffic:
    algorithm, config = (
        make_algorithm(told.method, adapter=told.adapter),
        load_config(told.backbone),
    )
    with torch.device("meta"):
        full = algorithm.adapts == "full"
        task = build_from_config(config, told.adapter, torch.float32, full=full)
    return make_client_traffic(told, algorithm, task.model.leaf_shapes(), count_clients(told))


def planned(told: Settings) -> list[tuple[int, int]]:
    """Bytes down and up of each round."""
    return [
        (r.bytes_down, r.bytes_up)
        for r in estimate_rounds(told, on(told), 5, told.training.steps or 0)
    ]


def recorded(told: Settings) -> tuple[list[tuple[int, int]], list[float]]:
    """The same of a run, and its clock."""
    parts = build(told)
    done, clock = [], []
    roster = Roster(devices=told.devices)
    federation = parts.settings.federation
    for commit in run(
        parts.start(), parts.algorithm, parts.engine, parts.train, federation, roster
    ):
        dropped = commit.timing.bytes_up if commit.timing else 0
        done.append((commit.bytes_down, sum(u.bytes_up for u in commit.updates) + dropped))
        clock += [commit.timing.clock] if commit.timing else []
    return done, clock


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_bytes_are_known_beforehand(texts: Path, name: str) -> None:
    ranks = {"adapter": {"ranks": [1, 4, 2]}} if METHODS[name].mixed_ranks else {}
    # fedrep's first epoch is the head's, so it wants two of them
    training = {"steps": None, "epochs": 2} if name == "fedrep" else suited(name)
    told = settings(texts, method={"name": name}, training=training, **ranks)
    assert planned(told) == recorded(told)[0]


@pytest.mark.parametrize("name", ["fedgen-edge", "ffa-lora"])
def test_bytes_are_known_of_any_backbone(texts: Path, backbone: str, gpt2: str, name: str) -> None:
    for path in (backbone, gpt2):
        told = settings(texts, backbone={"path": path}, method={"name": name})
        found, _ = recorded(told)
        assert planned(told) == found
        assert all(down and up for down, up in found)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("name", ["fedgen-edge", "fedsa-lora"])
def test_bytes_of_a_chain_are_known(texts: Path, chain: dict[str, Any], name: str) -> None:
    told = settings(texts, method={"name": name}, **chain)
    assert planned(told) == recorded(told)[0]


def test_zstd_takes_no_more_than_is_said(texts: Path) -> None:
    told = settings(texts, uplink={"dtype": "int8", "zstd": 3}, downlink={"zstd": 3})
    pairs = zip(planned(told), recorded(told)[0], strict=True)
    assert all(most >= real for one, other in pairs for most, real in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["fedgen-edge", "ditto", "fedbuff"])
def test_clocks_bytes_and_those_who_are_late_are_known(texts: Path, name: str) -> None:
    rounds_of = {} if name == "fedbuff" else {"over_selection": 1.5, "deadline": 9.0}
    devices = {**SLOW, "available": [0.8], "fails": [0.2, 0.0]}
    told = settings(texts, method={"name": name}, devices=devices, federation=rounds_of)
    found, clock = recorded(told)
    assert planned(told) == found
    lasts = [r.seconds for r in estimate_rounds(told, on(told), 5, 1)]
    assert sum(lasts) == pytest.approx(clock[-1], rel=1e-12)
    assert lasts[0] == pytest.approx(clock[0], rel=1e-12)


def test_what_fedgen_run_records_is_what_fedgen_plan_says(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"--backbone.path tiny --data.source jsonl --data.path {texts} --data.client-field who "
    said += "--federation.clients 5 --federation.rounds 2 --federation.cohort 2 --training.steps 1 "
    said += "--personal.epochs 0 --evaluation.sample-tokens 0"
    cli.main(["plan", *said.split(), "--json"])
    plan = json.loads(capsys.readouterr().out)
    cli.main(["run", *said.split(), "--out", str(tmp_path / "run")])
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = [json.loads(row) for row in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert plan["traffic"]["total_up"] == sum(row["bytes_up"] for row in rows)
    assert plan["traffic"]["total_down"] == sum(row["bytes_down"] for row in rows)
    model = plan["model"]
    assert model["parameters"] == facts["backbone"]["parameters"]
    assert model["adapter_bytes"] == facts["adapter_bytes"]
    assert model["full_bytes"] == facts["full_bytes"]


def test_a_servers_bytes_are_those_of_its_state_and_its_cohort(texts: Path) -> None:
    # Two layers, rank 4: q is 32 x 32 and v 16 x 32, so A has 4 * 32 values, and B 4 * 32 or 4 * 16
    values = 2 * (2 * 128 + 128 + 64)
    plain = estimate_server_bytes(on(settings(texts)), 3)
    assert plain["adapter"] == 4 * values
    assert plain["state"] == 0
    up = on(settings(texts)).count_up_bytes(0, 0)
    assert plain["updates"] == 3 * (4 * values + up)
    adam = estimate_server_bytes(on(settings(texts, method={"name": "fedadam"})), 3)
    assert adam["state"] == 2 * 4 * values
    assert adam["checkpoint"] == 3 * 4 * values
    sgd = suited("scaffold")
    told = settings(texts, method={"name": "scaffold"}, training=sgd)
    assert estimate_server_bytes(on(told), 3)["state"] == 4 * values


def test_a_stray_setting_of_chance_changes_who_is_asked_and_no_length(texts: Path) -> None:
    told = settings(texts, adapter={"ranks": [1, 4, 2]}, method={"name": "rbla"})
    other = replace(told, federation=replace(told.federation, seed=1))
    assert planned(told) != planned(other)
    assert {on(told).count_up_bytes(c, 0) for c in range(5)} == {
        on(other).count_up_bytes(c, 0) for c in range(5)
    }
