from dataclasses import replace

import pytest
import torch

from fedgen_edge.algorithms.ifca import add_cluster_prefix
from fedgen_edge.algorithms.merge_products import measure_sizes
from fedgen_edge.algorithms.methods import make_algorithm
from fedgen_edge.config import Method
from fedgen_edge.runs.federate import measure_layers, measure_round_drift
from fedgen_edge.types import Commit, Order, ServerState, Update

START = {
    f"layers.{n}.lora_{f}": torch.eye(2) * size for n in (0, 1) for f, size in (("A", 3), ("B", 0))
}


def commit(name: str, round_: int) -> Commit:
    """Two clients, of whom each adds its number (1, 2) to what the method trains and sends."""
    algorithm = make_algorithm(Method(name=name))
    trained = [k for k in START if algorithm.trains(k, round_, 0)]
    updates = [
        Update(
            order=Order((c,), round_, algorithm.select_shared(START)),
            delta=algorithm.select_shared({k: torch.eye(2) * (c + 1.0) for k in trained}, round_),
            memory={},
            weight=1.0,
            loss=1.0,
            steps=1,
            bytes_up=1,
        )
        for c in (0, 1)
    ]
    return Commit(algorithm.step(ServerState(round_, START), updates), updates, 1)


def told(name: str, round_: int = 0) -> dict[str, dict[str, float]]:
    return measure_layers(make_algorithm(Method(name=name)), commit(name, round_))


def test_where_both_factors_are_sent_their_error_is_known() -> None:
    # A is 4 and 5, B 1 and 2: the mean product is (4 + 10) / 2 = 7, that of means 4.5 x 1.5 = 6.75.
    found = told("fedgen-edge")
    assert list(found) == ["layers.0", "layers.1"]
    assert found["layers.0"] == pytest.approx(
        {"error": 0.25 / 7, "rank": 2, "a": 4.5 * 2**0.5, "b": 1.5 * 2**0.5}
    )


@pytest.mark.parametrize(
    ("name", "round_", "a", "b"), [("ffa-lora", 0, 3, 1.5), ("rolora", 0, 3, 1.5)]
)
def test_where_one_factor_is_sent_sizes_are_known(
    name: str, round_: int, a: float, b: float
) -> None:
    expected = {"rank": 2, "a": a * 2**0.5, "b": b * 2**0.5}
    assert told(name, round_) == {f"layers.{n}": pytest.approx(expected) for n in (0, 1)}


@pytest.mark.parametrize(("name", "layer"), [("fedsa-lora", []), ("fedper", ["layers.0"])])
def test_a_product_that_clients_keep_a_factor_of_is_left_out(name: str, layer: list[str]) -> None:
    assert list(told(name)) == layer


def test_what_stands_between_two_factors_is_part_of_their_product() -> None:
    # of rank 2 are both factors, and R has but one direction
    start = {"l.lora_A": torch.eye(2), "l.lora_B": torch.eye(2)}
    core = {"l.lora_R": torch.tensor([[3.0, 0.0], [0.0, 0.0]])}
    assert measure_sizes(start)["l"].rank == pytest.approx(2)
    assert measure_sizes(start | core)["l"].rank == pytest.approx(1)


def test_nothing_sent_is_nothing_known() -> None:
    assert told("local-only") == {}


@pytest.mark.parametrize(
    ("name", "round_", "own", "together"),
    [
        ("fedgen-edge", 0, [8, 20], 14),  # B A is 1 x 4 and 2 x 5, of each of four directions
        ("ffa-lora", 0, [6, 12], 9),  # 1 x 3 and 2 x 3: the server knows the A that nobody sends
        ("rolora", 0, [6, 12], 9),
        ("rolora", 1, [0, 0], 0),  # A alone, while B is zero
        ("fedsa-lora", 0, [2, 4], 3),  # B is the clients' own: A as it is
        ("fedper", 0, [4 * 2**0.5, 10 * 2**0.5], 7 * 2**0.5),  # one of two layers
        ("local-only", 0, [0, 0], 0),
    ],
)
def test_drift_is_of_products(name: str, round_: int, own: list[float], together: float) -> None:
    found = measure_round_drift(make_algorithm(Method(name=name)), commit(name, round_), START)
    assert found
    assert found.client_norms == pytest.approx(own)
    assert found.mean_norm == pytest.approx(together)


def test_drift_of_clusters_is_of_what_each_client_took() -> None:
    algorithm = make_algorithm(Method(name="ifca"))
    server = algorithm.begins(START)
    told = commit("fedgen-edge", 0).updates
    orders = [replace(u.order, received=server) for u in told]
    updates = [
        replace(u, order=order, delta=add_cluster_prefix(u.delta, at))
        for at, (u, order) in enumerate(zip(told, orders, strict=True))
    ]
    found = measure_round_drift(algorithm, Commit(ServerState(1, server), updates, 1), server)
    assert found
    assert found.client_norms == pytest.approx([8, 20])
    assert found.mean_norm == pytest.approx(14)
