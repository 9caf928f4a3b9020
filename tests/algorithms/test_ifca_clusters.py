"""IFCA's arithmetic: who begins a cluster, who joins it, and what becomes of each."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgen_edge.algorithms.ifca import (
    CLUSTER_KEY,
    are_clusters_equal,
    assign_clusters,
    divide_by_angle,
    receives,
    select_cluster,
    split_clusters,
    strip_cluster_prefix,
)
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.config import Method
from fedgen_edge.types import Leaves, Order, ServerState, Update


def at(*degrees: float) -> torch.Tensor:
    """Changes of these directions, of different lengths."""
    angles = [math.radians(d) for d in degrees]
    return torch.stack(
        [(1 + i) * torch.tensor([math.cos(a), math.sin(a)]) for i, a in enumerate(angles)]
    )


def begun(number: int, **leaves: float) -> ServerState:
    adapter = {name: torch.tensor(value) for name, value in leaves.items()}
    return METHODS["ifca"].make(Method(clusters=number)).init(adapter)


def sent(state: ServerState, weight: float, **delta: float) -> Update:
    """An update, with underscores for the dots of its leaves' names."""
    change = {k.replace("_", "."): torch.tensor(v) for k, v in delta.items()}
    return Update(Order((0,), state.round, state.adapter), change, {}, weight, 1.0, 1, 0)


def values(state: ServerState) -> list[float]:
    return [float(state.adapter[k]) for k in sorted(state.adapter)]


def test_those_farthest_apart_begin_clusters_and_the_others_join_the_nearest() -> None:
    # 0 and 133 degrees are 133 apart, more than any two others (10 and 240: 130). 240 is nearest to
    # 133, 107 apart, and 10 and 121 are 10 and 12 apart from one of both: so 240 is the third.
    # With two clusters it joins that at 133.
    assert divide_by_angle(at(0, 10, 121, 133, 240), 3) == [0, 0, 1, 1, 2]
    assert divide_by_angle(at(0, 10, 121, 133, 240), 2) == [0, 0, 1, 1, 1]
    # in another order the first of the two is the first cluster, and nothing else changes
    assert divide_by_angle(at(240, 121, 10, 133, 0), 3) == [2, 0, 1, 0, 1]


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.1, 1e-30, 1e30]), min_size=3, max_size=3),
        min_size=4,
        max_size=8,
    ),
    number=st.integers(2, 4),
)
def test_every_cluster_has_somebody_even_of_equal_changes(
    rows: list[list[float]], number: int
) -> None:
    found = divide_by_angle(torch.tensor(rows, dtype=torch.float64), number)
    assert {*found} == {*range(number)}


def test_the_server_divides_the_first_round_and_then_believes_the_names() -> None:
    algorithm = METHODS["ifca"].make(Method(clusters=2))
    state = begun(2, w=1.0)
    assert values(state) == [1.0, 1.0]
    # all chose the first of equal ones: (1 * 4 + 3 * 8) / 4 = 7 up, and 2 down
    first = [sent(state, w, cluster_0_w=d) for w, d in ((1.0, 4.0), (3.0, 8.0), (5.0, -2.0))]
    assert assign_clusters(state.adapter, first) == [0, 0, 1]
    state = algorithm.step(state, first)
    assert values(state) == [8.0, -1.0]
    # from now on a change counts where it was made, whatever its direction
    second = [sent(state, 1.0, cluster_1_w=4.0), sent(state, 3.0, cluster_1_w=-4.0)]
    assert assign_clusters(state.adapter, second) == [1, 1]
    state = algorithm.step(state, second)
    # nobody took the first; (1 * 4 - 3 * 4) / 4 = -2
    assert values(state) == [8.0, -3.0]


def test_fewer_clients_than_clusters_are_everyones() -> None:
    algorithm = METHODS["ifca"].make(Method(clusters=3))
    state = begun(3, w=1.0)
    both = [sent(state, 1.0, cluster_0_w=4.0), sent(state, 3.0, cluster_0_w=-4.0)]
    assert assign_clusters(state.adapter, both) is None
    state = algorithm.step(state, both)
    assert values(state) == [-1.0, -1.0, -1.0]
    assert are_clusters_equal(state.adapter)


def test_clusters_travel_as_they_are_and_each_is_an_adapter() -> None:
    state = begun(2, **{"a.lora_A": 1.0, "average.b": 2.0})
    assert not {v.data_ptr() for v in select_cluster(state.adapter, 0).values()} & {
        v.data_ptr() for v in select_cluster(state.adapter, 1).values()
    }
    came = decode(encode(state.adapter))
    assert split_clusters(came) == {k: {"a.lora_A": 1.0, "average.b": 2.0} for k in (0, 1)}
    assert select_cluster(came, None) is came
    assert strip_cluster_prefix(select_cluster(came, 1)) == split_clusters(came)[1]
    # the tenth comes after the second, whatever the order of names is
    many = begun(11, w=0.0).adapter | {"cluster.10.w": torch.tensor(5.0)}
    assert [*split_clusters(many)] == [*range(11)]
    assert receives(many, {CLUSTER_KEY: torch.tensor(10.0)}) == {"w": 5.0}


@pytest.mark.parametrize("memory", [{}, {CLUSTER_KEY: torch.tensor(1.0)}])
def test_an_adapter_without_clusters_is_received_as_it_is(memory: Leaves) -> None:
    backbone = {"w": torch.tensor(0.0)}
    assert receives(backbone, memory) is backbone
    assert split_clusters(backbone) == {}
    assert strip_cluster_prefix(backbone) is backbone
