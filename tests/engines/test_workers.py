"""How work is shared out among workers, and what travels; without any."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

from conftest import Line, line_shard
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.merge import PartialAggregation, aggregate_partially, weighted_average
from fedgen_edge.compression.serialize import encode
from fedgen_edge.data.batches import Budget
from fedgen_edge.engines.workers import assign_loads, make_batch, restore_result, run_batch
from fedgen_edge.federation.client import Patience, Recipe
from fedgen_edge.federation.jobs import Clients, Job, Train
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.leaves import norm
from fedgen_edge.types import Leaves, Order, Update


def trains(memory: dict[int, Leaves] | None = None) -> Train:
    shards = [line_shard("a", 1.0), line_shard("b", 2.0, 2.0), line_shard("c", 4.0)]
    clients = Clients(Line(), Algorithm(), shards, 0, memory=memory or {})
    return Train(clients, Budget(2), lambda _: Recipe(partial(SGD, lr=0.5)))


def tunes() -> Personalize:
    return Personalize(trains().clients, Budget(2), Recipe(partial(SGD, lr=0.5)), Patience())


def carried_out(job: Train | Personalize, orders: list[Order], *, sums: bool) -> list:
    work, adapters = make_batch("any", job, [orders[:1], orders[1:]], stacked=True, sums=sums)
    said = run_batch(lambda *_: job, work, [encode(own) for own in adapters])
    by_clients = {order.clients: order for order in orders}
    return [restore_result(one, by_clients) for results in said for one in results]


def orders(received: Leaves) -> list[Order]:
    return [Order((c,), 3, received, b"payload") for c in range(3)]


@given(st.lists(st.integers(0, 50)), st.integers(1, 6))
def test_every_load_goes_to_one_worker_and_none_has_a_load_too_many(
    loads: list[int], workers: int
) -> None:
    shares = assign_loads(loads, workers)
    assert sorted(at for share in shares for at in share) == [*range(len(loads))]
    assert all(share == sorted(share) for share in shares)
    sums = [sum(loads[at] for at in share) for share in shares]
    # who has most was the least laden before its last load came
    assert max(sums) - min(sums) <= max(loads, default=0)


@pytest.mark.parametrize("job", [trains(), tunes()], ids=["train", "tune"])
def test_what_a_worker_says_is_what_the_job_gives(job: Job) -> None:
    given = orders({"w": torch.tensor(0.25)})
    assert isinstance(job, Train | Personalize)
    found = carried_out(job, given, sums=False)
    expected = [*job(given[:1], stacked=True), *job(given[1:], stacked=True)]
    assert found == expected
    assert all(one.order is order for one, order in zip(found, given, strict=True))


def test_an_adapter_that_orders_share_goes_once_and_never_in_an_order() -> None:
    one, other = {"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}
    given = [*orders(one)[:2], replace(orders(other)[2], rank=4)]
    work, adapters = make_batch("any", trains(), [given[:2], given[2:]], stacked=True, sums=False)
    assert adapters == [one, other]
    bare = [order for stack in work.stacks for order, _ in stack]
    assert [(order.received, order.payload) for order in bare] == [({}, b"")] * 3
    assert [at for stack in work.stacks for _, at in stack] == [0, 0, 1]
    assert [order.rank for order in bare] == [None, None, 4]


def test_memory_goes_with_the_clients_that_are_asked_and_have_some() -> None:
    kept = {"kept:w": torch.tensor(1.0)}
    given = orders({"w": torch.tensor(0.0)})[:2]
    work, _ = make_batch("any", trains({1: kept, 2: kept}), [given], stacked=True, sums=False)
    assert work.memory == {1: encode(kept)}
    assert make_batch("any", trains(), [given], stacked=True, sums=False)[0].memory == {}


def update(client: int, weight: float, change: float) -> Update:
    delta = {"w": torch.tensor([change, 0.0])}
    return Update(Order((client,), 0, {}), delta, {}, weight, 0.0, 1, 0)


def test_a_mean_in_each_ones_place_leaves_the_mean_and_tells_who_moved_how_far() -> None:
    some, other = [update(0, 1.0, 1.0), update(1, 3.0, 3.0)], [update(2, 4.0, -10.0)]
    # of the first two (1 + 9) / 4 = 2.5; of all (1 + 9 - 40) / 8 = -3.75
    found = [
        *aggregate_partially(some, PartialAggregation()),
        *aggregate_partially(other, PartialAggregation()),
    ]
    assert [float(u.delta["w"][0]) for u in found] == [2.5, 2.5, -10.0]
    assert [u.client_norm for u in found] == [1.0, 3.0, 10.0]
    assert (
        weighted_average({}, found)["w"].tolist()
        == weighted_average({}, [*some, *other])["w"].tolist()
        == [-3.75, 0.0]
    )


def test_with_sums_a_worker_sends_one_change_for_all_its_clients() -> None:
    size = 10_000
    given = orders({"w": torch.tensor(0.5)})
    job = trains()
    work, adapters = make_batch("any", job, [given], stacked=True, sums=True)

    class Large(Train):
        """The job, whose clients' changes have many values."""

        def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
            wide = torch.ones(size)
            found = super().__call__(orders, stacked=stacked)
            return [replace(u, delta={"w": wide * u.delta["w"]}) for u in found]

    large = Large(job.clients, job.budget, job.recipe)

    def sent(sums: bool) -> int:
        said = run_batch(lambda *_: large, work._replace(sums=sums), [encode(a) for a in adapters])
        return len(pickle.dumps(said))

    one = 4 * size
    assert one < sent(sums=True) < one + 2000
    assert 3 * one < sent(sums=False) < 3 * one + 4000


def test_with_sums_training_says_each_clients_own_numbers_and_tuning_is_as_without() -> None:
    given = orders({"w": torch.tensor(0.5)})
    plain, common = (carried_out(trains(), given, sums=sums) for sums in (False, True))
    for one, other in zip(plain, common, strict=True):
        assert other == replace(one, delta=other.delta, client_norm=float(norm(one.delta)))
    assert carried_out(tunes(), given, sums=True) == carried_out(tunes(), given, sums=False)
