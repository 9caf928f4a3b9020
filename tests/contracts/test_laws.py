"""What a method declares of its merging holds, and what it does not declare does not.

Each law is a number: how far the server's two models are apart that the law says are one. A model
is the dense update of every layer, as the model computes it: of all kinds that LoRA knows, with
frozen pairs and what stands between factors. A law that is declared holds for whatever Hypothesis
draws; one that is not, is broken by random clients.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge.adapters import lora
from fedgen_edge.algorithms.low_rank import FactorNames, find_pairs
from fedgen_edge.algorithms.merge import aggregate_partially
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.algorithms.properties import MergeProperties
from fedgen_edge.algorithms.share import share_nothing
from fedgen_edge.config import Method
from fedgen_edge.leaves import add, scale, subtract
from fedgen_edge.types import RESIDUAL, Leaves, ServerState
from support.clients import (
    KINDS,
    Case,
    after,
    begun,
    cohort,
    end,
    gap,
    made,
    rank,
    seen,
    trained,
    update,
)

NEAR = 1e-4
"""How far apart float32 may bring what is equal, as a share of its size."""
APART = 1e-3
"""How far apart is what differs, at the least."""
MERGING = [
    name for name, entry in METHODS.items() if entry.make(Method()).sends is not share_nothing
]
"""All but training alone, which merges nothing."""
weight = st.sampled_from((0.0, 1.0, 2.5, 7.0))
cases = st.builds(
    Case,
    seed=st.integers(0, 19),
    rounds=st.integers(0, 3),
    weights=st.tuples(weight, weight, weight).filter(any),
    order=st.permutations(range(3)).map(tuple),
    which=st.integers(0, 2),
    scales=st.tuples(*[st.sampled_from((-8.0, -1.0, 0.25, 2.0))] * 3),
)


# --- the laws


def order(name: str, case: Case) -> float:
    state = begun(name, case.seed, case.rounds)
    updates = cohort(name, state, case)
    other = [updates[i] for i in case.order]
    return gap(seen(after(name, state, other)), seen(after(name, state, updates)))


def precision(name: str, case: Case) -> float:
    state = begun(name, case.seed, case.rounds)
    updates = cohort(name, state, case)

    def double(leaves: Leaves) -> Leaves:
        return {k: v.double() for k, v in leaves.items()}

    precise = [
        replace(u, order=replace(u.order, received=double(u.order.received)), delta=double(u.delta))
        for u in updates
    ]
    whole = replace(
        state,
        adapter=double(state.adapter),
        first_moment=double(state.first_moment),
        second_moment=double(state.second_moment),
        method=double(state.method),
    )
    single = after(name, state, updates)
    assert {v.dtype for v in single.values()} == {torch.float32}
    return gap(seen(single), seen(after(name, whole, precise)))


def alone(name: str, case: Case) -> float:
    state, algorithm = trained(name, case), made(name)
    own = end(name, state, case.seed, None)
    one = update(name, state, own, 0, None)
    updates = [replace(one, weight=1 + weight) for weight in case.weights[: case.which + 1]]
    now = after(name, state, updates)
    return gap(seen(algorithm.select_shared(now)), seen(algorithm.select_shared(own)))


def halves(name: str, case: Case) -> float:
    state = begun(name, case.seed, case.rounds)
    updates = cohort(name, state, case)
    half = replace(updates[case.which], weight=updates[case.which].weight / 2)
    cut_ = [*updates[: case.which], half, half, *updates[case.which + 1 :]]
    return gap(seen(after(name, state, cut_)), seen(after(name, state, updates)))


def splits(name: str, case: Case) -> float:
    state = trained(name, case)
    updates, others = cohort(name, state, case), []
    for i, factor in enumerate(case.scales):
        own = end(name, state, (case.seed, i), rank(name, i))
        for pair in free(name, state):
            own |= {pair.a: own[pair.a] / factor, pair.b: own[pair.b] * factor}
        other = update(name, state, own, i, rank(name, i))
        others.append(replace(other, weight=case.weights[i]))
    return gap(seen(after(name, state, others)), seen(after(name, state, updates)))


def free(name: str, state: ServerState) -> list[FactorNames]:
    """Products of which clients train both factors, so that they may split them in many ways."""
    trains = made(name).trains
    found = find_pairs(k for k in state.adapter if not k.startswith(RESIDUAL))
    return [pair for pair in found if all(trains(k, state.round, 0) for k in pair)]


def sums(name: str, case: Case) -> float:
    """A part of one client's change is moved to another, whose adapter has room for it."""
    state = trained(name, case)
    updates = [replace(u, weight=1.0, steps=3) for u in cohort(name, state, case)]
    one, two, *rest = updates
    part = scale(one.delta, 0.5)
    moved = replace(one, delta=subtract(one.delta, part))
    other = [moved, replace(two, delta=add(two.delta, part)), *rest]
    return gap(seen(after(name, state, other)), seen(after(name, state, updates)))


