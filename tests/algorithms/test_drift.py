"""How far clients move is what the dense weights say."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedgen_edge.algorithms.drift import measure_drift
from fedgen_edge.algorithms.merge import PartialAggregation, aggregate_partially
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves, Order, Update

WEIGHTS = (1.0, 3.0, 4.0)
SHAPES: dict[str, tuple[int, ...]] = {
    "linear.lora_A": (2, 5),
    "linear.lora_B": (4, 2),
    "cored.lora_A": (3, 4),
    "cored.lora_R": (3, 3),
    "cored.lora_B": (6, 3),
    "conv.lora_A": (2, 3, 3, 3),
    "conv.lora_B": (4, 2, 1, 1),
    "words.lora_embedding_A": (2, 7),
    "words.lora_embedding_B": (3, 2),
    "wide.lora_A": (9, 3),
    "wide.lora_B": (4, 9),
    "norm.weight": (5,),
}


def drawn(key: object, scale: float = 1.0) -> Leaves:
    rng = generator("effective", key)
    return {k: scale * torch.randn(shape, generator=rng) for k, shape in SHAPES.items()}


def update(client: int, received: Leaves, delta: Leaves) -> Update:
    order = Order((client,), 0, received)
    return Update(order, delta, {}, WEIGHTS[client], 0.0, 1, 0)


def dense(own: Leaves) -> list[Tensor]:
    """Every weight that a model adds, by matrix products."""
    found = {k: v.double() for k, v in own.items()}
    out = []
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in found):
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if f"{layer}.{a}" in found:
                core = found.get(f"{layer}.lora_R", torch.eye(len(found[f"{layer}.{a}"])).double())
                left, right = found[f"{layer}.{b}"].flatten(1), found[f"{layer}.{a}"].flatten(1)
                out.append(left @ core @ right)
    return [*out, found["norm.weight"]]


def expected(ends: Sequence[Leaves], starts: Sequence[Leaves]) -> tuple[list[float], float]:
    changes = [
        torch.cat([(e - s).flatten() for e, s in zip(dense(end), dense(start), strict=True)])
        for end, start in zip(ends, starts, strict=True)
    ]
    together = sum(w / sum(WEIGHTS) * c for w, c in zip(WEIGHTS, changes, strict=True))
    assert isinstance(together, Tensor)
    return [float(c.norm()) for c in changes], float(together.norm())


def added(start: Leaves, delta: Leaves) -> Leaves:
    return {k: v.double() + delta[k].double() if k in delta else v for k, v in start.items()}


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_moves_are_those_of_the_dense_weights(size: float) -> None:
    start, other = drawn("start"), drawn("other start")
    starts = [start, start, other]
    deltas = [drawn(c, size) for c in range(3)]
    found = measure_drift([update(c, starts[c], deltas[c]) for c in range(3)], start)
    own, together = expected([added(s, d) for s, d in zip(starts, deltas, strict=True)], starts)
    assert found
    assert found.client_norms == pytest.approx(own, rel=1e-6)
    assert found.mean_norm == pytest.approx(together, rel=1e-6)


@pytest.mark.parametrize("sent", ["lora_A", "lora_B", "lora_R", "weight"])
def test_what_is_not_sent_is_what_the_server_has(sent: str) -> None:
    start = drawn("start")
    deltas = [{k: v for k, v in drawn(c).items() if k.endswith(sent)} for c in range(3)]
    # the rest did not even travel down
    received = {k: v for k, v in start.items() if k.endswith(sent)}
    found = measure_drift([update(c, received, deltas[c]) for c in range(3)], start)
    own, together = expected([added(start, delta) for delta in deltas], [start] * 3)
    assert found
    assert found.client_norms == pytest.approx(own, rel=1e-6)
    assert found.mean_norm == pytest.approx(together, rel=1e-6)


def test_a_factor_whose_partner_nobody_knows_is_compared_as_it_is() -> None:
    start = {"x.lora_A": torch.ones(1, 2)}
    found = measure_drift([update(0, start, {"x.lora_A": torch.tensor([[3.0, 4.0]])})], start)
    assert found == ([5.0], 5.0)


def test_equal_products_of_other_factors_are_one_move() -> None:
    # B A = (3 B)(A / 3) = (-B)(-A), from one start: all agree, so they move as far together
    start, end = drawn("start"), drawn("end")
    first = {k: end[k] - start[k] for k in ("linear.lora_A", "linear.lora_B")}

    def as_well(by: float) -> Leaves:
        a, b = end["linear.lora_A"] / by, end["linear.lora_B"] * by
        return {
            "linear.lora_A": a - start["linear.lora_A"],
            "linear.lora_B": b - start["linear.lora_B"],
        }

    same = [update(c, start, as_well(by)) for c, by in enumerate((1.0, 3.0, -1.0))]
    found = measure_drift(same, start)
    assert found
    assert found.client_norms == pytest.approx([found.mean_norm] * 3, rel=1e-5)
    # the factors say otherwise
    assert not torch.allclose(first["linear.lora_A"], same[1].delta["linear.lora_A"])


def test_who_turns_the_factors_of_one_product_does_not_move() -> None:
    start = drawn("start")
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    a, b = start["linear.lora_A"], start["linear.lora_B"]
    delta = {"linear.lora_A": turn.mT @ a - a, "linear.lora_B": b @ turn - b}
    found = measure_drift([update(0, start, delta)], start)
    assert found
    assert found.client_norms[0] < 1e-3 * float(torch.linalg.matrix_norm(b @ a))


def test_a_moving_average_is_no_move_of_its_own() -> None:
    start = {"x.lora_A": torch.eye(2), "x.lora_B": torch.zeros(2, 2)}
    follows = {f"average.{k}": v for k, v in start.items()}
    delta = {"x.lora_B": 3 * torch.eye(2)} | {f"average.{k}": v + 1 for k, v in start.items()}
    found = measure_drift([update(0, start | follows, delta)], start | follows)
    assert found
    assert found.client_norms == pytest.approx([3 * math.sqrt(2)])


def test_of_means_alone_only_weights_that_are_no_product_tell() -> None:
    start = drawn("start")
    plain = [
        update(c, start, {"norm.weight": v["norm.weight"]}) for c, v in enumerate(map(drawn, "abc"))
    ]
    whole, common = (
        measure_drift(plain, start),
        measure_drift(aggregate_partially(plain, PartialAggregation()), start),
    )
    assert whole
    assert common
    assert common.client_norms == pytest.approx(whole.client_norms)
    assert common.mean_norm == pytest.approx(whole.mean_norm)
    factors = [replace(u, delta=drawn(at)) for at, u in enumerate(plain)]
    assert measure_drift(aggregate_partially(factors, PartialAggregation()), start) is None
