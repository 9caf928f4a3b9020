"""IFCA's rounds and runs: by hand on a Line, and on two kinds of text."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from conftest import Line, line_shard, numbers, sentences
from fedgen_edge.algorithms.ifca import CLUSTER_KEY, split_clusters
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.compression.serialize import encode
from fedgen_edge.config import Devices, Federation, Method, Settings, from_table
from fedgen_edge.data.batches import Budget, Shard
from fedgen_edge.deploy.provision.kits import check_deployable
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.errors import CheckpointError, ConfigError
from fedgen_edge.federation.client import Patience, Recipe
from fedgen_edge.federation.jobs import Clients, Train, TuningResult
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.federation.rounds import Engine, Roster, rounds
from fedgen_edge.leaves import add
from fedgen_edge.runs.build import Experiment, build
from fedgen_edge.runs.checkpoint import load_latest
from fedgen_edge.runs.models import export, find_model_folder, reopen
from fedgen_edge.runs.run import create, proceed
from fedgen_edge.seeds import generator
from fedgen_edge.types import Commit, Leaves, Order
from support.loop import same

HALF = Recipe(partial(SGD, lr=0.5))


def ifca(number: int = 2, choose_by: int = 64) -> Any:
    return METHODS["ifca"].make(Method(clusters=number, choose_by=choose_by))


def lines(
    shards: list[Shard],
    count: int,
    engine: Engine = run_serially,
    algorithm: Any = None,
    **plan: Any,
) -> list[Commit]:
    """Full-batch rounds on a Line from w = 0: each goes half of the way to a client's mean."""
    algorithm = algorithm or ifca()
    clients = Clients(Line(), algorithm, shards, 0)
    job = Train(clients, Budget(99), lambda _: HALF)
    start = algorithm.init({"w": torch.tensor(0.0)})
    federation = Federation(clients=len(shards), rounds=count, **plan)
    devices = Devices(up=(1.0,)) if "deadline" in plan else Devices()
    return [*rounds(start, algorithm, engine, job, federation, Roster(devices=devices))]


def adapters(done: Commit) -> list[float]:
    return [float(own["w"]) for own in split_clusters(done.state.adapter).values()]


def took(done: Commit) -> list[int]:
    return [next(iter(split_clusters(update.delta))) for update in done.updates]


@pytest.mark.parametrize("engine", [run_serially, make_stacked_engine(3)])
def test_two_groups_have_an_adapter_each_by_hand(engine: Engine) -> None:
    # 8 with one example and 4 with three move by 4 and 2, the others by -4 and -6, of one example:
    # (4 + 3 * 2) / 4 = 2.5 and -5. From 2.5: 2.75 and 0.75, so 1.25; from -5: -1.5 and -3.5.
    shards = [line_shard("a", 8), line_shard("x", -8), line_shard("b", 4, 4, 4)]
    done = lines([*shards, line_shard("y", -12)], 2, engine)
    assert [adapters(each) for each in done] == [[2.5, -5.0], [3.75, -7.5]]
    # in the first round there was no choice yet
    assert [took(each) for each in done] == [[0, 0, 0, 0], [0, 1, 0, 1]]
    assert [u.loss for u in done[1].updates] == [5.5**2 / 2, 9 / 2, 1.5**2 / 2, 49 / 2]


def test_a_client_changes_to_the_cluster_that_has_come_nearer() -> None:
    # 8, 1 and -2 move by 4, 0.5 and -1: 1 joins 8, to 2.25, the other one is at -1. Then
    #   8 and 1 from 2.25: (2.875 - 0.625) / 2, to 3.375    -2 from -1: to -1.5
    #   the same from 3.375: to 3.9375                      to -1.75
    #   8 alone: to 5.96875     1 is 2.9375 from one and 2.75 from the other, and changes:
    #                           -1.75 + (-0.125 + 1.375) / 2 = -1.125
    done = lines([line_shard("a", 8), line_shard("e", 1), line_shard("x", -2)], 4)
    expected = [[2.25, -1.0], [3.375, -1.5], [3.9375, -1.75], [5.96875, -1.125]]
    assert [adapters(each) for each in done] == expected
    assert [took(each) for each in done] == [[0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 1]]


