"""The server's step, by hand and against Flower's strategies."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi, Strategy

from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Method
from fedgen_edge.types import AVERAGE, Leaves, Order, ServerState, Update

START = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])}
CHANGES = (
    ({"a": (0.5, 0.0), "b": (-1.0,)}, {"a": (0.1, -0.3), "b": (0.25,)}),
    ({"a": (-0.2, 0.01), "b": (0.0,)}, {"a": (0.3, 0.02), "b": (1e-4,)}),
    ({"a": (0.05, 0.4), "b": (-0.5,)}, {"a": (-0.6, 0.1), "b": (0.125,)}),
)
"""Of two clients in three rounds."""
WEIGHTS = (1.0, 3.0)


def shaped(told: dict[str, tuple[float, ...]]) -> Leaves:
    return {k: torch.tensor(v).reshape(START[k].shape) for k, v in told.items()}


def update(state: ServerState, delta: Leaves, weight: float = 1.0, steps: int = 1) -> Update:
    return Update(Order((0,), state.round, state.adapter), delta, {}, weight, 1.0, steps, 0)


def stepped(name: str, *changes: float, **settings: Any) -> list[float]:
    """Where a leaf goes from 0 by a client's changes, a round each."""
    algorithm = METHODS[name].make(Method(**settings))
    state, found = algorithm.init({"w": torch.tensor(0.0)}), []
    for change in changes:
        state = algorithm.step(state, [update(state, {"w": torch.tensor(change)})])
        found.append(float(state.adapter["w"]))
    return found


def test_momentum_by_hand() -> None:
    # m = 1, then 0.5 * 1 + 1 = 1.5, then 0.75 + 0 = 0.75; each times 2: 2, 2 + 3, 5 + 1.5
    found = stepped("fedavgm", 1.0, 1.0, 0.0, server_lr=2.0, server_momentum=0.5)
    assert found == [2.0, 5.0, 6.5]


def test_without_momentum_at_rate_one_it_is_fedavg() -> None:
    assert stepped("fedavgm", 1.0, -3.0, server_momentum=0.0) == stepped("fedgen-edge", 1.0, -3.0)


def test_adagrad_by_hand() -> None:
    # v = 1 + 9 = 10 after a change of 3, and no momentum: 0.5 * 3 / (sqrt(10) + 1);
    # then v = 10 + 6 = 16 after sqrt(6): 0.5 * sqrt(6) / 5 more
    one, two = stepped("fedadagrad", 3.0, 6**0.5, server_lr=0.5, server_floor=1.0)
    assert one == pytest.approx(1.5 / (10**0.5 + 1))
    assert two - one == pytest.approx(0.1 * 6**0.5)


def test_adam_by_hand() -> None:
    # v = 0.75 * 4 + 0.25 * 16 = 7, m = 0.5 * 4 = 2: 2 / (sqrt(7) + 2); then no change halves m
    # and takes a quarter of v
    about = {"server_lr": 1.0, "server_momentum": 0.5, "server_decay": 0.75, "server_floor": 2.0}
    one, two = stepped("fedadam", 4.0, 0.0, **about)
    assert one == pytest.approx(2 / (7**0.5 + 2))
    assert two - one == pytest.approx(1 / (5.25**0.5 + 2))


def test_yogi_by_hand() -> None:
    # v begins at 4, below 16: 4 + 0.25 * 16 = 8; then above 1: 8 - 0.25 * 1 = 7.75
    about = {"server_lr": 1.0, "server_momentum": 0.0, "server_decay": 0.75, "server_floor": 2.0}
    one, two = stepped("fedyogi", 4.0, 1.0, **about)
    assert one == pytest.approx(4 / (8**0.5 + 2))
    assert two - one == pytest.approx(1 / (7.75**0.5 + 2))


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_a_moving_average_is_not_stepped_and_what_is_not_sent_stays(name: str) -> None:
    algorithm = METHODS[name].make(Method())
    start = {"w": torch.tensor(1.0), f"{AVERAGE}w": torch.tensor(2.0), "own": torch.tensor(3.0)}
    state = algorithm.init(start)
    for _ in range(2):
        delta = {"w": torch.tensor(0.5), f"{AVERAGE}w": torch.tensor(0.25)}
        state = algorithm.step(state, [update(state, delta)])
    assert float(state.adapter[f"{AVERAGE}w"]) == 2.5
    assert float(state.adapter["own"]) == 3.0
    assert not ({*state.first_moment, *state.second_moment} & {"own", f"{AVERAGE}w"})


def test_what_else_the_server_remembers_is_kept() -> None:
    algorithm = METHODS["fedadam"].make(Method())
    state = ServerState(0, {"w": torch.tensor(0.0)}, losses=torch.tensor([1.0]))
    after = algorithm.step(state, [update(state, {"w": torch.tensor(1.0)})])
    assert after.losses is state.losses


