"""Runs with workers, as far as no cluster is needed: what is refused, and what sums leave out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import sentences
from fedgen_edge.compression.serialize import encode
from fedgen_edge.config import from_table
from fedgen_edge.engines.stacked import make_stacks
from fedgen_edge.engines.workers import (
    JobFactory,
    WorkerPool,
    make_batch,
    restore_result,
    run_batch,
)
from fedgen_edge.errors import ConfigError, MissingExtraError
from fedgen_edge.federation.jobs import Engine, Job, Train, TuningResult
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.runs import build as building
from fedgen_edge.runs.run import create, proceed
from fedgen_edge.types import Order, Update


def told(engine: dict[str, Any], method: str = "fedgen-edge") -> Any:
    return from_table({
        "engine": engine,
        "method": {"name": method},
        "backbone": {"path": "tiny"},
        "data": {"packages": ["json", "xml"], "length": 32},
    })  # fmt: skip


def test_without_its_extra_a_run_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "find_spec", lambda name: None if name == "ray" else object())
    with pytest.raises(MissingExtraError, match=r"engine\.name='ray' needs the extra ray: .*ray<"):
        create(told({"name": "ray"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("engine", "said"),
    [({"workers": 2}, "engine.workers=2"), ({"address": "a:1"}, "engine.address='a:1'"),
     ({"aggregate_on_workers": True, "name": "stacked"},
      "engine.aggregate_on_workers=True .* engine.name='stacked'")],
)  # fmt: skip
def test_what_is_of_workers_is_refused_where_there_are_none(
    engine: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        create(told(engine), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["flexlora", "fedbuff", "ifca"])
def test_sums_are_refused_to_a_method_that_needs_more(method: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"method.name='{method}' .*engine.aggregate_on_workers=true: leave"
    ):
        create(told({"name": "ray", "aggregate_on_workers": True}, method), tmp_path / "run")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1", "auto", "127.0.0.1:70000"])
def test_an_address_where_nobody_answers_is_refused_before_anything_is_written(
    address: str, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(ConfigError, match=f"engine.address='{address}' is no cluster"):
        create(told({"name": "ray", "address": address}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Alone:
    """One worker, in this process."""

    jobs: JobFactory

    def engine(self, method: str, stack: int | None, *, sums: bool) -> Engine:
        def run(orders: Sequence[Order], job: Job) -> Iterator[Update | TuningResult]:
            assert isinstance(job, Train | Personalize)
            parts = [*make_stacks(orders, job, stack or 1)]
            work, adapters = make_batch(method, job, parts, stacked=stack is not None, sums=sums)
            said = run_batch(self.jobs, work, [encode(own) for own in adapters])
            given = {order.clients: order for order in orders}
            yield from (restore_result(one, given) for results in said for one in results)

        return run

    def close(self) -> None:
        pass


def test_with_sums_a_run_tells_all_but_what_merging_missed(tmp_path: Path) -> None:
    jobs = pytest.importorskip("fedgen_edge.runs.ray_workers", reason="the extra ray").jobs
    text = tmp_path / "text.jsonl"
    rows = [{"text": s, "who": f"client {c}"} for c in range(3) for s in sentences(6 + 3 * c, c)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = from_table({
        "backbone": {"path": "tiny", "precision": "float32"},
        "data": {"source": "jsonl", "path": str(text), "client_field": "who", "length": 32},
        "federation": {"rounds": 1},
        "personal": {"epochs": 0},
        "engine": {"threads": 1, "stack": 2},
        "evaluation": {"sample_tokens": 0},
    })  # fmt: skip
    told = []
    for sums in (False, True):
        made = create(quick, tmp_path / str(sums))
        staff = Alone(jobs(made.settings))
        assert isinstance(staff, WorkerPool)
        asked_for = replace(
            made.settings, engine=replace(made.settings.engine, aggregate_on_workers=sums)
        )
        for _ in proceed(
            replace(made, settings=asked_for, worker_pool=staff), tmp_path / str(sums)
        ):
            pass
        told.append(json.loads((tmp_path / str(sums) / "rounds.jsonl").read_text()))
    plain, sums = told
    # how far a product moved is not in the mean of its factors
    assert all(client.pop("drift") for client in plain["clients"])
    assert not any(client.pop("drift") for client in sums["clients"])
    assert plain["mean_norm"] > 0
    assert sums["mean_norm"] is None
    assert sums["clients"] == plain["clients"]
    assert len({client["norm"] for client in plain["clients"]}) == 3
    assert sums["update_norm"] == pytest.approx(plain["update_norm"], rel=1e-5)
    for layer, found in plain["layers"].items():
        assert found.pop("error") > 0
        assert sums["layers"][layer] == pytest.approx(found, rel=1e-4)


class Idle:
    """Workers who are never asked."""

    def engine(self, method: str, stack: int | None, *, sums: bool) -> Engine:
        del method, stack, sums
        return lambda *_: iter(())

    def close(self) -> None: ...


def test_full_models_beside_adapters_in_stacks_are_judged_one_by_one() -> None:
    # as a baseline of a run with workers: full models cannot be stacked
    adapters = building.build(told({"name": "stacked", "stack": 2}))
    full = building.with_method(replace(adapters, worker_pool=Idle()), "fedavg-full")
    start, shards = full.start().adapter, full.clients.shards
    assert len(shards) == 2
    found = list(full.evaluate_clients((start, shard.test) for shard in shards))
    assert found == [full.evaluate_client(start, shard.test) for shard in shards]
