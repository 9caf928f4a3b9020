"""SCAFFOLD by hand, and where it ends beside FedAvg."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch.optim import SGD

from conftest import Line, line_shard
from fedgen_edge.algorithms.methods import METHODS, check
from fedgen_edge.algorithms.scaffold import CLIENT_VARIATE
from fedgen_edge.config import Federation, Method, Settings, from_table
from fedgen_edge.data.batches import Budget, Shard
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.client import Recipe
from fedgen_edge.federation.jobs import Clients, Job, Train
from fedgen_edge.federation.rounds import Engine, rounds
from fedgen_edge.types import (
    VARIATE,
    Batch,
    Commit,
    Leaves,
    Order,
    PerClient,
    Phase,
    ServerState,
    Update,
)

C = VARIATE + "w"


@dataclass(frozen=True)
class Bowl(Line):
    """Loss a (w - x)^2 / 2 of each number x, with its own a."""

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        del phase
        error = batch["a"] * (adapter["w"].unsqueeze(-1) - batch["x"]).square() / 2
        return PerClient((error * batch["mask"]).sum(-1), batch["mask"].sum(-1).float())


@dataclass(frozen=True)
class Slope(Line):
    """Loss x u + 3 x v: slopes of x and 3 x everywhere; v is trained twice, at half the rate."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("u"), Phase("v", repeats=2, rate=0.25))

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        tilt = {"u": 1.0, "v": 3.0}[phase]
        loss = tilt * adapter[phase].unsqueeze(-1) * batch["x"]
        return PerClient((loss * batch["mask"]).sum(-1), batch["mask"].sum(-1).float())


@dataclass
class Run:
    """Rounds of full batches from zero."""

    shards: Sequence[Shard]
    task: Line = field(default_factory=Line)
    name: str = "scaffold"
    epochs: int = 1
    rate: float = 0.5
    leaves: str = "w"
    batch: int = 99
    engine: Engine = run_serially
    memory: dict[int, Leaves] = field(default_factory=dict)

    def __call__(self, count: int, state: ServerState | None = None, **plan: int) -> list[Commit]:
        algorithm = METHODS[self.name].make(Method())
        clients = Clients(self.task, algorithm, self.shards, 0, memory=self.memory)
        recipe = Recipe(partial(SGD, lr=self.rate), corrects=algorithm.corrects)
        job = Train(clients, Budget(self.batch, epochs=self.epochs), lambda _: recipe)
        federation = Federation(clients=len(self.shards), rounds=count, **plan)
        state = state or algorithm.init({name: torch.tensor(0.0) for name in self.leaves})
        return list(rounds(state, algorithm, self.engine, job, federation))


def own(run: Run, client: int, leaf: str = "w") -> float:
    return float(run.memory[client][CLIENT_VARIATE + leaf])


def test_two_rounds_by_hand() -> None:
    # two steps of rate 1/2 go 3/4 of the way, and T eta = 1; b counts as a does.
    # round 1, no variates: to 4 by 3, to 8 by 6: w = 4.5; c_k = -3 and -6, c = -4.5.
    # round 2: gradients w - 4 + 3 - 4.5, to 5.5 by 0.75; w - 8 + 6 - 4.5, to 6.5 by 1.5:
    # w = 4.5 + 1.125; c_k = -0.75 - 3 + 4.5 = 0.75, and -1.5 - 6 + 4.5 = -3; c = -1.125.
    run = Run([line_shard("a", 4), line_shard("b", 8, 8, 8)], epochs=2)
    first, second = run(2)
    assert [float(c.state.adapter["w"]) for c in (first, second)] == [4.5, 5.625]
    assert [float(c.state.method[C]) for c in (first, second)] == [-9.0, -2.25]  # their sums
    assert [own(run, 0), own(run, 1)] == [0.75, -3.0]
    assert [float(u.order.received[C]) for u in second.updates] == [-4.5, -4.5]


def bowls() -> list[Shard]:
    """(w - 0)^2 / 2 with three examples, and 4 (w - 1)^2 / 2 with one."""

    def shard(name: str, a: float, *xs: float) -> Shard:
        examples = {**line_shard(name, *xs).train, "a": torch.full((len(xs),), a)}
        return Shard(name, examples, examples, examples)

    return [shard("a", 1.0, 0.0, 0.0, 0.0), shard("b", 4.0, 1.0)]


def test_fedavg_rests_where_ways_cancel_and_scaffold_where_gradients_do() -> None:
    # ten steps of rate 0.1 go s = 1 - 0.9^10 of the way to 0, and 1 - 0.6^10 to 1. FedAvg rests at
    # 3 s_a (0 - w) + s_b (1 - w) = 0; the mean loss is least at (0 + 4 * 1) / (1 + 4) = 0.8.
    near, far = 1 - 0.9**10, 1 - 0.6**10
    rest = {"fedgen-edge": far / (3 * near + far), "scaffold": 0.8}
    for name, expected in rest.items():
        run = Run(bowls(), Bowl(), name, epochs=10, rate=0.1)
        last = run(60)[-1]
        assert float(last.state.adapter["w"]) == pytest.approx(expected, abs=1e-5)
    # at the optimum each variate is its client's gradient: 1 * 0.8, and 4 * (0.8 - 1)
    assert own(run, 0) == pytest.approx(0.8, abs=1e-4)
    assert own(run, 1) == pytest.approx(-0.8, abs=1e-4)


def test_scaffold_rests_at_the_optimum_where_few_take_part_and_steps_differ() -> None:
    # nine steps beside three; one of the two a round, so c moves by half of what its c_k does
    run = Run(bowls(), Bowl(), epochs=3, rate=0.1, batch=1)
    last = run(400, cohort=1)[-1]
    assert float(last.state.adapter["w"]) == pytest.approx(0.8, abs=1e-4)


