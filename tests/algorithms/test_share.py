"""Which factors are trained and sent."""

from collections.abc import Sequence

import torch

from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Method
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves, Order, ServerState, Update

NAMES = ["q.lora_A", "q.lora_B", "e.lora_embedding_A", "e.lora_embedding_B", "norm.bias"]


def shapes() -> Leaves:
    """As a fresh adapter: what is drawn, and what begins at zero."""
    rng = generator("share")
    drawn = {
        "q.lora_A": torch.randn(2, 5, generator=rng),
        "e.lora_embedding_B": torch.randn(4, 2, generator=rng),
    }
    zero = {"q.lora_B": torch.zeros(3, 2), "e.lora_embedding_A": torch.zeros(2, 7)}
    return {**drawn, **zero, "norm.bias": torch.zeros(3)}


def client(state: ServerState, name: str, key: int, weight: float) -> Update:
    """A client that moves all that it trains at random, and sends what it sends."""
    algorithm, rng = METHODS[name].make(Method()), generator("client", key, state.round)
    delta = {
        k: torch.randn(v.shape, generator=rng) * algorithm.trains(k, state.round, 0)
        for k, v in state.adapter.items()
    }
    order = Order((key,), state.round, state.adapter)
    return Update(order, algorithm.select_shared(delta, state.round), {}, weight, 1.0, 1, 0)


def after(name: str, rounds: int) -> tuple[ServerState, ServerState, Sequence[Update]]:
    """The server before and after the last of some rounds, and what came in it."""
    algorithm = METHODS[name].make(Method())
    state = before = algorithm.init(shapes())
    updates: list[Update] = []
    for _ in range(rounds):
        updates = [client(state, name, key, weight) for key, weight in ((0, 1.0), (1, 4.0))]
        before, state = state, algorithm.step(state, updates)
    return before, state, updates


def test_what_was_drawn_stays_and_never_travels_in_ffa() -> None:
    algorithm, (_, state, updates) = METHODS["ffa-lora"].make(Method()), after("ffa-lora", 3)
    sent = {"q.lora_B", "e.lora_embedding_A", "norm.bias"}
    assert {*updates[0].delta} == sent == algorithm.sends(NAMES, None)
    for name, value in shapes().items():
        assert torch.equal(state.adapter[name], value) == (name not in sent)


def test_rolora_sends_one_factor_a_round_and_receives_both() -> None:
    algorithm = METHODS["rolora"].make(Method())
    # training begins with what is zero: where B is zero, A has no gradient
    assert algorithm.sends(NAMES, 0) == {"q.lora_B", "e.lora_embedding_A", "norm.bias"}
    assert algorithm.sends(NAMES, 1) == {"q.lora_A", "e.lora_embedding_B", "norm.bias"}
    assert algorithm.sends(NAMES, 2) == algorithm.sends(NAMES, 0)
    assert algorithm.sends(NAMES, None) == {*NAMES}
    assert all(algorithm.trains(n, r, 0) == (n in algorithm.sends(NAMES, r))
               for n in NAMES for r in range(4))  # fmt: skip


def test_rolora_keeps_nothing_at_a_client() -> None:
    algorithm, start = METHODS["rolora"].make(Method()), shapes()
    delta = {k: torch.ones_like(v) * algorithm.trains(k, 0, 0) for k, v in start.items()}
    assert algorithm.keeps(start, delta, {}) == {}


def test_fedsa_sends_a_and_keeps_b() -> None:
    algorithm, start = METHODS["fedsa-lora"].make(Method()), shapes()
    assert algorithm.sends(NAMES, 3) == {"q.lora_A", "e.lora_embedding_A", "norm.bias"}
    kept = algorithm.keeps(start, {k: torch.ones_like(v) for k, v in start.items()}, {})
    assert {*kept} == {"kept:q.lora_B", "kept:e.lora_embedding_B"}
    assert torch.equal(kept["kept:q.lora_B"], torch.ones(3, 2))
    # who never took part begins with B as it was at first: without an update of that layer
    assert torch.equal(algorithm.receives(start, {})["q.lora_B"], torch.zeros(3, 2))


def test_a_moving_average_goes_with_what_it_follows() -> None:
    both = [*NAMES, *(f"average.{n}" for n in NAMES)]
    for name in ("ffa-lora", "fedsa-lora"):
        sent = METHODS[name].make(Method()).sends(both, 1)
        assert {f"average.{n}" for n in NAMES if n in sent} == {*sent} - {*NAMES}
    # it moves in every round, towards a factor that rests too
    for round_ in (0, 1):
        sent = METHODS["rolora"].make(Method()).sends(both, round_)
        assert {*sent} - {*NAMES} == {*both} - {*NAMES}
