"""One suite a protocol, over the whole catalogue: tasks, algorithms, engines."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch.optim import SGD, AdamW

from conftest import corpus_for, suited
from fedgen_edge.adapters.full import Full
from fedgen_edge.algorithms import low_rank
from fedgen_edge.algorithms.algorithm import LOCAL_PREFIX, Algorithm
from fedgen_edge.algorithms.ifca import select_cluster, split_clusters, strip_cluster_prefix
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.algorithms.share import separate_clients, share_nothing
from fedgen_edge.compression.serialize import decode
from fedgen_edge.config import Federation, Method, from_table
from fedgen_edge.data.batches import Budget, Shard, stack_examples
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.federation.client import Patience, Recipe
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.federation.rounds import Engine, rounds
from fedgen_edge.leaves import row, stack
from fedgen_edge.network.bounds import Bounds
from fedgen_edge.network.messages import (
    Answer,
    Reply,
    Terms,
    WorkRequest,
    decode_message,
    digest,
    encode_line,
)
from fedgen_edge.network.remote import Remote, RemoteTraining
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TASKS, Task, TrainableTask
from fedgen_edge.types import RESIDUAL, Batch, Commit, Leaves, Order

ENGINES: dict[str, Engine] = {
    "serial": run_serially,
    "stacked": make_stacked_engine(3),
    "stacked by two": make_stacked_engine(2),
}
NEAR = dict.fromkeys(TASKS, 1e-4) | {"language": 1e-5}
"""How far engines may lie apart."""
SIZES = (9, 4, 1)
RATE = 0.05
"""Of plain SGD."""
CPU = torch.device("cpu")


def make(name: str, *, full: bool = False, dropout: float = 0.2) -> TrainableTask:
    table = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"dropout": dropout},
        "data": {"length": 32},
    }
    return TASKS[name](from_table(table), full=full, device=CPU)


def shards(task: TrainableTask) -> list[Shard]:
    made = []
    for client, size in enumerate(SIZES):
        examples = task.examples(corpus_for(task, size, client), range(size))
        made.append(Shard(f"c{client}", examples, examples, examples))
    return made


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> TrainableTask:
    return make(request.param)


@pytest.fixture(scope="module")
def batches(task: TrainableTask) -> list[Batch]:
    """A drawn batch of each of two clients, of one size."""
    return [
        task.draw({k: v[:3] for k, v in shard.train.items()}, generator("draw", i))
        for i, shard in enumerate(shards(task)[:2])
    ]


def some(task: TrainableTask, key: int) -> Leaves:
    rng = generator("some", key)
    return {k: torch.randn(v.shape, generator=rng) * 0.1 for k, v in task.init(rng).items()}


class TestTask:
    def test_it_has_the_four_methods(self, task: TrainableTask) -> None:
        assert isinstance(task, Task)

    def test_it_has_what_a_run_needs(self, task: TrainableTask) -> None:
        assert isinstance(task, TrainableTask)

    def test_leaves_are_float32_and_each_is_of_one_phase_or_follows(
        self, task: TrainableTask
    ) -> None:
        adapter = task.init(generator(0))
        assert all(v.dtype == torch.float32 for v in adapter.values())
        followers = task.settle(adapter)
        for name in adapter:
            phases = sum(name.startswith(p.prefix) for p in task.phases)
            assert phases == (name not in followers)

    def test_init_and_draw_depend_on_the_generator_alone(self, task: TrainableTask) -> None:
        one, two = task.init(generator(5)), task.init(generator(5))
        assert all(torch.equal(one[k], two[k]) for k in one)
        held = shards(task)[0].train
        one, two = task.draw(held, generator(5)), task.draw(held, generator(5))
        assert all(torch.equal(one[k], two[k]) for k in one)

    def test_loss_is_deterministic_and_of_a_stack_is_each_clients(
        self, task: TrainableTask, batches: list[Batch]
    ) -> None:
        adapters = [some(task, 0), some(task, 1)]
        for phase in task.phases:
            alone = [task.loss(a, b, phase.prefix) for a, b in zip(adapters, batches, strict=True)]
            again = task.loss(adapters[0], batches[0], phase.prefix)
            assert torch.equal(again.total, alone[0].total)
            both = task.loss(stack(adapters), stack(batches), phase.prefix)
            torch.testing.assert_close(both.total, torch.stack([a.total for a in alone]))
            assert torch.equal(both.count, torch.stack([a.count for a in alone]))

    def test_gradients_of_a_stack_are_each_clients(
        self, task: TrainableTask, batches: list[Batch]
    ) -> None:
        adapters = [some(task, 0), some(task, 1)]

        def slopes(adapter: Leaves, batch: Batch, phase: str) -> Leaves:
            own = {k: v.clone().requires_grad_() for k, v in adapter.items()}
            loss = task.loss(own, batch, phase).total.sum()
            names = [k for k in own if k.startswith(phase)]
            found = torch.autograd.grad(loss, [own[k] for k in names])
            return dict(zip(names, found, strict=True))

        for i, phase in product((0, 1), (phase.prefix for phase in task.phases)):
            both = slopes(stack(adapters), stack(batches), phase)
            alone = slopes(adapters[i], batches[i], phase)
            for name, slope in alone.items():
                torch.testing.assert_close(both[name][i], slope, atol=1e-4, rtol=1e-4)

    def test_padding_adds_nothing(self, task: TrainableTask, batches: list[Batch]) -> None:
        filled = {
            k: torch.cat([v, torch.zeros_like(v[:1])]) if v.ndim else v
            for k, v in batches[0].items()
        }
        plain = task.loss(some(task, 0), batches[0], task.phases[0].prefix)
        more = task.loss(some(task, 0), filled, task.phases[0].prefix)
        torch.testing.assert_close(more.total, plain.total)
        assert float(more.count) == float(plain.count)

    def test_evaluation_adds_up_and_sums_up(self, task: TrainableTask) -> None:
        held, adapter = shards(task)[0].test, some(task, 0)
        whole = task.evaluate(adapter, held)
        first = task.evaluate(adapter, {k: v[:1] for k, v in held.items()})
        rest = task.evaluate(adapter, {k: v[1:] for k, v in held.items()})
        for key, value in whole.items():
            torch.testing.assert_close(first[key] + rest[key], value, rtol=1e-5, atol=1e-5)
        assert "loss" in task.summary(whole)

    def test_evaluation_of_a_stack_is_that_of_each(self, task: TrainableTask) -> None:
        held = [shard.test for shard in shards(task)[:2]]
        held[1] = {k: v[:1] for k, v in held[1].items()}  # shorter: filled up in the stack
        adapters = [some(task, c) for c in (0, 1)]
        both = task.evaluate(stack(adapters), stack_examples(held))
        for c, own in enumerate(adapters):
            for key, value in task.evaluate(own, held[c]).items():
                torch.testing.assert_close(both[key][c], value, rtol=1e-5, atol=1e-5)


def trainer(
    task: TrainableTask, name: str, algorithm: Algorithm, memory: dict[int, Leaves]
) -> Train:
    # of pictures, the larger one keeps AdamW from magnifying the rounding of gradients near zero
    eps = 1e-8 if task.measure.material == "text" else 1e-5
    plain = suited(name)

    def recipe(round_: int) -> Recipe:
        trains = algorithm.make_trained_filter(list(task.model.leaf_shapes()), round_)
        if plain:
            return Recipe(partial(SGD, lr=RATE), 0.0, trains, algorithm.corrects)
        adamw, surveys = partial(AdamW, lr=1e-3, eps=eps), algorithm.surveys(round_)
        return Recipe(adamw, 1.0, trains, algorithm.corrects, surveys)

    return Train(
        Clients(task, algorithm, shards(task), 0, memory=memory),
        Budget(2, epochs=2),
        recipe,
    )


def run(
    task: TrainableTask, name: str, engine: Engine, count: int = 2, cohort: int = 3
) -> tuple[Commit, dict[int, Leaves]]:
    algorithm = METHODS[name].make(Method(mu=0.1))
    memory: dict[int, Leaves] = {}
    job = trainer(task, name, algorithm, memory)
    plan = Federation(clients=len(SIZES), cohort=cohort, rounds=count)
    start = algorithm.init(task.init(generator(0, "init")))
    *_, last = rounds(start, algorithm, engine, job, plan)
    return last, memory


def same(found: Leaves, expected: Leaves, near: float) -> None:
    """Leaves agree; of frozen pairs their products do, as vectors of equal weight may turn.

    So may those of no weight, of bases: there too it is the product that counts.
    """
    assert found.keys() == expected.keys()
    based = [pair for pair in low_rank.find_pairs(expected) if pair.core in expected]
    turned = {name for pair in based for name in (*pair, pair.core)}
    for leaf, value in expected.items():
        if not leaf.startswith(RESIDUAL) and leaf not in turned:
            torch.testing.assert_close(found[leaf], value, atol=near, rtol=0)
    for pair in low_rank.find_pairs(k for k in expected if k.startswith(RESIDUAL)):
        ours, theirs = low_rank.get_product(found, pair), low_rank.get_product(expected, pair)
        torch.testing.assert_close(ours.b @ ours.a, theirs.b @ theirs.a, atol=near, rtol=0)
    for pair in based:
        ours, theirs = (
            low_rank.get_product(own, pair).b
            @ own[pair.core].double()
            @ low_rank.get_product(own, pair).a
            for own in (found, expected)
        )
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, atol=near, rtol=0)


def at_client(name: str) -> bool:
    """Whether a method changes what clients do: the others are the server's, whatever is learnt."""
    made = METHODS[name].make(Method())
    plain = Algorithm()
    server = {k: getattr(plain, k) for k in ("merges", "steps", "buffer", "ages")}
    return replace(made, **server) != plain


