"""Personal adapters of a run, where they are mixed with what is shared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import sentences
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.algorithms.methods import MIXING_SHARES as MIXING_OF_FEDDPA
from fedgen_edge.config import Settings, from_table
from fedgen_edge.errors import CheckpointError
from fedgen_edge.leaves import scale
from fedgen_edge.report.page import write
from fedgen_edge.runs import run as run_module
from fedgen_edge.runs.evaluate import load_method_result
from fedgen_edge.runs.models import find_model_folders, reopen
from fedgen_edge.runs.run import create, proceed, whole_stacks
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Batch, Leaves, Statistics

MIXING = (0.0, 0.3, 0.6)


def settings(folder: Path, **more: Any) -> Settings:
    """Four clients of unequal size, of whom the last never trains."""
    path = folder / "stories.jsonl"
    rows = [
        {"text": text, "who": f"client {c}"} for c in range(4) for text in sentences(8 + 2 * c, c)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table: dict[str, Any] = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "data": {"source": "jsonl", "path": str(path), "client_field": "who", "length": 32},
        "federation": {"rounds": 2, "unseen_clients": 1},
        "training": {"batch": 2, "lr": 1e-2},
        "personal": {"lr": 5e-2, "epochs": 1, "fallback": False},
        "engine": {"threads": 1, "stack": 2},
        "evaluation": {"sample_tokens": 0},
    }
    return from_table({k: {**table.get(k, {}), **more.get(k, {})} for k in {*table, *more}})


def ran(folder: Path, **more: Any) -> Path:
    target = folder / "run"
    for _ in proceed(create(settings(folder, **more), target), target):
        pass
    return target


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("stack", "together"), [(1, 64), (10, 60), (64, 64), (100, 100)])
def test_a_chunk_is_whole_stacks(stack: int, together: int) -> None:
    assert whole_stacks(stack) == together


@pytest.mark.parametrize("name", ["fedgen-edge", "ditto", "feddpa", "fedex-lora"])
def test_a_mixture_is_judged_saved_and_loaded_as_one_adapter(tmp_path: Path, name: str) -> None:
    run = ran(
        tmp_path,
        method={"name": name, "residual_rank": 3},
        personal={"mixing": MIXING},
    )
    experiment = reopen(run)
    task, shards = experiment.task, experiment.clients.shards
    assert isinstance(task.model.adapter, Lora)
    ids = torch.arange(40).reshape(2, 20) + 3
    told = lines(run / "personal.jsonl")
    for line in told:
        assert line["share"] in {*MIXING, 1.0}
        client = experiment.names.index(line["client"])
        folder = run / "adapters" / "clients" / line["folder"]
        config = json.loads((folder / "adapter_config.json").read_text())
        both = 0 < line["share"] < 1
        assert config["r"] == 8 * (1 + both) + 3 * (name == "fedex-lora")
        loaded = task.model.load(folder)
        assert experiment.evaluate_client(loaded, shards[client].test) == pytest.approx(
            line["test"], rel=1e-6
        )
        plain = AutoModelForCausalLM.from_pretrained(task.model.folder)
        theirs = PeftModel.from_pretrained(plain, str(folder))
        with torch.no_grad():
            expected = theirs(input_ids=ids, labels=ids).loss
            with task.model.adapter.bind(loaded):
                found = task.model.network(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # rates are high enough for tuning to go too far, so that some keep a real mixture
    assert any(0 < line["share"] < 1 for line in told)


def test_clients_are_judged_together_as_each_would_be_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = reopen(ran(tmp_path, method={"name": "fedper"}))
    seen, evaluate = [], Language.evaluate

    def watched(self: Language, adapter: Leaves, examples: Batch) -> Statistics:
        seen.append(examples["mask"].shape[:-2])
        return evaluate(self, adapter, examples)

    monkeypatch.setattr(Language, "evaluate", watched)
    state = experiment.start()
    adapters = [scale(state.adapter, c + 1.0) for c in range(3)]
    shards = experiment.clients.shards
    held = [(own, shards[c].test) for c, own in enumerate(adapters)]
    together = list(experiment.evaluate_clients(held))
    assert seen == [(2,), ()]  # a stack holds two
    for (own, test), found in zip(held, together, strict=True):
        assert found == pytest.approx(experiment.evaluate_client(own, test), rel=1e-6)


@pytest.mark.parametrize(("name", "own"), [("fedgen-edge", False), ("fedper", True)])
def test_without_tuning_there_are_models_of_clients_only_where_they_differ(
    tmp_path: Path, name: str, own: bool
) -> None:
    run = ran(
        tmp_path,
        method={"name": name},
        personal={"epochs": 0},
        evaluation={"sample_tokens": 2, "prompts": ["a"]},
    )
    for file in ("evaluation.jsonl", "samples.jsonl"):
        assert ("personal" in {line["model"] for line in lines(run / file)}) == own
    assert (run / "adapters" / "clients").exists() == own
    assert write([run], run / "report.html").exists()
    if not own:
        assert list(find_model_folders(run)) == [None]
        with pytest.raises(CheckpointError, match=r"personal\.epochs is 0: name no client"):
            find_model_folders(run, ["client 0"])


def test_resumed_with_another_stack_size_every_client_is_tuned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHUNK", 2)
    whole = ran(tmp_path, engine={"stack": 1})
    path = whole / "settings.toml"
    path.write_text(path.read_text().replace("stack = 1", "stack = 3"))
    log = whole / "personal.jsonl"
    held = log.read_text().splitlines(keepends=True)
    for name in ("evaluation.jsonl", "samples.jsonl"):
        (whole / name).unlink()
    # as a stack of 3 leaves its first chunk: the longest first
    log.write_text("".join([held[2], held[1], held[0]]))
    path.write_text(path.read_text().replace("stack = 3", "stack = 2"))
    for _ in proceed(reopen(whole), whole):
        pass
    names = reopen(whole).names
    assert sorted(line["client"] for line in lines(log)) == sorted(names)
    tested = [row["client"] for row in lines(whole / "evaluation.jsonl")]
    assert sorted(tested) == sorted(names * 3)


def test_without_a_choice_no_share_is_told(tmp_path: Path) -> None:
    run = ran(tmp_path, method={"name": "ditto"})
    assert all("share" not in line for line in lines(run / "personal.jsonl"))


def test_as_a_baseline_a_method_is_judged_by_clients_own_models(tmp_path: Path) -> None:
    run = ran(
        tmp_path,
        method={"name": "ditto", "ditto_lambda": 0.0},
        evaluation={"baselines": ["ditto", "local-only"]},
    )
    found: dict[str, dict[str, Any]] = {}
    for line in lines(run / "evaluation.jsonl"):
        found.setdefault(line["model"], {})[line["client"]] = line["total"]
    # without a pull, each trains alone; who never trained has the shared model, or the backbone
    *trained, newcomer = reopen(run).names
    for client in trained:
        assert found["ditto"][client] == found["local-only"][client] != found["global"][client]
    assert found["ditto"][newcomer] == found["global"][newcomer]


def test_a_client_of_feddpa_chooses_its_mixture_and_has_that_of_training_as_a_baseline(
    tmp_path: Path,
) -> None:
    run = ran(tmp_path, method={"name": "feddpa"}, evaluation={"baselines": ["feddpa"]})
    told = [line["share"] for line in lines(run / "personal.jsonl")]
    assert {*told} <= {*MIXING_OF_FEDDPA}
    assert any(0 < share < 1 for share in told)
    experiment = reopen(run)
    shared, beside = (
        load_method_result(experiment, run, "global"),
        load_method_result(experiment, run, "feddpa"),
    )
    assert shared.adapter(0) == shared.state.adapter
    name = next(k for k in shared.state.adapter if k.endswith("lora_B"))
    mixture = beside.adapter(0)
    assert torch.equal(mixture[name], scale(beside.memory[0], 0.5)["own:" + name])
    assert torch.equal(mixture["residual." + name], shared.state.adapter[name] * 0.5)
