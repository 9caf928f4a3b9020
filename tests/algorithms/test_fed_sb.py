"""Bases found in two rounds, by linear algebra that a reader can redo."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from conftest import Line, line_shard
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS, check
from fedgen_edge.config import Federation, Method, from_table
from fedgen_edge.data.batches import Budget
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.client import Recipe
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.rounds import Engine, rounds
from fedgen_edge.seeds import generator
from fedgen_edge.types import AVERAGE, Batch, Commit, Leaves, Order, PerClient, Update

A, B, R = (f"layer.lora_{name}" for name in "ABR")
RANK, OUT, IN = 3, 7, 5


def drawn(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator("drawn", key))


@dataclass(frozen=True)
class Plane(Line):
    """Loss x <G, B R A>: a client with the number x has the gradient x G everywhere."""

    gradient: Tensor

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        del phase
        update = adapter[B] @ adapter[R] @ adapter[A]
        slope = (update * self.gradient).sum((-2, -1)).unsqueeze(-1)
        return PerClient((slope * batch["x"]).sum(-1), batch["mask"].sum(-1).float())


def run(gradient: Tensor, count: int, engine: Engine = run_serially) -> list[Commit]:
    algorithm = METHODS["fed-sb"].make(Method())
    shards = [line_shard("a", 1.0, 2.0), line_shard("b", 0.5), line_shard("c", 4.0)]

    def recipe(round_: int) -> Recipe:
        return Recipe(
            partial(SGD, lr=0.1),
            trains=lambda name, epoch: algorithm.trains(name, round_, epoch),
            sums_gradients=algorithm.surveys(round_),
        )

    job = Train(Clients(Plane(gradient), algorithm, shards, 0), Budget(1), recipe)
    start = algorithm.init({A: drawn(RANK, IN, key=1), B: torch.zeros(OUT, RANK)})
    return list(rounds(start, algorithm, engine, job, Federation(clients=3, rounds=count)))


def low(rank: int) -> Tensor:
    """A gradient of a rank."""
    return drawn(OUT, rank, key=2) @ drawn(rank, IN, key=3)


def test_the_model_is_the_backbones_until_the_bases_are_found() -> None:
    for commit in run(low(2), 2):
        adapter = commit.state.adapter
        assert not (adapter[B] @ adapter[R] @ adapter[A]).any()


@pytest.mark.parametrize(
    "engine", [run_serially, make_stacked_engine(3)], ids=["serial", "stacked"]
)
def test_bases_are_the_gradients_singular_vectors_where_it_has_no_higher_rank(
    engine: Engine,
) -> None:
    gradient = low(RANK)
    adapter = run(gradient, 2, engine)[-1].state.adapter
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    for k in range(RANK):  # each up to its sign
        assert abs(float(adapter[B][:, k] @ left[:, k])) == pytest.approx(1, abs=1e-4)
        assert abs(float(adapter[A][k] @ right[k])) == pytest.approx(1, abs=1e-4)


def test_bases_are_orthonormal_whatever_the_gradient_is() -> None:
    for rank in (1, RANK, 5):
        adapter = run(low(rank), 2)[-1].state.adapter
        torch.testing.assert_close(adapter[B].mT @ adapter[B], torch.eye(RANK), atol=1e-5, rtol=0)
        torch.testing.assert_close(adapter[A] @ adapter[A].mT, torch.eye(RANK), atol=1e-5, rtol=0)


def test_a_mean_of_r_is_the_mean_of_products() -> None:
    # one to two steps of 0.1 down x B^T G A^T, and nothing else moves: by examples (2, 1, 1),
    # (2 (1 + 2) + 0.5 + 4) / 4 = 2.625 of it
    gradient = low(RANK)
    before, after = run(gradient, 3)[-2:]
    bases, adapter = before.state.adapter, after.state.adapter
    assert torch.equal(adapter[A], bases[A])
    assert torch.equal(adapter[B], bases[B])
    step = -0.1 * 2.625 * bases[B].mT @ gradient @ bases[A].mT
    torch.testing.assert_close(adapter[R], step)
    # all of the gradient is between the bases, so the product is the full model's step
    product = adapter[B] @ adapter[R] @ adapter[A]
    torch.testing.assert_close(product, -0.1 * 2.625 * gradient, atol=1e-5, rtol=1e-4)


def test_r_squared_values_travel_up_and_the_bases_down() -> None:
    first, second, third = run(low(RANK), 3)
    for commit, names in ((first, {B}), (second, {A}), (third, {R})):
        assert all(update.delta.keys() == names for update in commit.updates)
        assert commit.updates[0].order.received.keys() == {A, B, R}


REFUSED = {
    "another start": ({"adapter": {"initial": "there"}}, "adapter.initial='there': leave it out"),
    "two rounds": ({"federation": {"rounds": 2}}, "federation.rounds=2: set it to 3 or more"),
}


@pytest.mark.parametrize(("table", "told"), REFUSED.values(), ids=REFUSED)
def test_settings_under_which_nothing_would_be_trained_are_refused(
    table: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=f"^method.name='fed-sb' .*{told}$"):
        check(from_table({"method": {"name": "fed-sb"}, **table}))


def made() -> Algorithm:
    return METHODS["fed-sb"].make(Method())


def test_a_moving_average_has_the_bases_of_what_it_follows() -> None:
    own = {A: drawn(RANK, IN, key=1), B: torch.zeros(OUT, RANK)}
    state = made().init({**own, **{AVERAGE + k: v for k, v in own.items()}})
    for sent in (B, A):
        received = state.adapter
        delta = {sent: drawn(*own[sent].shape), AVERAGE + sent: torch.zeros_like(own[sent])}
        update = Update(Order((0,), state.round, received), delta, {}, 1.0, 0.0, 1, 0)
        state = made().step(state, [update])
        assert not torch.equal(state.adapter[sent], received[sent])
        for name in (A, B, R):
            assert torch.equal(state.adapter[AVERAGE + name], state.adapter[name])


def test_an_embedding_whose_a_is_zero_is_surveyed_the_other_way_round() -> None:
    names: Sequence[str] = ["e.lora_embedding_A", "e.lora_embedding_B", "e.lora_R"]
    assert [made().sends(names, r) for r in (0, 1, 2)] == [{n} for n in names]