def test_a_cluster_that_nobody_takes_stays_and_only_one_travels_up() -> None:
    # as above, but with a cohort of one from the second round on
    shards = [line_shard("a", 8), line_shard("x", -8)]
    job = Train(Clients(Line(), ifca(), shards, 0), Budget(99), lambda _: HALF)
    start = ifca().init({"w": torch.tensor(0.0)})
    draw = [[0, 1], [0], [0]]
    plan, roster = Federation(clients=2, rounds=3), Roster(lambda r, _: draw[r])
    done = [*rounds(start, ifca(), run_serially, job, plan, roster)]
    assert [adapters(each) for each in done] == [[4.0, -4.0], [6.0, -4.0], [7.0, -4.0]]
    one = encode({"cluster.0.w": torch.tensor(0.0)})
    assert [u.bytes_up for each in done for u in each.updates] == [len(one)] * 4
    assert done[1].bytes_down == len(encode(start.adapter))


def test_the_clock_counts_the_bytes_of_one_adapter() -> None:
    # 1 byte a second
    done = lines([line_shard("a", 8), line_shard("x", -8)], 2, deadline=9e9)
    size = len(encode({"cluster.0.w": torch.tensor(0.0)}))
    assert [each.timing.clock for each in done if each.timing] == [size, 2 * size]


def test_a_client_chooses_by_the_examples_that_it_is_told_to() -> None:
    # squares from 0 and from -4 of what it trains on: of 8 alone 64 < 144, of 8 and -8 128 < 160,
    # of all three 192 > 176
    adapter = {"cluster.0.w": torch.tensor(0.0), "cluster.1.w": torch.tensor(-4.0)}
    for few, choice in ((1, 0.0), (2, 0.0), (0, 1.0), (3, 1.0)):
        held = Shard("a", numbers(8, -8, -8), numbers(-8), numbers(-8))
        clients = Clients(Line(), ifca(choose_by=few), [held], 0)
        assert float(clients.choose_cluster(0, adapter, {})[CLUSTER_KEY]) == choice


