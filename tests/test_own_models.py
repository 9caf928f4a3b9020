"""What clients train beside the shared model, or before it: by hand, and against other methods."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW

from conftest import Line, line_shard, numbers, sentences
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS, check
from fedgen_edge.config import Federation, Method, from_table
from fedgen_edge.data.batches import Budget, Shard, pack
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.client import Patience, Recipe, descend
from fedgen_edge.federation.jobs import Clients, Train, TuningResult
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.federation.rounds import Engine, rounds
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Commit, Leaves, Order

ENGINES = (run_serially, make_stacked_engine(3))
A, B = line_shard("a", 4), line_shard("b", 8)


def run_line(
    name: str, count: int, engine: Engine = run_serially, rate: float = 0.5, **settings: float
) -> tuple[Commit, dict[int, Leaves]]:
    """Full-batch rounds on a Line from w = 0, of clients that hold 4 and 8."""
    memory: dict[int, Leaves] = {}
    algorithm = METHODS[name].make(Method(**settings))  # pyright: ignore[reportArgumentType]
    clients = Clients(Line(), algorithm, [A, B], 0, memory=memory)
    recipe = Recipe(partial(SGD, lr=rate), corrects=algorithm.corrects)
    job = Train(clients, Budget(99), lambda _: recipe)
    start = algorithm.init({"w": torch.tensor(0.0)})
    *_, last = rounds(start, algorithm, engine, job, Federation(clients=2, rounds=count))
    return last, memory


def own(memory: dict[int, Leaves]) -> list[float]:
    assert all({*kept} == {"own:w"} for kept in memory.values())
    return [float(memory[client]["own:w"]) for client in (0, 1)]


@pytest.mark.parametrize("engine", ENGINES)
def test_ditto_trains_its_own_model_towards_the_shared_one(engine: Engine) -> None:
    # G: halfway to 4 and to 8 is 2 and 4, mean 3; then 3.5 and 5.5, mean 4.5.
    # v: in the first round v = G = 0, no pull: 2 and 4. In the second G = 3, with lambda 1:
    # 2 - ((2 - 4) + (2 - 3)) / 2 = 3.5 and 4 - ((4 - 8) + (4 - 3)) / 2 = 5.5.
    last, memory = run_line("ditto", 1, engine, ditto_lambda=1.0)
    assert float(last.state.adapter["w"]) == 3.0
    assert own(memory) == [2.0, 4.0]
    last, memory = run_line("ditto", 2, engine, ditto_lambda=1.0)
    assert float(last.state.adapter["w"]) == 4.5
    assert own(memory) == [3.5, 5.5]


def test_dittos_pull_is_between_training_alone_and_the_shared_model() -> None:
    # one step at rate 1 / (1 + lambda) ends at the minimum, (x + lambda G) / (1 + lambda);
    # G and v begin at 0, and in the second round G = (2 + 4) / 2 of 4 / 1000 and 8 / 1000
    for count, shared in ((1, 0.0), (2, 0.006)):
        _, memory = run_line("ditto", count, rate=1e-3, ditto_lambda=999.0)
        expected = [(x + 999 * shared) / 1000 for x in (4.0, 8.0)]
        assert own(memory) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_feddpa_trains_its_own_adapter_with_the_shared_one_mixed_in(engine: Engine) -> None:
    # P = G = 0: the mixture 0 goes halfway to 4 and 8, to 2 and 4, all by P's half: 4 and 8.
    # G = 3. Mixed: (4 + 3) / 2 = 3.5 and 5.5; halfway: 3.75 and 6.75; P = 2 * those - 3.
    _, memory = run_line("feddpa", 1, engine)
    assert own(memory) == [4.0, 8.0]
    last, memory = run_line("feddpa", 2, engine)
    assert own(memory) == [4.5, 10.5]
    assert float(last.state.adapter["w"]) == 4.5


@pytest.mark.parametrize("name", ["ditto", "feddpa"])
def test_the_shared_model_is_fedavgs_and_own_ones_never_travel(name: str) -> None:
    last, _ = run_line(name, 3)
    plain, _ = run_line("fedgen-edge", 3)
    assert last.state.adapter == plain.state.adapter
    for update, other in zip(last.updates, plain.updates, strict=True):
        assert {*update.delta} == {"w"}
        assert update.bytes_up == other.bytes_up
    assert last.bytes_down == plain.bytes_down


@pytest.mark.parametrize("name", ["ditto", "feddpa"])
def test_what_corrects_the_shared_model_is_not_told_of_own_ones(name: str) -> None:
    told = []

    def corrects(grads: Leaves, now: Leaves, start: Leaves, memory: Leaves) -> Leaves:
        del now, start
        told.append({*memory})
        return grads

    algorithm = replace(METHODS[name].make(Method()), corrects=corrects)
    memory = {0: {"own:w": torch.tensor(5.0), "noted": torch.tensor(1.0)}}
    job = Train(
        Clients(Line(), algorithm, [A], 0, memory=memory),
        Budget(99),
        lambda _: Recipe(partial(SGD, lr=0.5), corrects=corrects),
    )
    (sent,) = job.send([Order((0,), 0, {"w": torch.tensor(0.0)})], stacked=False)
    assert told == [{"noted"}]
    # what else is remembered stays
    assert {*sent.memory} == {"own:w", "noted"}


def tuning(name: str, mixing: tuple[float, ...] = (), epochs: int = 1) -> Personalize:
    """Of clients whose own models are 10 and 20, and who hold 4 and 8; 3 and 100 for validation."""
    algorithm = METHODS[name].make(Method())
    memory = {c: {"own:w": torch.tensor(w)} for c, w in enumerate((10.0, 20.0))}
    shards = [replace(A, validation=numbers(3.0)), replace(B, validation=numbers(100.0))]
    clients = Clients(Line(), algorithm, shards, 0, memory=memory)
    recipe = Recipe(partial(SGD, lr=0.5))
    return Personalize(clients, Budget(99, epochs), recipe, Patience(fallback=not epochs), mixing)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "begins"), [("ditto", (10.0, 20.0)), ("feddpa", (5.0, 10.0)), ("fedprox", (0.0, 0.0))]
)
def test_tuning_begins_from_the_own_model(
    engine: Engine, name: str, begins: tuple[float, ...]
) -> None:
    orders = [Order((c,), 9, {"w": torch.tensor(0.0)}) for c in (0, 1)]
    kept = [float(t.adapter["w"]) for t in engine(orders, tuning(name, epochs=0))]
    assert kept == [*begins]
    # halfway to 4 and to 8
    moved = [float(t.adapter["w"]) for t in engine(orders, tuning(name))]
    assert moved == [(begins[0] + 4) / 2, (begins[1] + 8) / 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_keep_the_mixture_that_their_validation_data_like_best(engine: Engine) -> None:
    # tuned: halfway from the shared 0 to 4 and 8, 2 and 4; from the shared 6 it is 5 and 7.
    orders = [Order((c,), 9, {"w": torch.tensor(6.0)}) for c in (0, 1)]
    job = tuning("fedgen-edge", (0.0, 0.25, 0.5))
    # of 5 and 6, 5 is the nearest to 3; of 7 and 6, 7 to 100
    found = [(float(t.adapter["w"]), t.share) for t in engine(orders, job)]
    assert found == [(5.0, 1.0), (7.0, 1.0)]
    # ditto: from 10 and 20 it is 7 and 14; w 7 + (1 - w) 2 is nearest to 3 at 0.25: 3.25
    orders = [Order((c,), 9, {"w": torch.tensor(2.0)}) for c in (0, 1)]
    found = [(float(t.adapter["w"]), t.share)
             for t in engine(orders, tuning("ditto", (0.0, 0.25, 0.5)))]  # fmt: skip
    assert found == [(3.25, 0.25), (14.0, 1.0)]
    # feddpa: from 6 and 11 it is 5 and 9.5, so the own adapters are 8 and 17
    found = [(float(t.adapter["w"]), t.share)
             for t in engine(orders, tuning("feddpa", (0.0, 0.5)))]  # fmt: skip
    assert found == [(2.0, 0.0), (17.0, 1.0)]


def test_where_mixtures_are_equal_the_own_adapter_counts_most() -> None:
    job = tuning("fedgen-edge", (0.0, 0.5), epochs=0)
    (tuned,) = job([Order((0,), 9, {"w": torch.tensor(2.0)})], stacked=False)
    assert tuned.share == 1.0


SIZES = (9, 10, 2, 4)
"""Of batches of two, five and five, one and two in an epoch."""


@pytest.fixture(scope="module")
def task() -> Language:
    table = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "data": {"length": 32},
    }
    return language.build(from_table(table), full=False, device=torch.device("cpu"))


def trainer(task: Language, algorithm: Algorithm, memory: dict[int, Leaves]) -> Train:
    def held(client: int, size: int) -> Shard:
        texts = sentences(4 * size, client)
        packed = pack(task.encode(texts), [1] * len(texts), 24)
        examples = {k: v[:size] for k, v in packed.items()}
        return Shard(str(client), examples, examples, examples)

    clients = Clients(task, algorithm, [*map(held, range(4), SIZES)], 0, memory=memory)
    names = list(task.model.leaf_shapes())

    def recipe(round_: int) -> Recipe:
        trains = algorithm.make_trained_filter(names, round_)
        return Recipe(partial(AdamW, lr=1e-3), 1.0, trains, algorithm.corrects)

    return Train(clients, Budget(2, epochs=3), recipe)


def run(task: Language, algorithm: Algorithm, engine: Engine) -> tuple[Leaves, dict[int, Leaves]]:
    memory: dict[int, Leaves] = {}
    start = algorithm.init(task.init(generator(0, "init")))
    job = trainer(task, algorithm, memory)
    *_, last = rounds(start, algorithm, engine, job, Federation(clients=4, rounds=2))
    return last.state.adapter, memory


def test_fedrep_trains_what_stays_and_then_what_is_shared(task: Language) -> None:
    algorithm = METHODS["fedrep"].make(Method(head_epochs=2))
    job = trainer(task, algorithm, {})
    start = task.init(generator(0, "init"))
    order = Order((3,), 0, start)
    train = job.clients.train([order], job.budget)
    batches = [*job.clients.batches(order, job.budget, "train", train)]
    assert [int(batch["epoch"]) for batch in batches] == [0, 0, 1, 1, 2, 2]
    before = start
    for batch, step in zip(batches, descend(task, start, {}, batches, job.recipe(0)), strict=True):
        moved = {k for k, v in step.current.items() if not torch.equal(v, before[k])}
        last = {k for k in moved if ".layers.1." in k}
        assert moved == (last if batch["epoch"] < 2 else moved - last)
        assert moved
        before = {k: v.clone() for k, v in step.current.items()}


@dataclass
class Seen:
    """A job that nobody does: which orders would be together."""

    job: Train
    stacks: list[list[int]]

    def steps(self, order: Order) -> int:
        return self.job.steps(order)

    def get_stack_group(self, order: Order) -> int:
        return self.job.get_stack_group(order)

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[TuningResult]:
        assert stacked
        self.stacks.append([order.clients[0] for order in orders])
        return []


@pytest.mark.parametrize(
    ("name", "stacks"), [("fedrep", [[0, 1], [3], [2]]), ("fedper", [[0, 1, 3], [2]])]
)
def test_stacks_hold_clients_whose_epochs_end_together(
    task: Language, name: str, stacks: list[list[int]]
) -> None:
    seen = Seen(trainer(task, METHODS[name].make(Method()), {}), [])
    assert not list(make_stacked_engine(3)([Order((c,), 0, {}) for c in range(4)], seen))
    assert seen.stacks == stacks


@pytest.mark.parametrize("name", ["fedrep", "ditto", "feddpa"])
def test_stacked_clients_end_as_serial_ones(task: Language, name: str) -> None:
    algorithm = METHODS[name].make(Method())
    expected, kept = run(task, algorithm, run_serially)
    for size in (3, 4):
        found, memory = run(task, algorithm, make_stacked_engine(size))
        for leaf, value in expected.items():
            torch.testing.assert_close(found[leaf], value, atol=1e-5, rtol=0)
        assert memory.keys() == kept.keys()
        for client, leaves in kept.items():
            assert memory[client].keys() == leaves.keys()
            for leaf, value in leaves.items():
                torch.testing.assert_close(memory[client][leaf], value, atol=2e-5, rtol=0)


def test_ditto_without_a_pull_is_training_alone_bit_by_bit(task: Language) -> None:
    _, alone = run(task, METHODS["local-only"].make(Method()), run_serially)
    _, kept = run(task, METHODS["ditto"].make(Method(ditto_lambda=0.0)), run_serially)
    for client in range(4):
        expected = {k.replace("kept:", "own:"): v for k, v in alone[client].items()}
        assert {*expected} == {*kept[client]}
        assert all(torch.equal(kept[client][k], v) for k, v in expected.items())


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"epochs": 1}, r"method\.head_epochs=1, and training\.epochs=1 leaves no epoch"),
        ({"epochs": 3, "steps": 5}, r"training\.steps=5 leaves no epoch"),
    ],
)
def test_fedrep_wants_epochs_for_both(training: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(from_table({"method": {"name": "fedrep"}, "training": training}))
    check(from_table({"method": {"name": "fedper"}, "training": training}))
    check(from_table({"method": {"name": "fedrep"}, "training": {"epochs": 2}}))
