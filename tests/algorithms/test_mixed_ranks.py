"""Rounds of clients whose adapters have different ranks."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW

from conftest import corpus_for
from fedgen_edge.adapters.ranks import mask_rank, truncate_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS, make_algorithm
from fedgen_edge.compression.serialize import encode
from fedgen_edge.config import Adapter, Federation, Method, Settings, from_table
from fedgen_edge.data.batches import Budget, Shard
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.federation.client import OptimizerFactory, Recipe, local_update
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.rounds import Engine, rounds
from fedgen_edge.leaves import add, row
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TASKS, TrainableTask
from fedgen_edge.types import Commit, Order

RANKS = (1, 4, 2)
OPTIMISERS: dict[str, OptimizerFactory] = {
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.3),
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.3),
}
UNEQUAL = [name for name, entry in METHODS.items() if entry.mixed_ranks]
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
def task() -> TrainableTask:
    return TASKS["language"](settings("rbla"), full=False, device=torch.device("cpu"))


def clients_of(task: TrainableTask, algorithm: Algorithm) -> Clients:
    shards = []
    for client, size in enumerate((5, 7, 2, 4)):
        examples = task.examples(corpus_for(task, size, client), range(size))
        shards.append(Shard(f"c{client}", examples, examples, examples))
    return Clients(task, algorithm, shards, 0)


def run(
    task: TrainableTask, name: str, engine: Engine, ranks: tuple[int, ...] = RANKS
) -> list[Commit]:
    """Two rounds of four clients, the first and the last of one rank."""
    algorithm = make_algorithm(Method(name=name), adapter=Adapter(rank=4, ranks=ranks))
    recipe = Recipe(OPTIMISERS["adamw"], 1.0)
    job = Train(clients_of(task, algorithm), Budget(2, epochs=2), lambda _: recipe)
    start = algorithm.init(task.init(generator(0, "init")))
    return [*rounds(start, algorithm, engine, job, Federation(clients=4, rounds=2))]


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("stacked", [False, True])
def test_what_a_client_lacks_stays_zero_while_it_trains(
    task: TrainableTask, optimiser: OptimizerFactory, stacked: bool
) -> None:
    clients, budget = clients_of(task, Algorithm()), Budget(2, epochs=2)
    rng = generator("server")
    server = {k: torch.randn(v.shape, generator=rng) * 0.1 for k, v in task.init(rng).items()}
    orders = [Order((c,), 0, mask_rank(server, r), rank=r) for c, r in ((1, 4), (0, 1), (2, 2))]
    for some in [orders] if stacked else [[order] for order in orders]:
        start, memory, batches = clients.prepare_inputs(some, budget, "train", stacked=stacked)
        delta, _ = local_update(task, start, memory, batches, Recipe(optimiser, 1.0))
        for at, order in enumerate(some):
            own = row(delta, at) if stacked else delta
            for name, moved in mask_rank(own, order.rank).items():
                assert torch.equal(own[name], moved)
                assert torch.equal(own[name] != 0, mask_rank(server, order.rank)[name] != 0)


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_stack_of_unequal_ranks_trains_as_each_client_alone(
    task: TrainableTask, name: str
) -> None:
    *_, one = run(task, name, run_serially)
    for engine in (make_stacked_engine(4), make_stacked_engine(3)):
        *_, other = run(task, name, engine)
        for leaf, value in one.state.adapter.items():
            torch.testing.assert_close(other.state.adapter[leaf], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SHARING)
def test_only_the_terms_of_a_clients_rank_travel_and_each_byte_is_counted(
    task: TrainableTask, name: str
) -> None:
    commits = run(task, name, run_serially)
    start = task.init(generator(0, "init"))
    for commit in commits:
        assert [u.order.rank for u in commit.updates] == [1, 4, 2, 1]
        for update in commit.updates:
            order, few = update.order, truncate_rank(start, update.order.rank)
            # the header's offsets have as many digits as the values make them
            assert len(order.payload) == len(encode(few))
            assert update.bytes_up == len(encode(truncate_rank(update.delta, order.rank)))
            assert update.bytes_up == len(order.payload)
            for leaf, value in order.received.items():
                assert value.shape == start[leaf].shape == update.delta[leaf].shape
                assert torch.equal(value, mask_rank(order.received, order.rank)[leaf])
        small, large = commit.updates[0], commit.updates[1]
        assert sum(v.numel() for v in truncate_rank(start, 1).values()) * 4 == sum(
            v.numel() for v in start.values()
        )
        assert small.bytes_up < 0.5 * large.bytes_up
        assert commit.updates[3].order.payload is small.order.payload
        assert commit.bytes_down == sum(len(u.order.payload) for u in commit.updates)
    moved = add(commits[0].updates[1].order.received, commits[0].updates[1].delta)
    assert any(bool((v != start[k]).any()) for k, v in moved.items())


@pytest.mark.parametrize("name", SHARING)
def test_clients_whose_ranks_are_all_the_adapters_train_as_those_without(
    task: TrainableTask, name: str
) -> None:
    (*_, one), (*_, other) = (
        run(task, name, run_serially, (4, 4)),
        run(task, name, run_serially, ()),
    )
    for leaf, value in one.state.adapter.items():
        assert torch.equal(other.state.adapter[leaf], value)
    *_, unequal = run(task, name, run_serially)
    assert any(not torch.equal(unequal.state.adapter[k], v) for k, v in one.state.adapter.items())
