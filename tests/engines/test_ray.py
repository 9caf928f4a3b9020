"""Clients on a cluster of Ray's: a small one of this machine, which these tests start and end."""

# ruff: noqa: E402  (what follows needs ray, or is skipped)

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.optim import SGD, AdamW

ray: Any = pytest.importorskip("ray", reason="the extra ray is not installed")

from conftest import Line, line_shard, sentences
from contracts.test_contracts import NEAR, make, run, shards, trainer
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Method, load
from fedgen_edge.data.batches import Budget
from fedgen_edge.engines import ray as on_ray
from fedgen_edge.engines.ray import RayWorkerPool
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.engines.workers import JobFactory, JobType, WorkerPool
from fedgen_edge.errors import (
    ConfigError,
    FedGenError,
    MissingExtraError,
    TrainingError,
    WorkerError,
)
from fedgen_edge.federation.client import Patience, Recipe
from fedgen_edge.federation.jobs import Clients, Job, Train
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.federation.states import encode_server_state
from fedgen_edge.runs.run import create, proceed
from fedgen_edge.types import Commit, Leaves, Order, Update
from runs.test_resume import finish, outcome, settings


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """It has more cores than the machine, by its own account: workers here do little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # a worker imports this file
        on_ray._connect(None, num_cpus=8, object_store_memory=100 << 20)
        yield
        ray.shutdown()


Kept = MutableMapping[int, Leaves]


def jobs() -> JobFactory:
    """What the contract suite's clients do, by `METHOD TASK`."""
    torch.set_num_threads(1)
    task = cache(make)

    def job(what: str, kind: JobType, memory: Kept) -> Job:
        name, learnt = what.split()
        algorithm = METHODS[name].make(Method(mu=0.1))
        made = task(learnt, full=algorithm.adapts == "full")
        if kind is Train:
            return trainer(made, name, algorithm, memory)  # pyright: ignore[reportArgumentType]
        return tuner(made)

    return job


def tuner(task: Any) -> Personalize:
    clients = Clients(task, Algorithm(), shards(task), 0)
    recipe = Recipe(partial(AdamW, lr=1e-3), 1.0)
    return Personalize(clients, Budget(2, epochs=3), recipe, Patience())


@pytest.fixture(scope="module")
def fleet(cluster: None) -> Iterator[RayWorkerPool]:
    made = RayWorkerPool(jobs, workers=2)
    yield made
    made.close()


def same(one: Leaves, other: Leaves) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def said(commit: Commit) -> list[Any]:
    """All of a commit's updates but their leaves."""
    return [
        (u.order.clients, u.weight, u.loss, u.steps, u.bytes_up, u.client_norm)
        for u in commit.updates
    ]


def test_it_is_what_an_experiment_asks_for(fleet: RayWorkerPool) -> None:
    assert isinstance(fleet, WorkerPool)


# one of every kind: nothing remembered, kept leaves, variates, products, clusters, phases
@pytest.mark.parametrize(
    ("name", "learnt"),
    [("fedgen-edge", "language"), ("fedper", "language"), ("scaffold", "language"),
     ("flexlora", "language"), ("ifca", "language"), ("fedbuff", "language"),
     ("ditto", "gan")],
)  # fmt: skip
def test_rounds_end_as_those_of_one_machine_to_the_last_bit(
    fleet: RayWorkerPool, name: str, learnt: str
) -> None:
    task = make(learnt)
    expected, memory = run(task, name, make_stacked_engine(2))
    found, kept = run(task, name, fleet.engine(f"{name} {learnt}", 2, sums=False))
    assert same(found.state.adapter, expected.state.adapter)
    assert encode_server_state(found.state) == encode_server_state(expected.state)
    assert said(found) == said(expected)
    assert kept.keys() == memory.keys()
    assert all(same(kept[client], memory[client]) for client in memory)


def test_whole_models_which_no_stack_holds_are_trained_one_by_one(fleet: RayWorkerPool) -> None:
    task = make("language", full=True)
    expected, _ = run(task, "fedavg-full", run_serially, 1)
    found, _ = run(task, "fedavg-full", fleet.engine("fedavg-full language", None, sums=False), 1)
    assert same(found.state.adapter, expected.state.adapter)


@pytest.mark.parametrize("name", ["fedgen-edge", "fedadam", "fedper", "scaffold"])
def test_with_sums_rounds_end_as_without(fleet: RayWorkerPool, name: str) -> None:
    task = make("language")
    expected, memory = run(task, name, make_stacked_engine(2))
    found, kept = run(task, name, fleet.engine(f"{name} language", 2, sums=True))
    for leaf, value in expected.state.adapter.items():
        near = NEAR["language"]
        torch.testing.assert_close(found.state.adapter[leaf], value, atol=near, rtol=0)
    assert kept.keys() == memory.keys()
    assert [u.bytes_up for u in found.updates] == [u.bytes_up for u in expected.updates]
    # three clients at two workers: two have a change in common
    assert len({u.delta["model.layers.0.self_attn.q_proj.lora_B"].sum() for u in found.updates}) > 1
    assert all(u.client_norm for u in found.updates)


