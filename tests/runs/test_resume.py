"""Killed at any moment and resumed, a run ends as one that was never stopped."""

import json
import os
import random
import shutil
import signal
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from conftest import sentences, suited
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.cli.compatibility import find_objection
from fedgen_edge.config import Method, Settings, from_table
from fedgen_edge.errors import CheckpointError, ConfigError, TrainingError
from fedgen_edge.report import costs as targets
from fedgen_edge.report.compare import group_runs
from fedgen_edge.report.layers import agreement
from fedgen_edge.report.page import write
from fedgen_edge.report.summary import read
from fedgen_edge.runs import federate
from fedgen_edge.runs.models import export, find_model_folder, load_task, reopen
from fedgen_edge.runs.run import create, proceed

TIMES = ("seconds", "evaluate_seconds")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clients of unequal size."""
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    rows = [
        {"text": text, "who": f"client {c}"} for c in range(5) for text in sentences(6 + 3 * c, c)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(corpus: Path, **more: dict[str, Any]) -> Settings:
    """Every stateful part: cohorts, memory (FedPer), a schedule, dropout, a baseline."""
    table: dict[str, Any] = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"dropout": 0.1},
        "data": {"source": "jsonl", "path": str(corpus), "client_field": "who", "length": 32},
        "federation": {"rounds": 8, "cohort": 3, "unseen_clients": 1},
        "method": {"name": "fedper"},
        "training": {"batch": 2, "schedule": "cosine"},
        "personal": {"epochs": 2},
        "engine": {"threads": 1, "stack": 2},
        "evaluation": {"baselines": ["local-only"], "sample_tokens": 3, "prompts": ["One"]},
    }
    return from_table({k: {**table.get(k, {}), **more.get(k, {})} for k in {*table, *more}})


def finish(folder: Path) -> None:
    for _ in proceed(reopen(folder), folder):
        pass


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, times aside."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in ln.items() if k not in TIMES} for ln in lines]
        elif path.suffix == ".safetensors":
            found[name] = {k: v.numpy().tobytes() for k, v in load_file(path).items()}
    return found


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    create(settings(corpus), folder)
    finish(folder)
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_moments_then_resume_is_bit_identical(
    corpus: Path, unbroken: Path, tmp_path: Path, seed: int
) -> None:
    folder, rng = tmp_path / "run", random.Random(seed)
    create(settings(corpus), folder)
    killed = 0
    for _ in range(4):
        child = os.fork()
        if not child:
            finish(folder)
            os._exit(0)
        time.sleep(rng.uniform(0.2, 1.5))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed >= 1
    finish(folder)
    expected, found = outcome(unbroken), outcome(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


UPLINK = {"sparsify": "top-k", "density": 0.3, "dtype": "int8", "feedback": True}
UNEQUAL = [name for name, entry in METHODS.items() if entry.mixed_ranks]


@pytest.mark.parametrize(
    ("name", "ranks"), [*((n, []) for n in METHODS), *((n, [2, 8, 3]) for n in UNEQUAL)]
)
def test_any_method_with_feedback_stopped_and_resumed_ends_the_same(
    corpus: Path, tmp_path: Path, name: str, ranks: list[int]
) -> None:
    quick = settings(
        corpus,
        adapter={"ranks": ranks},
        method={"name": name, "residual_rank": 3},
        uplink={} if find_objection(name, "top-k") else UPLINK,
        downlink={} if find_objection(name, "down") else {"dtype": "fp16"},
        federation={"rounds": 4},
        evaluation={"baselines": [], "sample_tokens": 0},
        personal={"epochs": 1},
        # fedrep has epochs for what stays and for what is shared
        training={**suited(name), "epochs": 1 + METHODS[name].make(Method()).head_epochs},
    )
    for folder in (whole := tmp_path / "whole", broken := tmp_path / "broken"):
        create(quick, folder)
    finish(whole)
    events = proceed(reopen(broken), broken)
    while next(events).completed < 2:
        pass
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    finish(broken)
    assert outcome(broken) == outcome(whole)
    # what a method makes of the mean is not taken for it: a mean cosine is one
    rows = [json.loads(line) for line in (whole / "rounds.jsonl").read_text().splitlines()]
    assert all(abs(agreement(row) or 0.0) <= 1.001 for row in rows)


def test_a_run_on_devices_stopped_at_any_commit_ends_the_same_with_its_clock(
    corpus: Path, tmp_path: Path
) -> None:
    slow = settings(
        corpus,
        method={"name": "fedavgm"},
        federation={"rounds": 4, "cohort": 2, "over_selection": 1.5, "deadline": 25.0},
        devices={"steps_per_second": [0.3, 1, 2], "up": [5e3], "fails": [0.3], "available": [0.9]},
        evaluation={"baselines": ["fedbuff"], "sample_tokens": 0},
        personal={"epochs": 0},
    )
    for folder in (whole := tmp_path / "whole", broken := tmp_path / "broken"):
        create(slow, folder)
    finish(whole)
    for _ in range(7):
        events = proceed(reopen(broken), broken)
        next(events)
        events.close()  # pyright: ignore[reportAttributeAccessIssue]
    finish(broken)
    assert outcome(broken) == outcome(whole)
    for log in ("rounds.jsonl", "baselines/fedbuff/rounds.jsonl"):
        rows = [json.loads(line) for line in (whole / log).read_text().splitlines()]
        clocks = [row["clock"] for row in rows]
        assert clocks[0] > 0
        assert clocks == sorted(clocks)
        assert any(row["dropped"] for row in rows)
        # what those had sent who do not count is in the sum
        sent = [row["bytes_up"] - sum(c["bytes_up"] for c in row["clients"]) for row in rows]
        assert min(sent) >= 0
        assert max(sent) > 0
    costs = targets.costs(read(whole))
    assert costs
    assert [cost.method for cost in costs.methods] == ["fedavgm", "fedbuff"]
    assert all(cost.rounds <= 4 and cost.seconds > 0 for cost in costs.methods)


def test_between_the_record_and_its_commit_the_line_is_written_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    create(settings(corpus), folder)
    real = federate.commit
    calls = []

    def dies(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(federate, "commit", dies)
    with pytest.raises(KeyboardInterrupt):
        finish(folder)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]  # the third has no commit
    monkeypatch.setattr(federate, "commit", real)
    finish(folder)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, 9))


def test_a_damaged_checkpoint_is_named_and_the_run_ends_the_same(
    corpus: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    create(settings(corpus), folder)
    events = proceed(reopen(folder), folder)
    for event in events:
        if event.completed == 4:
            break
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    target = folder / "checkpoints" / "00004" / "server.safetensors"
    target.write_bytes(target.read_bytes()[:-5])
    told = [event.line for event in proceed(reopen(folder), folder)]
    assert str(target) in told[0]["refused"]
    assert told[1]["round"] == 4
    assert outcome(folder) == outcome(unbroken)


def test_a_finished_run_does_nothing_more(unbroken: Path) -> None:
    before = outcome(unbroken)
    finish(unbroken)
    assert outcome(unbroken) == before


def test_what_a_kill_after_the_last_commit_left_is_deleted(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    # killed before it deletes old versions: they stand beside what every commit names
    shutil.copytree(folder / "checkpoints" / "00008", folder / "checkpoints" / "00001")
    memory = sorted((folder / "memory").iterdir())[0]
    shutil.copy(memory, memory.with_name("000000-00000.safetensors"))
    assert outcome(folder).keys() != outcome(unbroken).keys()
    finish(folder)
    assert outcome(folder) == outcome(unbroken)


@pytest.mark.parametrize(
    ("name", "value", "before"),
    [
        ("adapter.target_modules", ["k_proj"], "[]"),
        ("adapter.rank", 4, "8"),
        ("data.length", 16, "32"),
        ("method.name", "fedavg", "'fedper'"),
        ("federation.rounds", 9, "8"),
        ("training.lr_full", 0.5, "None"),
    ],
)
def test_a_setting_that_a_run_rests_on_is_not_changed_before_it_is_resumed(
    unbroken: Path, tmp_path: Path, name: str, value: object, before: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    table = tomllib.loads((folder / "settings.toml").read_text())
    part, _, key = name.partition(".")
    table[part][key] = value
    (folder / "settings.toml").write_text(tomli_w.dumps(table))
    for command in (reopen, load_task):
        with pytest.raises(CheckpointError) as error:
            command(folder)
        told = f"{name} was {before} when the run began, and is {value!r} now: set it back"
        assert told in str(error.value)


def test_where_a_run_works_and_how_fast_it_learns_may_change_before_it_is_resumed(
    unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    table = tomllib.loads((folder / "settings.toml").read_text())
    table["engine"]["stack"] = 1
    table["training"]["lr"] = 1e-5  # what the message about infinite numbers says to lower
    (folder / "settings.toml").write_text(tomli_w.dumps(table))
    assert reopen(folder).settings.training.lr == 1e-5


def test_an_initial_adapter_may_move_before_a_run_is_resumed_but_not_become_another(
    corpus: Path, unbroken: Path, tmp_path: Path
) -> None:
    first, moved, folder = tmp_path / "first", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(unbroken / "adapters" / "global", first)
    create(settings(corpus, adapter={"initial": str(first)}), folder)
    shutil.move(first, moved)
    recipe = folder / "settings.toml"
    recipe.write_text(recipe.read_text().replace(str(first), str(moved)))
    assert reopen(folder).settings.adapter.initial == moved
    weights = moved / "adapter_model.safetensors"
    save_file({name: leaf + 1 for name, leaf in load_file(weights).items()}, weights)
    with pytest.raises(
        CheckpointError, match=r"adapter\.initial_sha256 was [0-9a-f]{16}\.\.\., and"
    ):
        reopen(folder)


def test_the_report_says_which_rounds_had_the_rate_of_before_a_resume(
    corpus: Path, tmp_path: Path
) -> None:
    changed, constant = tmp_path / "changed", tmp_path / "constant"
    create(settings(corpus, federation={"rounds": 3}, training={"lr": 0.01}), changed)
    events = proceed(reopen(changed), changed)
    while next(events).completed < 2:
        pass
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    recipe = changed / "settings.toml"
    assert "lr = 0.01\n" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("lr = 0.01\n", "lr = 0.001\n"))
    finish(changed)
    change = {"round": 2, "name": "training.lr", "before": 0.01, "now": 0.001}
    assert json.loads((changed / "run.json").read_text())["changes"] == [change]
    finish(changed)  # nothing is other than at the last resume
    assert json.loads((changed / "run.json").read_text())["changes"] == [change]
    write([changed], page := tmp_path / "page.html")
    assert "training.lr was 0.01, then 0.001 after round 2." in page.read_text()

    create(settings(corpus, federation={"rounds": 3}, training={"lr": 0.001}), constant)
    rates = [group.settings["training.lr"] for group in group_runs([read(changed), read(constant)])]
    assert rates == ["0.01, then 0.001 after round 2", "0.001"]


@pytest.mark.parametrize("rounds", [[], [1, 2], [1, 2, 3, 4, 5, 6, 8], [2, 3, 4, 5, 6, 7, 8, 9]])
def test_a_committed_round_without_its_record_is_told(
    unbroken: Path, tmp_path: Path, rounds: list[int]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    log = folder / "rounds.jsonl"
    rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join(rows[number - 1] for number in rounds if number <= len(rows)))
    lost = next(number for number in range(1, 9) if rounds[number - 1 : number] != [number])
    with pytest.raises(CheckpointError, match=rf"rounds\.jsonl lacks the record of round {lost},"):
        finish(folder)


def test_another_backbone_is_refused(unbroken: Path, tmp_path: Path) -> None:
    told = json.loads((unbroken / "run.json").read_text())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.toml").write_text((unbroken / "settings.toml").read_text())
    told["backbone"]["sha256"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"backbone\.sha256 was 0000"):
        reopen(folder)


def test_two_processes_do_not_write_one_run(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    experiment = create(settings(corpus), folder)
    first = proceed(experiment, folder)
    next(first)
    with pytest.raises(CheckpointError, match="in use"):
        next(proceed(experiment, folder))


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_is_not_finite_stops_the_run_before_its_commit(
    corpus: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    epochs = 1 + METHODS[name].make(Method()).head_epochs
    # decay alone takes A beyond the finite numbers in the first step; what bars it is wild as it is
    decay = {} if suited(name) else {"weight_decay": 1e5}
    wild = {"optimizer": "sgd", "lr": 1e38, "clip": 0.0, "epochs": epochs, **decay}
    create(settings(corpus, training=wild, method={"name": name}), folder)
    with pytest.raises(TrainingError, match=r"training\.lr=1e\+38") as error:
        finish(folder)
    # no way out is named that the method would refuse
    assert ("training.clip" in str(error.value)) == (not suited(name))
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("values", ["int8", "fp16"])
def test_so_does_a_change_that_cannot_be_sent(corpus: Path, tmp_path: Path, values: str) -> None:
    folder, wild = tmp_path / "run", {"optimizer": "sgd", "lr": 1e30, "clip": 0.0}
    create(settings(corpus, training=wild, uplink={"dtype": values}), folder)
    with pytest.raises(TrainingError, match=r"round 1, client client \d: .* training\.lr=1e\+30"):
        finish(folder)
    assert not (folder / "checkpoints").exists()


def test_a_personal_adapter_that_is_not_finite_is_never_written(
    corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wild = {"lr": 1e30, "fallback": False}
    create(settings(corpus, training={"optimizer": "sgd", "clip": 0.0}, personal=wild), folder)
    with pytest.raises(TrainingError, match=r"personal\.lr=1e\+30"):
        finish(folder)
    assert not (folder / "adapters" / "clients").exists()


def test_a_judged_round_says_what_averaging_missed(unbroken: Path) -> None:
    for line in (unbroken / "rounds.jsonl").read_text().splitlines():
        layers = json.loads(line)["layers"]
        # FedPer on the tiny backbone keeps the last of two layers
        assert {*layers} == {f"model.layers.0.self_attn.{n}_proj" for n in "qv"}
        for told in layers.values():
            # two factors moved apart from each other, a little
            assert 1e-6 < told["error"] < 1
            assert 1 <= told["rank"] <= 8
            assert min(told["a"], told["b"]) > 0


def test_newcomers_never_train_and_are_personalised(unbroken: Path) -> None:
    lines = [json.loads(line) for line in (unbroken / "rounds.jsonl").read_text().splitlines()]
    assert all("client 4" not in line["cohort"] for line in lines)
    assert (unbroken / "adapters" / "clients" / "client_4" / "adapter_model.safetensors").exists()
    tested = [json.loads(ln) for ln in (unbroken / "evaluation.jsonl").read_text().splitlines()]
    assert {t["participated"] for t in tested if t["client"] == "client 4"} == {False}


def test_a_folder_with_a_run_is_left_alone(unbroken: Path, corpus: Path) -> None:
    before = outcome(unbroken)
    with pytest.raises(ConfigError, match="already holds a run"):
        create(settings(corpus), unbroken)
    assert outcome(unbroken) == before


def test_uplink_bytes_are_the_lengths_of_what_was_sent(unbroken: Path) -> None:
    # FedPer on the tiny backbone keeps the last of two layers: half of the leaves are sent.
    lines = [json.loads(line) for line in (unbroken / "rounds.jsonl").read_text().splitlines()]
    adapter = load_file(unbroken / "adapters" / "global" / "adapter_model.safetensors")
    sent = sum(v.numel() * 4 for k, v in adapter.items() if ".layers.0." in k)
    for line in lines:
        for client in line["clients"]:
            assert sent < client["bytes_up"] < sent + 1000  # the header: names, shapes, types
        assert line["bytes_up"] == sum(c["bytes_up"] for c in line["clients"])
    assert torch.isfinite(torch.tensor([line["loss"] for line in lines])).all()


def test_other_data_than_it_began_with_are_refused(corpus: Path, tmp_path: Path) -> None:
    copy, folder = tmp_path / "copy.jsonl", tmp_path / "run"
    copy.write_text(corpus.read_text())
    create(settings(copy), folder)
    copy.write_text(corpus.read_text().replace("number 3 ", "number three "))
    with pytest.raises(CheckpointError, match="data_sha256 was"):
        reopen(folder)


def test_tensorboard_events_are_written_where_asked_for(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    quick = settings(
        corpus,
        federation={"rounds": 2},
        evaluation={"tensorboard": True, "baselines": [], "sample_tokens": 0},
    )
    create(quick, folder)
    finish(folder)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in lines]
    )


def test_training_alone_has_no_global_model(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    alone = settings(
        corpus,
        method={"name": "local-only"},
        federation={"rounds": 1},
        evaluation={"baselines": []},
    )
    create(alone, folder)
    finish(folder)
    told = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["model"] for row in told} == {"backbone", "personal"}
    assert not (folder / "adapters" / "global").exists()
    with pytest.raises(CheckpointError, match="local-only has no global model"):
        find_model_folder(folder, None)
    made = export(folder, tmp_path / "copy", None, merge=False)
    assert sorted(p.name for p in made) == [f"client_{c}" for c in range(5)]
