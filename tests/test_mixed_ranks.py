"""Rounds of clients whose adapters have different ranks."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW

from conftest import corpus_for
from fedgen_edge.adapters.ranks import cut, truncated
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS, method
from fedgen_edge.client import Factory, Recipe, local_update
from fedgen_edge.config import Adapter, Federation, Method, Settings, from_table
from fedgen_edge.data.batches import Budget, Shard
from fedgen_edge.engines.serial import serial
from fedgen_edge.engines.stacked import stacked
from fedgen_edge.jobs import Clients, Train
from fedgen_edge.leaves import add, row
from fedgen_edge.rounds import Engine, rounds
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TASKS, Learnt
from fedgen_edge.types import Commit, Order
from fedgen_edge.uplink.transform import encode

RANKS = (1, 4, 2)
OPTIMISERS: dict[str, Factory] = {
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.3),
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.3),
}
UNEQUAL = [name for name, entry in METHODS.items() if entry.unequal]
SHARING = [name for name in UNEQUAL if name != "local-only"]


def settings(name: str) -> Settings:
    return from_table(
        {
            "backbone": {"path": "tiny", "precision": "float32"},
            "adapter": {"rank": 4, "ranks": RANKS, "dropout": 0.2},
            "data": {"length": 32},
            "method": {"name": name},
        }
    )


@pytest.fixture(scope="module")
def task() -> Learnt:
    return TASKS["language"](settings("rbla"), full=False, device=torch.device("cpu"))


def clients_of(task: Learnt, algorithm: Algorithm) -> Clients:
    shards = []
    for client, size in enumerate((5, 7, 2, 4)):
        examples = task.examples(corpus_for(task, size, client), range(size))
        shards.append(Shard(f"c{client}", examples, examples, examples))
    return Clients(task, algorithm, shards, 0)


def run(task: Learnt, name: str, engine: Engine, ranks: tuple[int, ...] = RANKS) -> list[Commit]:
    """Two rounds of four clients, the first and the last of one rank."""
    algorithm = method(Method(name=name), adapter=Adapter(rank=4, ranks=ranks))
    recipe = Recipe(OPTIMISERS["adamw"], 1.0)
    job = Train(clients_of(task, algorithm), Budget(2, epochs=2), lambda _: recipe)
    start = algorithm.init(task.init(generator(0, "init")))
    return [*rounds(start, algorithm, engine, job, Federation(clients=4, rounds=2))]


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("stacked", [False, True])
def test_what_a_client_lacks_stays_zero_while_it_trains(
    task: Learnt, optimiser: Factory, stacked: bool
) -> None:
    clients, budget = clients_of(task, Algorithm()), Budget(2, epochs=2)
    rng = generator("server")
    server = {k: torch.randn(v.shape, generator=rng) * 0.1 for k, v in task.init(rng).items()}
    orders = [Order((c,), 0, cut(server, r), rank=r) for c, r in ((1, 4), (0, 1), (2, 2))]
    for some in [orders] if stacked else [[order] for order in orders]:
        start, memory, batches = clients.together(some, budget, "train", stacked=stacked)
        delta, _ = local_update(task, start, memory, batches, Recipe(optimiser, 1.0))
        for at, order in enumerate(some):
            own = row(delta, at) if stacked else delta
            for name, moved in cut(own, order.rank).items():
                assert torch.equal(own[name], moved)
                assert torch.equal(own[name] != 0, cut(server, order.rank)[name] != 0)


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_stack_of_unequal_ranks_trains_as_each_client_alone(task: Learnt, name: str) -> None:
    *_, one = run(task, name, serial)
    for engine in (stacked(4), stacked(3)):
        *_, other = run(task, name, engine)
        for leaf, value in one.state.adapter.items():
            torch.testing.assert_close(other.state.adapter[leaf], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SHARING)
def test_only_the_terms_of_a_clients_rank_travel_and_each_byte_is_counted(
    task: Learnt, name: str
) -> None:
    commits = run(task, name, serial)
    start = task.init(generator(0, "init"))
    for commit in commits:
        assert [u.order.rank for u in commit.updates] == [1, 4, 2, 1]
        for update in commit.updates:
            order, few = update.order, truncated(start, update.order.rank)
            # the header's offsets have as many digits as the values make them
            assert len(order.payload) == len(encode(few))
            assert update.bytes_up == len(encode(truncated(update.delta, order.rank)))
            assert update.bytes_up == len(order.payload)
            for leaf, value in order.received.items():
                assert value.shape == start[leaf].shape == update.delta[leaf].shape
                assert torch.equal(value, cut(order.received, order.rank)[leaf])
        small, large = commit.updates[0], commit.updates[1]
        assert sum(v.numel() for v in truncated(start, 1).values()) * 4 == sum(
            v.numel() for v in start.values()
        )
        assert small.bytes_up < 0.5 * large.bytes_up
        assert commit.updates[3].order.payload is small.order.payload
        assert commit.bytes_down == sum(len(u.order.payload) for u in commit.updates)
    moved = add(commits[0].updates[1].order.received, commits[0].updates[1].delta)
    assert any(bool((v != start[k]).any()) for k, v in moved.items())


@pytest.mark.parametrize("name", SHARING)
def test_clients_whose_ranks_are_all_the_adapters_train_as_those_without(
    task: Learnt, name: str
) -> None:
    (*_, one), (*_, other) = run(task, name, serial, (4, 4)), run(task, name, serial, ())
    for leaf, value in one.state.adapter.items():
        assert torch.equal(other.state.adapter[leaf], value)
    *_, unequal = run(task, name, serial)
    assert any(not torch.equal(unequal.state.adapter[k], v) for k, v in one.state.adapter.items())