def test_personal_adapters_come_as_those_of_one_machine_and_in_their_order(
    fleet: RayWorkerPool,
) -> None:
    task = make("language")
    start = task.init(torch.Generator().manual_seed(0))
    orders = [Order((c,), 5, start) for c in (2, 0, 1)]
    expected = [*make_stacked_engine(2)(orders, tuner(task))]
    found = [*fleet.engine("fedgen-edge language", 2, sums=True)(orders, tuner(task))]
    assert [(t.order, t.history, t.chosen) for t in found] == [
        (t.order, t.history, t.chosen) for t in expected
    ]
    assert all(same(a.adapter, b.adapter) for a, b in zip(found, expected, strict=True))


class Elsewhere:
    """A job that is no simulation's."""

    def steps(self, order: Order) -> int:
        return order.round

    def get_stack_group(self, order: Order) -> int:
        return order.round

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
        raise AssertionError(orders, stacked)


def test_a_job_of_sites_is_not_for_workers(fleet: RayWorkerPool) -> None:
    with pytest.raises(TypeError, match="simulation"):
        list(fleet.engine("any", 2, sums=False)([], Elsewhere()))


def dying(deaths: Path, times: int) -> JobFactory:
    """Jobs at which a worker is killed in the middle of a round, so many times."""

    def job(what: str, kind: JobType, memory: Kept) -> Job:
        def recipe(round_: int) -> Recipe:
            if len(deaths.read_bytes()) < times:
                with deaths.open("ab") as file:
                    file.write(b".")
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(round_)

        return lines(memory, recipe)

    return job


def plain(round_: int) -> Recipe:
    return Recipe(partial(SGD, lr=0.5))


def lines(memory: Kept, recipe: Callable[[int], Recipe] = plain) -> Train:
    held = [line_shard(str(c), *map(float, range(c + 1))) for c in range(4)]
    return Train(Clients(Line(), Algorithm(), held, 0, memory=memory), Budget(2), recipe)


ORDERS = [Order((c,), 0, {"w": torch.tensor(0.5)}) for c in range(4)]


def test_a_worker_that_is_killed_in_a_round_changes_nothing(tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    deaths.touch()
    fleet = RayWorkerPool(partial(dying, deaths, 1), workers=2)
    found = list(fleet.engine("any", 1, sums=False)(ORDERS, lines({})))
    assert deaths.read_bytes() == b"."
    assert found == list(make_stacked_engine(1)(ORDERS, lines({})))
    fleet.close()


def test_a_worker_that_dies_every_time_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "MAX_RETRIES", 1)
    deaths = tmp_path / "deaths"
    deaths.touch()
    fleet = RayWorkerPool(partial(dying, deaths, 99), workers=1)
    with pytest.raises(WorkerError, match="its work was tried 2 times") as error:
        list(fleet.engine("any", 1, sums=False)(ORDERS, lines({})))
    assert "\n" not in str(error.value)
    assert deaths.read_bytes() == b".."
    fleet.close()


def failing(pid: Path) -> JobFactory:
    pid.write_text(str(os.getpid()))

    def job(what: str, kind: JobType, memory: Kept) -> Job:
        if what == "diverged":
            raise TrainingError("round 1, client a: lost")
        raise MissingExtraError("this", "hub")

    return job


def test_what_workers_refuse_is_said_here_and_they_end_before_a_cluster_that_was_there(
    tmp_path: Path,
) -> None:
    pid = tmp_path / "pid"
    fleet = RayWorkerPool(partial(failing, pid), workers=1)
    with pytest.raises(TrainingError, match=r"^round 1, client a: lost$"):
        list(fleet.engine("diverged", 1, sums=False)(ORDERS, lines({})))
    lacking = r"^a worker of engine.name='ray': this needs the extra hub: [^\n]*$"
    with pytest.raises(FedGenError, match=lacking):
        list(fleet.engine("lacking", 1, sums=False)(ORDERS, lines({})))
    worker = psutil.Process(int(pid.read_text()))
    fleet.close()
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running()
    assert ray.is_initialized()


def test_workers_for_whom_there_is_no_room_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.workers=3.*threads=4 cores.*room for 2"):
        RayWorkerPool(jobs, on_ray.WorkerResources(4), 3).connect()
    with pytest.raises(ConfigError, match=r"an accelerator each, .* room for 0"):
        RayWorkerPool(jobs, on_ray.WorkerResources(1, 1)).connect()
    assert RayWorkerPool(jobs, on_ray.WorkerResources(4)).connect() == 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clients of unequal size."""
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    rows = [
        {"text": text, "who": f"client {c}"} for c in range(5) for text in sentences(6 + 3 * c, c)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ON_RAY = {"name": "ray", "threads": 1, "stack": 2, "workers": 2}


def test_a_run_stopped_and_resumed_leaves_what_a_run_on_one_machine_leaves(
    text: Path, tmp_path: Path
) -> None:
    short = {"rounds": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    create(settings(text, federation=short), whole)
    finish(whole)
    events = proceed(create(settings(text, federation=short, engine=ON_RAY), broken), broken)
    assert [next(events).completed for _ in range(2)] == [1, 2]
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    finish(broken)
    assert outcome(broken) == outcome(whole)
    assert load(broken / "settings.toml").engine.workers == 2