@pytest.mark.parametrize(
    ("name", "learnt"),
    [(n, t) for n, t in product(METHODS, TASKS) if t == "language" or at_client(n)],
)
class TestAlgorithm:
    def test_it_trains_and_counts_what_it_sends(self, name: str, learnt: str) -> None:
        task = make(learnt, full=METHODS[name].make(Method()).adapts == "full")
        last, memory = run(task, name, run_serially)
        start = METHODS[name].make(Method()).init(task.init(generator(0, "init"))).adapter
        algorithm = METHODS[name].make(Method())
        own = algorithm.receives(last.state.adapter, memory.get(0, {}))
        begun = strip_cluster_prefix(start)
        assert any(not torch.equal(own[k], begun[k]) for k in begun)
        assert last.state.round == 2
        for update in last.updates:
            sent = sum(v.numel() * 4 for v in update.delta.values())
            assert update.bytes_up == 0 if not sent else update.bytes_up > sent
            kept = {
                k.removeprefix(LOCAL_PREFIX) for k in update.memory if k.startswith(LOCAL_PREFIX)
            }
            taken = select_cluster(start, next(iter(split_clusters(update.delta)), None))
            trained = {k for k in taken if algorithm.trains(k, 1, 0) and not k.startswith(RESIDUAL)}
            assert kept | set(update.delta) == trained
            assert not kept & set(update.delta)

    def test_engines_agree(self, name: str, learnt: str) -> None:
        full = METHODS[name].make(Method()).adapts == "full"
        if full:
            pytest.skip("whole models are not stacked: every engine but serial refuses them")
        task = make(learnt)
        # three rounds of two: some clients come back with memory beside others who have none
        reference, kept = run(task, name, run_serially, 3, 2)
        for engine in (engine for engine in ENGINES.values() if engine is not run_serially):
            found, memory = run(task, name, engine, 3, 2)
            same(found.state.adapter, reference.state.adapter, NEAR[learnt])
            assert set(memory) == set(kept)
            for client, leaves in kept.items():
                for leaf, value in leaves.items():
                    torch.testing.assert_close(
                        memory[client][leaf], value, atol=NEAR[learnt], rtol=0
                    )