def test_who_never_trained_chooses_before_it_tunes() -> None:
    adapter = {"cluster.0.w": torch.tensor(4.0), "cluster.1.w": torch.tensor(-4.0)}
    shards = [line_shard("a", 8), line_shard("x", -8)]
    # what it chose once counts for nothing
    memory = {0: {CLUSTER_KEY: torch.tensor(1.0)}}
    clients = Clients(Line(), ifca(), shards, 0, memory=memory)
    job = Personalize(clients, Budget(99), HALF, Patience())
    orders = [Order((c,), 3, adapter) for c in (0, 1)]
    for engine in (run_serially, make_stacked_engine(2)):
        found: list[TuningResult] = [*engine(orders, job)]
        tuned = sorted(found, key=lambda each: each.order.clients)
        assert [each.cluster for each in tuned] == [0, 1]
        # halfway from 4 to 8
        assert [float(each.adapter["w"]) for each in tuned] == [6.0, -6.0]
    assert memory == {0: {CLUSTER_KEY: torch.tensor(1.0)}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clients: of every two neighbours one has sentences, the other one numbers."""
    path = tmp_path_factory.mktemp("data") / "both.jsonl"
    rows = []
    for c in range(10):
        told = [f"{7 * i + c} + {3 * i} = {10 * i + c}, {i}{c}{i} > {c}" for i in range(14)]
        own = told if c % 2 else sentences(14, c)
        rows += [{"text": text, "who": f"client {c}"} for text in own]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(texts: Path, **more: dict[str, Any]) -> Settings:
    table: dict[str, Any] = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "data": {"source": "jsonl", "path": str(texts), "client_field": "who", "length": 32},
        "federation": {"rounds": 4, "cohort": 6, "unseen_clients": 2},
        "method": {"name": "ifca", "choose_by": 8},
        "training": {"lr": 3e-2, "epochs": 2},
        "personal": {"epochs": 1},
        "engine": {"threads": 1},
        "evaluation": {"baselines": ["fedgen-edge"], "sample_tokens": 2, "prompts": ["One"]},
    }
    return from_table({k: {**table.get(k, {}), **more.get(k, {})} for k in {*table, *more}})


@pytest.fixture(scope="module")
def done(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    for _ in proceed(create(settings(texts), folder), folder):
        pass
    return folder


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parted(rows: list[dict[str, Any]]) -> bool:
    """Whether clients of one kind are in one cluster, and those of the other in the other."""
    pairs = {(int(row["client"][-1]) % 2, row["cluster"]) for row in rows}
    return pairs in ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})


def test_two_kinds_of_text_part_and_newcomers_find_their_kind(done: Path) -> None:
    # in the first round too, where clients had nothing to choose from
    assert all(parted(row["clients"]) for row in told(done / "rounds.jsonl"))
    tuned = told(done / "personal.jsonl")
    assert len(tuned) == 10
    assert parted(tuned)
    rows = told(done / "evaluation.jsonl")
    losses = {(r["model"], r["client"]): r["total"] / r["count"] for r in rows}
    for c in range(10):
        assert losses["global", f"client {c}"] < losses["fedgen-edge", f"client {c}"]


def test_the_clusters_and_the_clients_models_are_peft_folders(done: Path, tmp_path: Path) -> None:
    experiment, held = reopen(done), reopen(done).clients.shards
    assert not (done / "adapters" / "global").exists()
    tuned = {row["client"]: row["cluster"] for row in told(done / "personal.jsonl")}
    rows = {(r["model"], r["client"]): r for r in told(done / "evaluation.jsonl")}
    for c, name in enumerate(experiment.names):
        found = find_model_folder(done, f"cluster-{tuned[name]}")
        sums = experiment.evaluate_client(experiment.task.model.load(found), held[c].test)
        assert sums["total"] == pytest.approx(rows["global", name]["total"], rel=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(experiment.task.model.folder)
    ids = held[0].test["tokens"].long()
    logits = [plain(ids).logits]
    for name in ("cluster-0", "cluster-1", "client 0"):
        adapted = PeftModel.from_pretrained(plain, str(find_model_folder(done, name)))
        logits.append(adapted(ids).logits)
        plain = adapted.unload()
    for one, other in pairwise(logits):
        assert (one - other).abs().max() > 1e-3
    # whatever it took in a round that it was in, it is judged by what it would take now
    state, _ = load_latest(done)
    for c, name in enumerate(experiment.names):
        for old in (0.0, 1.0):
            own = experiment.get_client_model(state, {CLUSTER_KEY: torch.tensor(old)}, c)
            assert same(own, split_clusters(state.adapter)[tuned[name]])
    made = export(done, tmp_path / "copy", None, merge=False)
    assert [p.name for p in made[:2]] == ["cluster-0", "cluster-1"]
    assert len(made) == 2 + 10
    shown = {row["model"] for row in told(done / "samples.jsonl")}
    assert shown == {"backbone", "cluster-0", "cluster-1", "personal"}
    with pytest.raises(CheckpointError, match="ifca has no global model"):
        find_model_folder(done, None)


def short(texts: Path, **more: dict[str, Any]) -> Experiment:
    return build(settings(texts, evaluation={"baselines": []}, **more))


def trained(experiment: Experiment, algorithm: Any, start: Leaves, **plan: Any) -> Commit:
    """Three rounds from a start of one's own."""
    job = experiment.train
    job = replace(job, clients=replace(job.clients, algorithm=algorithm, memory={}))
    state = replace(algorithm.init(start), adapter=start)
    federation = Federation(clients=10, rounds=3, **plan)
    *_, after = rounds(state, algorithm, run_serially, job, federation)
    return after


def test_where_all_choose_one_cluster_it_is_fedavg_bit_by_bit(texts: Path) -> None:
    experiment = short(texts)
    plain = METHODS["fedgen-edge"].make(Method())
    bare = experiment.task.init(generator(0, "init"))
    # all fare better with what three rounds have taught than with the backbone
    start = trained(experiment, plain, bare, cohort=8).state.adapter
    both = {f"cluster.{c}.{k}": v for c, own in enumerate((bare, start)) for k, v in own.items()}
    expected = trained(experiment, plain, start, cohort=4).state.adapter
    found = split_clusters(trained(experiment, ifca(), both, cohort=4).state.adapter)
    assert all(torch.equal(found[0][k], bare[k]) for k in start)
    assert all(torch.equal(found[1][k], expected[k]) for k in start)
    assert any(not torch.equal(expected[k], start[k]) for k in start)


def test_rounds_of_fewer_clients_than_clusters_are_fedavgs_bit_by_bit(texts: Path) -> None:
    experiment = short(texts)
    start = experiment.task.init(generator(0, "init"))
    plain = METHODS["fedgen-edge"].make(Method())
    expected = trained(experiment, plain, start, cohort=2).state.adapter
    begun = ifca(3).begins(start)
    for own in split_clusters(trained(experiment, ifca(3), begun, cohort=2).state.adapter).values():
        assert all(torch.equal(own[k], expected[k]) for k in start)


@pytest.mark.parametrize("chain", [{}, {"sparsify": "top-k", "density": 0.2, "feedback": True}])
def test_stacked_clients_choose_and_end_as_serial_ones(texts: Path, chain: dict[str, Any]) -> None:
    experiment = short(texts, uplink=chain, training={"optimizer": "sgd", "lr": 0.5, "clip": 0.0})
    plan = Federation(clients=10, cohort=5, rounds=3)
    found = []
    for engine in (run_serially, make_stacked_engine(3), make_stacked_engine(5)):
        memory: dict[int, Leaves] = {}
        job = experiment.with_client_states(memory).train
        done = [*rounds(experiment.start(), experiment.algorithm, engine, job, plan)]
        found.append((done, memory))
    (expected, kept), *others = found
    for done, memory in others:
        assert [took(each) for each in done] == [took(each) for each in expected]
        for leaf, value in expected[-1].state.adapter.items():
            torch.testing.assert_close(done[-1].state.adapter[leaf], value, atol=1e-5, rtol=0)
        assert {c: float(own[CLUSTER_KEY]) for c, own in memory.items()} == {
            c: float(own[CLUSTER_KEY]) for c, own in kept.items()
        }
    assert {which for each in expected[1:] for which in took(each)} == {0, 1}


def test_what_a_payload_left_out_waits_for_its_own_cluster(texts: Path) -> None:
    experiment = short(texts, uplink={"sparsify": "top-k", "density": 0.2, "feedback": True})
    memory: dict[int, Leaves] = {}
    job, adapter = experiment.with_client_states(memory).train, experiment.start().adapter
    job.commit_updates(updates := job([Order((0,), 0, adapter)], stacked=False))
    first = {k: v for k, v in memory[0].items() if k.startswith("left:")}
    assert {k[:14] for k in first} == {"left:cluster.0"}
    # what it has learnt is in the other one now
    change = {k.replace("cluster.0", "cluster.1"): v for k, v in updates[0].delta.items()}
    job.commit_updates(job([Order((0,), 1, add(adapter, change))], stacked=False))
    assert {k[:14] for k in memory[0] if k.startswith("left:")} == {
        "left:cluster.0",
        "left:cluster.1",
    }
    assert all(torch.equal(memory[0][k], v) for k, v in first.items())


def test_what_cannot_work_is_refused_with_what_would(texts: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.clusters=3 must be at most 2, the clients of"):
        short(texts, federation={"cohort": 2}, method={"clusters": 3})
    with pytest.raises(ConfigError, match=r"method\.clusters=1"):
        short(texts, method={"clusters": 1})
    with pytest.raises(ConfigError, match=r"adapter\.ranks=\[2, 8\] cannot go with"):
        short(texts, adapter={"ranks": [2, 8]})
    remote = replace(
        settings(texts, evaluation={"baselines": []}), method=Method("ifca", clusters=4)
    )
    remote = replace(remote, federation=Federation(rounds=2))
    with pytest.raises(ConfigError, match=r"method\.clusters=4 must be at most 3, the clients of"):
        check_deployable(remote, 3)
    check_deployable(remote, 4)