def exact(name: str, case: Case) -> float:
    state, ideal = trained(name, case), {}
    for i, weight in enumerate(case.weights):
        for k, v in seen(end(name, state, (case.seed, i), rank(name, i))).items():
            ideal[k] = ideal.get(k, 0) + v * weight / sum(case.weights)
    return gap(seen(after(name, state, cohort(name, state, case))), ideal)


LAWS: dict[str, Callable[[str, Case], float]] = {
    "alone": alone,
    "halves": halves,
    "splits": splits,
    "sums": sums,
    "exact": exact,
}
"""Those that methods differ in; `weighed`, which is about errors, has a test of its own."""


def declared(law: str, yes: bool) -> list[str]:
    return [name for name in MERGING if getattr(METHODS[name].properties, law) == yes]


each = settings(deadline=None, max_examples=6)


@each
@given(case=cases)
@pytest.mark.parametrize("name", MERGING)
def test_the_order_of_clients_does_not_matter(name: str, case: Case) -> None:
    assert order(name, case) < NEAR


@each
@given(case=cases)
@pytest.mark.parametrize("name", MERGING)
def test_float32_and_float64_agree(name: str, case: Case) -> None:
    assert precision(name, case) < NEAR


@each
@given(case=cases)
@pytest.mark.parametrize(
    ("law", "name"),
    # where one factor rests there is one way to split a product, and nothing to ask
    [
        (law, name)
        for law in LAWS
        for name in declared(law, True)
        if law != "splits" or free(name, trained(name, Case()))
    ],
)
def test_what_is_declared_holds(law: str, name: str, case: Case) -> None:
    assert LAWS[law](name, case) < NEAR


@pytest.mark.parametrize(
    ("law", "name"), [(law, name) for law in LAWS for name in declared(law, False)]
)
def test_what_is_not_declared_does_not_hold(law: str, name: str) -> None:
    # Case() is the example: three random clients of 1, 5 and 2 examples
    assert LAWS[law](name, Case()) > APART


@pytest.mark.parametrize("name", MERGING)
def test_to_have_nothing_is_an_error_where_clients_are_weighed(name: str) -> None:
    state = trained(name, Case())
    updates = cohort(name, state, Case(weights=(0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="positive weight"):
        made(name).merges(state.adapter, [])
    if METHODS[name].properties.weighed:
        with pytest.raises(ValueError, match="positive weight"):
            made(name).merges(state.adapter, updates)
    else:
        others = after(name, state, cohort(name, state, Case()))
        assert gap(after(name, state, updates), others) == 0


SUMMED = [name for name in MERGING if made(name).partial_aggregation]


@each
@given(case=cases)
@pytest.mark.parametrize("name", SUMMED)
def test_means_of_those_alike_stand_for_each_of_them(name: str, case: Case) -> None:
    state, summed = begun(name, case.seed, case.rounds), made(name).partial_aggregation
    assert summed
    steps = (2, 5, 2)
    updates = [
        replace(u, weight=u.weight or 3.0, steps=steps[i])
        for i, u in enumerate(cohort(name, state, case))
    ]
    parted = [updates[i] for i in case.order]
    workers = (parted[:2], parted[2:]) if case.which else (parted, [])
    common = [u for own in workers for u in aggregate_partially(own, summed)]
    assert gap(seen(after(name, state, common)), seen(after(name, state, updates))) < NEAR
    for one, other in zip(common, parted, strict=True):
        assert one == replace(other, delta=one.delta, client_norm=one.client_norm)


def test_rules_that_are_sums_are_summed_but_where_rounds_or_versions_differ() -> None:
    # IFCA's first round looks at every change, and fedbuff's cohorts are no worker's
    assert {*SUMMED} == {*declared("sums", True)} - {"ifca"}


# --- the suite itself


def test_every_law_is_asked_and_some_method_has_it_and_some_has_not() -> None:
    assert {*LAWS, "weighed"} == {*MergeProperties._fields}
    assert all(declared(law, yes) for law in MergeProperties._fields for yes in (True, False))


def test_every_kind_of_layer_is_merged() -> None:
    assert {type(layer) for layer in KINDS} == {*lora.KINDS}