@pytest.mark.parametrize("learnt", TASKS)
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
class TestEngine:
    def test_a_run_repeats_bit_by_bit(self, engine: Engine, learnt: str) -> None:
        task = make(learnt)
        one, two = (run(task, "fedgen-edge", engine)[0].state.adapter for _ in range(2))
        assert all(torch.equal(one[k], two[k]) for k in one)

    def test_every_order_is_done_once(self, engine: Engine, learnt: str) -> None:
        task = make(learnt)
        job = Train(
            Clients(task, Algorithm(), shards(task), 0),
            Budget(2),
            lambda _: Recipe(partial(AdamW, lr=1e-3)),
        )
        start = task.init(generator(0))
        orders = [Order((c,), 0, start) for c in (2, 0, 1)]
        found = list(engine(orders, job))
        assert sorted(u.order.clients for u in found) == [(0,), (1,), (2,)]
        for update in found:
            assert update.weight == len(shards(task)[update.order.clients[0]].train["mask"])

    def test_personal_adapters_equal_the_serial_ones(self, engine: Engine, learnt: str) -> None:
        task = make(learnt, dropout=0.0)
        clients = Clients(task, Algorithm(), shards(task), 0)
        job = Personalize(
            clients, Budget(2, epochs=3), Recipe(partial(AdamW, lr=1e-3), 1.0), Patience()
        )
        start = task.init(generator(0))
        orders = [Order((c,), 5, start) for c in range(3)]
        expected = {t.order.clients: t for t in run_serially(orders, job)}
        for tuned in engine(orders, job):
            other = expected[tuned.order.clients]
            assert tuned.chosen == other.chosen
            for leaf, value in other.adapter.items():
                torch.testing.assert_close(tuned.adapter[leaf], value, atol=NEAR[learnt], rtol=0)