def losing(run: Run, when: int, client: int) -> Engine:
    """A round begins with one client's memory gone, and the server hears of it."""

    def engine(orders: Sequence[Order], job: Job) -> Iterator[Update]:
        lost = run.memory.pop(client) if orders[0].round == when else {}
        for update in run_serially(orders, job):
            assert isinstance(update, Update)
            own = update.order.clients == (client,)
            yield replace(update, lost_memory=lost) if own else update

    return engine


def test_what_a_client_has_lost_leaves_the_servers_sum_by_hand() -> None:
    # round 1 as above: c_k = -3 and -6, w = 4.5, c = -4.5. The first one begins anew from zero:
    # gradients w - 4 - 4.5, 3/4 of the way from 4.5 to 8.5 are 3, so c_k = -3 + 4.5 = 1.5;
    # the other's is -3 as before. The sum is 1.5 - 3, where it would be -4.5 with the lost -3.
    run = Run([line_shard("a", 4), line_shard("b", 8, 8, 8)], epochs=2)
    _, second = replace(run, engine=losing(run, 1, 0))(2)
    assert [own(run, 0), own(run, 1)] == [1.5, -3.0]
    assert float(second.state.method[C]) == -1.5
    assert float(second.state.adapter["w"]) == 4.5 + (3 + 1.5) / 2


def test_scaffold_rests_at_the_optimum_though_a_client_has_lost_its_memory() -> None:
    run = Run(bowls(), Bowl(), epochs=10, rate=0.1)
    last = replace(run, engine=losing(run, 30, 1))(90)[-1]
    assert float(last.state.adapter["w"]) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("cohort", [4, 2, 1])
def test_the_servers_variate_is_the_mean_of_all_who_may_train(cohort: int) -> None:
    # four train and a fifth never does: it is none of those that c is the mean of
    run = Run([line_shard(str(x), float(x)) for x in (1, 5, -2, 8, 99)], epochs=3)
    commits = run(7, cohort=cohort, unseen_clients=1)
    assert 4 not in run.memory
    total = sum(own(run, client) for client in run.memory)
    assert float(commits[-1].state.method[C]) == pytest.approx(total, abs=1e-5)
    before, after = commits[-2:]
    told = float(after.updates[0].order.received[C])
    assert told == pytest.approx(float(before.state.method[C]) / 4, abs=1e-6)


def test_a_variate_is_the_gradient_whatever_a_phase_repeats_and_its_rate() -> None:
    run = Run([line_shard("a", 2)], Slope(), epochs=5, leaves="uv")
    run(3)
    assert own(run, 0, "u") == pytest.approx(2.0)
    assert own(run, 0, "v") == pytest.approx(6.0)


def test_nothing_more_travels_up_and_a_variate_down() -> None:
    shards = [line_shard("a", 4), line_shard("b", 8)]
    (plain,), (done,) = Run(shards, name="fedgen-edge")(1), Run(shards)(1)
    assert [u.bytes_up for u in done.updates] == [u.bytes_up for u in plain.updates]
    assert done.bytes_down > plain.bytes_down
    assert done.state.adapter.keys() == {"w"}
    assert all(update.delta.keys() == {"w"} for update in done.updates)


def test_a_run_goes_on_from_its_state_and_what_clients_kept() -> None:
    shards = [line_shard("a", 4), line_shard("b", 8, 9), line_shard("c", -3)]
    whole, broken = Run(shards, epochs=3), Run(shards, epochs=3)
    expected = whole(6, cohort=2)[-1]
    half = broken(3, cohort=2)[-1]
    assert broken(6, half.state, cohort=2)[-1].state == expected.state
    assert broken.memory == whole.memory


def test_a_stack_of_clients_old_and_new_and_of_unequal_length_is_each_of_them() -> None:
    # five examples are five steps of one, beside two and one
    shards = [line_shard("a", 1, 2, 3, 4, 5), line_shard("b", 8, 9), line_shard("c", -3)]
    one, many = (
        Run(shards, epochs=2, rate=0.1, batch=1, engine=e)
        for e in (run_serially, make_stacked_engine(3))
    )
    states = [run(5, cohort=2)[-1].state for run in (one, many)]
    torch.testing.assert_close(states[1].adapter, states[0].adapter)
    torch.testing.assert_close(states[1].method, states[0].method)
    torch.testing.assert_close(many.memory, one.memory)


REFUSED = {
    "the default": ({}, ["training.optimizer='adamw'", "training.clip=1.0", "clip=0.0"]),
    "momentum": (
        {"optimizer": "sgd", "clip": 0.0, "momentum": 0.9},
        ["with training.momentum=0.9: set training.momentum=0.0"],
    ),
    "decay": (
        {"optimizer": "sgd", "clip": 0.0, "weight_decay": 0.1},
        ["with training.weight_decay=0.1: set training.weight_decay=0.0"],
    ),
}


@pytest.mark.parametrize(("training", "told"), REFUSED.values(), ids=REFUSED)
def test_only_plain_sgd_will_do(training: dict[str, object], told: list[str]) -> None:
    for setting, table in {
        "method.name": {"method": {"name": "scaffold"}},
        "evaluation.baselines": {"evaluation": {"baselines": ["scaffold"]}},
    }.items():
        with pytest.raises(ConfigError, match=f"^{setting}='scaffold' takes plain steps") as error:
            check(from_table({**table, "training": training}))
        assert all(part in str(error.value) for part in told)
        assert "\n" not in str(error.value)


def test_plain_sgd_will_do() -> None:
    plain = {"optimizer": "sgd", "clip": 0.0, "schedule": "cosine"}
    check(from_table({"method": {"name": "scaffold"}, "training": plain}))
    check(Settings())