def test_fednova_by_hand() -> None:
    # one client with one example moves 8 in 4 steps, one with three moves 3 in one: 2 and 3 a step,
    # on average (2 + 9) / 4 = 2.75, times (4 + 3) / 4 = 1.75 steps
    algorithm = METHODS["fednova"].make(Method())
    state = algorithm.init({"w": torch.tensor(0.0), f"{AVERAGE}w": torch.tensor(0.0)})
    both = [
        update(state, {"w": torch.tensor(change), f"{AVERAGE}w": torch.tensor(change)}, weight, n)
        for change, weight, n in ((8.0, 1.0, 4), (3.0, 3.0, 1))
    ]
    after = algorithm.step(state, both).adapter
    assert float(after["w"]) == pytest.approx(2.75 * 1.75)
    # 8 / 4 + 3 * 3 / 4
    assert float(after[f"{AVERAGE}w"]) == pytest.approx(4.25)


def test_fednova_of_equal_steps_is_fedavg() -> None:
    found = []
    for name in ("fednova", "fedgen-edge"):
        algorithm = METHODS[name].make(Method())
        state = algorithm.init(START)
        one, two = (
            update(state, shaped(told), weight, 7)
            for told, weight in zip(CHANGES[0], WEIGHTS, strict=True)
        )
        found.append(algorithm.step(state, [one, two]).adapter)
    for leaf in START:
        torch.testing.assert_close(found[0][leaf], found[1][leaf])


def _record(values: Leaves) -> ArrayRecord:
    return ArrayRecord({k: Array(v.numpy()) for k, v in values.items()})


def _reply(values: Leaves, node: int, weight: float) -> Message:
    about = Metadata(1, f"{node}", node, 1, f"to {node}", "", 0.0, 1.0, "train")
    metrics = MetricRecord({"num-examples": weight})
    return make_message(about, RecordDict({"arrays": _record(values), "metrics": metrics}))


def _theirs(strategy: Strategy) -> list[Leaves]:
    """The global leaves after each round, as Flower makes them."""
    now, found = START, []
    for number, changes in enumerate(CHANGES):
        strategy.current_arrays = (  # pyright: ignore[reportAttributeAccessIssue]
            _record(now)
            if isinstance(strategy, FedAvgM)
            else {k: v.numpy() for k, v in now.items()}
        )
        replies = [
            _reply({k: now[k] + v for k, v in shaped(told).items()}, node, weight)
            for node, (told, weight) in enumerate(zip(changes, WEIGHTS, strict=True))
        ]
        made, _ = strategy.aggregate_train(number, replies)
        assert made is not None
        now = {k: torch.from_numpy(np.asarray(v.numpy())) for k, v in made.items()}
        found.append(now)
    return found


def _ours(name: str, rates: Callable[[int], float], **settings: float) -> list[Leaves]:
    state, found = METHODS[name].make(Method(**settings)).init(START), []
    for number, changes in enumerate(CHANGES):
        algorithm = METHODS[name].make(Method(**settings, server_lr=rates(number)))
        told = zip(changes, WEIGHTS, strict=True)
        state = algorithm.step(state, [update(state, shaped(c), weight) for c, weight in told])
        found.append(state.adapter)
    return found


def _begun(strategy: Any, floor: float) -> Any:
    """With squares that begin where the paper has them: Flower's begin at 0."""
    strategy.v_t = {k: np.full(v.shape, floor**2) for k, v in START.items()}
    return strategy


def test_momentum_is_flowers() -> None:
    theirs = _theirs(FedAvgM(server_learning_rate=0.7, server_momentum=0.6))
    ours = _ours("fedavgm", lambda _: 0.7, server_momentum=0.6)
    for mine, other in zip(ours, theirs, strict=True):
        for leaf in START:
            torch.testing.assert_close(mine[leaf], other[leaf])


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_steps_are_flowers_but_for_their_start_and_adams_correction(name: str) -> None:
    kinds: dict[str, Callable[..., Strategy]] = {
        "fedadagrad": FedAdagrad,
        "fedadam": FedAdam,
        "fedyogi": FedYogi,
    }
    decays = {} if name == "fedadagrad" else {"beta_1": 0.8, "beta_2": 0.9}
    floor = 0.05

    def rate(number: int) -> float:
        # Flower's correction of the bias, by its exponent: the number of the round, plus one
        return (
            0.3 * (1 - 0.9 ** (number + 1)) ** 0.5 / (1 - 0.8 ** (number + 1))
            if (name == "fedadam")
            else 0.3
        )

    theirs = _theirs(_begun(kinds[name](eta=0.3, tau=floor, **decays), floor))
    ours = _ours(name, rate, server_momentum=0.8, server_decay=0.9, server_floor=floor)
    for mine, other in zip(ours, theirs, strict=True):
        for leaf in START:
            torch.testing.assert_close(mine[leaf], other[leaf].float())