@dataclass
class Inline:
    """The clients of a job as sites: what they keep goes by the payload that it came with."""

    job: Train
    start: Leaves
    kept: dict[str, Leaves] = field(default_factory=dict)
    counted: dict[str, str] = field(default_factory=dict)

    def present(self) -> list[str]:
        return [shard.name for shard in self.job.clients.shards]

    def exchange(self, work: Mapping[str, WorkRequest], seconds: float) -> Generator[Reply]:
        assert seconds > 0
        for name in sorted(work, reverse=True):
            asked, payload = (
                decode_message(WorkRequest, encode_line(work[name]), work[name].payload),
                work[name].payload,
            )
            memory = {asked.client: self.kept[asked.accepted]} if asked.accepted else {}
            job = replace(self.job, clients=replace(self.job.clients, memory=memory))
            received = {**self.start, **decode(payload)}
            strides = job.strides(asked.round)
            order = Order((asked.client,), asked.round, received, strides=strides)
            (sent,) = job.send([order], stacked=False)
            said = {"weight": int(sent.weight), "loss": sent.loss, "steps": sent.steps}
            said |= {} if sent.cluster is None else {"cluster": sent.cluster}
            answer = Answer(asked.kind, asked.terms, asked.round, asked.attempt, digest(payload),
                            said)  # fmt: skip
            self.kept[digest(sent.payload)] = sent.memory
            yield Reply(name, encode_line(answer), sent.payload)

    def note(self, event: str, *, why: str = "", **fields: str | int) -> None:
        del why
        if event == "accepted":
            self.counted[str(fields["site"])] = str(fields["payload"])


SHARING = [
    name
    for name, entry in METHODS.items()
    if (made := entry.make(Method())).sends is not share_nothing
    and made.groups is separate_clients
    and not made.buffer
]


@pytest.mark.parametrize(
    ("name", "learnt"),
    # all methods of two tasks, and of the others, which are slower, one that keeps something
    [pair for pair in product(SHARING, TASKS) if {*pair} & {"language", "vae", "fedper"}],
)
def test_sites_end_as_serial_clients_do_bit_by_bit(name: str, learnt: str) -> None:
    algorithm = METHODS[name].make(Method(mu=0.1))
    task = make(learnt, full=algorithm.adapts == "full")
    expected, memory = run(task, name, run_serially, 3, 2)
    job = trainer(task, name, algorithm, {})
    start = algorithm.init(task.init(generator(0, "init")))
    sites = Inline(job, start.adapter)
    weights = {shard.name: int(shard.weight) for shard in job.clients.shards}
    distant = RemoteTraining(
        algorithm,
        Terms("run", "recipe", "backbone"),
        sites.present,
        lambda: weights,
        lambda _: Bounds(100, rate=RATE, phases=tuple(task.phases)),
        lambda _: 0,
        lambda _: dict(sites.counted),
        sites.note,
    )
    plan = Federation(clients=len(SIZES), cohort=2, rounds=3)
    *_, last = rounds(start, algorithm, Remote(sites, 2, 2, 1.0), distant, plan)
    assert last.state.adapter.keys() == expected.state.adapter.keys()
    for leaf, value in expected.state.adapter.items():
        assert torch.equal(last.state.adapter[leaf], value), leaf
    assert last.bytes_down == expected.bytes_down
    for one, other in zip(last.updates, expected.updates, strict=True):
        assert (one.order.clients, one.loss, one.steps, one.weight, one.bytes_up) == (
            other.order.clients, other.loss, other.steps, other.weight, other.bytes_up
        )  # fmt: skip
    names = sites.present()
    for client, leaves in memory.items():
        kept = sites.kept[sites.counted[names[client]]]
        assert kept.keys() == leaves.keys()
        assert all(torch.equal(kept[k], v) for k, v in leaves.items())


def test_whole_models_share_tied_weights_once() -> None:
    task = make("language", full=True)
    assert isinstance(task.model.adapter, Full)  # pyright: ignore[reportAttributeAccessIssue]
    names = set(task.init(generator(0)))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_row_of_a_stack_is_a_client() -> None:
    one, two = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert torch.equal(row(stack([one, two]), 1)["w"], two["w"])
