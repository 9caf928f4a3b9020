"""The virtual clock: who finishes when, by hand; whole federations by it, on a line."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

from conftest import Line, line_shard
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.compression.serialize import count_encoded_bytes
from fedgen_edge.config import Devices, Federation, Method
from fedgen_edge.data.batches import Budget
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.client import Recipe
from fedgen_edge.federation.jobs import Clients, Job, Train
from fedgen_edge.federation.rounds import Roster, list_available, rounds, sample_clients
from fedgen_edge.federation.schedule import (
    ClientLoad,
    ClientTiming,
    DeviceDraw,
    cohort_size,
    count_requested,
    draw_device,
    fill_buffer,
    is_available,
    simulate_client,
    simulate_round,
)
from fedgen_edge.federation.states import decode_server_state, encode_server_state
from fedgen_edge.types import Commit, Order, Queue, RoundTrip, ServerState, Timing, Update

LUCKY = DeviceDraw(0.0, 0.99, 0.5)
"""Neither away nor dropping out, by any chance below 0.99."""
SIZE = count_encoded_bytes({"w": ()})
"""Bytes of a line's adapter."""


def stints(devices: Devices, loads: Sequence[ClientLoad], *drawn: DeviceDraw) -> list[ClientTiming]:
    lucks = drawn or (LUCKY,) * len(loads)
    pairs = enumerate(zip(loads, lucks, strict=True))
    return [simulate_client(devices, client, load, chance) for client, (load, chance) in pairs]


# ---- one client's time


def test_a_client_receives_trains_and_sends_one_after_the_other() -> None:
    # 100 bytes at 50 a second, 4 steps at 1 a second, 100 bytes at 10 a second: 2, 6 and 16.
    devices = Devices(steps_per_second=(1.0, 2.0), up=(10.0,), down=(50.0, 25.0))
    slow, fast = stints(devices, [ClientLoad(4, 100, 100)] * 2)
    assert (slow.upload_start, slow.end, slow.arrives) == (6.0, 16.0, True)
    # client 1: 100 bytes at 25, 4 steps at 2: 4, 6 and 16; client 2 is as client 0
    assert (fast.upload_start, fast.end) == (6.0, 16.0)
    assert simulate_client(devices, 2, ClientLoad(4, 100, 100), LUCKY).end == 16.0
    assert [slow.count_sent_bytes(at) for at in (0.0, 6.0, 11.0, 15.99, 16.0, 99.0)] == [
        0,
        0,
        50,
        99,
        100,
        100,
    ]


def test_what_is_not_described_takes_no_time() -> None:
    done = simulate_client(Devices(), 3, ClientLoad(9, 100, 100), LUCKY)
    assert (done.end, done.arrives, done.count_sent_bytes(0.0)) == (0.0, True, 100)


def test_who_drops_out_does_so_on_the_way() -> None:
    # of 16 seconds 3/4 are 12, 6 of them spent on sending 60 bytes; of 1/4, none
    devices = Devices(steps_per_second=(1.0,), up=(10.0,), down=(50.0,), fails=(0.5,))
    late = simulate_client(devices, 0, ClientLoad(4, 100, 100), DeviceDraw(0, 0.49, 0.75))
    assert (late.end, late.arrives, late.count_sent_bytes(99.0)) == (12.0, False, 60)
    soon = simulate_client(devices, 0, ClientLoad(4, 100, 100), DeviceDraw(0, 0.49, 0.25))
    assert (soon.end, soon.arrives, soon.count_sent_bytes(99.0)) == (4.0, False, 0)
    assert simulate_client(devices, 0, ClientLoad(4, 100, 100), DeviceDraw(0, 0.5, 0.75)).arrives
    # at once is before anything was sent
    assert (
        simulate_client(
            Devices(fails=(0.5,)), 0, ClientLoad(1, 9, 9), DeviceDraw(0, 0.0, 0.5)
        ).count_sent_bytes(99.0)
        == 0
    )


def test_chances_are_kept_over_many_rounds() -> None:
    # 400 rounds: 100 and 200 times, standard deviations 8.7 and 10
    devices = Devices(available=(0.25, 1.0), fails=(0.5,))
    there = [is_available(devices, 7, r, 0) for r in range(400)]
    assert 65 < sum(there) < 135
    assert all(is_available(devices, 7, r, 1) for r in range(400))
    fails = [
        not simulate_client(devices, 0, ClientLoad(1, 1, 1), draw_device(7, r, 0)).arrives
        for r in range(400)
    ]
    assert 160 < sum(fails) < 240
    # being there says nothing about dropping out: 100 of both, standard deviation 7
    assert 25 < sum(a and b for a, b in zip(there, fails, strict=True)) < 75


# ---- a round


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    # 4 steps at 1 and at 2 a second
    found = simulate_round(
        stints(Devices(steps_per_second=(1.0, 2.0)), [ClientLoad(4, 0, 0)] * 2), 2, None
    )
    assert (found.cohort, found.dropped, found.seconds) == ([0, 1], (), 4.0)


@pytest.mark.parametrize(
    ("deadline", "cohort", "seconds", "sent"),
    # 4 steps at 1 and 2 a second, then 100 bytes at 50: uploads from 4 to 6, and from 2 to 4
    [(7.0, [0, 1], 6.0, 0), (6.0, [0, 1], 6.0, 0), (5.0, [1], 5.0, 50), (3.0, [], 3.0, 50)],
)
def test_the_deadline_cuts_who_has_not_finished(
    deadline: float, cohort: list[int], seconds: float, sent: int
) -> None:
    devices = Devices(steps_per_second=(1.0, 2.0), up=(50.0,))
    found = simulate_round(stints(devices, [ClientLoad(4, 0, 100)] * 2), 2, deadline)
    assert (found.cohort, found.seconds, found.bytes_up) == (cohort, seconds, sent)
    assert sorted((*found.cohort, *found.dropped)) == [0, 1]


def test_of_those_asked_the_first_to_finish_count() -> None:
    # 4 steps at 1, 2, 4 and 0.5 a second end at 4, 2, 1 and 8: two are wanted
    devices = Devices(steps_per_second=(1.0, 2.0, 4.0, 0.5))
    found = simulate_round(stints(devices, [ClientLoad(4, 0, 100)] * 4), 2, None)
    # what took no time to send, and was not ready at 2 seconds, was not sent
    assert found == ([1, 2], (0, 3), 2.0, 0)


def test_who_drops_out_is_not_waited_for() -> None:
    # client 1 drops out after half of its 2 seconds; client 0 ends at 4, though two are wanted
    devices = Devices(steps_per_second=(1.0, 2.0), fails=(0.0, 0.5))
    loads = [ClientLoad(4, 0, 0)] * 2
    found = simulate_round(stints(devices, loads, LUCKY, DeviceDraw(0, 0.1, 0.5)), 2, None)
    assert (found.cohort, found.dropped, found.seconds) == ([0], (1,), 4.0)
    assert (
        simulate_round(stints(devices, loads, LUCKY, DeviceDraw(0, 0.1, 0.5)), 2, 9.0).seconds
        == 4.0
    )


def test_a_round_that_asked_nobody_lasts_until_its_deadline() -> None:
    assert simulate_round([], 3, 5.0) == ([], (), 5.0, 0)
    assert simulate_round([], 3, None) == ([], (), 0.0, 0)


def test_who_finish_together_count_by_lot() -> None:
    # 2 of 4 equals in 400 rounds: each 200 times, standard deviation 10; and both have sent all
    counts = [0] * 4
    for r in range(400):
        equal = stints(
            Devices(up=(5.0,)), [ClientLoad(1, 0, 5)] * 4, *(draw_device(0, r, c) for c in range(4))
        )
        found = simulate_round(equal, 2, None)
        assert (found.seconds, found.bytes_up) == (1.0, 10)
        for client in found.cohort:
            counts[client] += 1
    assert all(160 < count < 240 for count in counts)


def test_over_selection_asks_a_share_more_rounded_up() -> None:
    # of 100: 7 more, not 8 for the sake of 7.000000000000001; of 3, 0.3 are 1 more
    assert count_requested(Federation(over_selection=1.07), 100, 999) == 107
    assert count_requested(Federation(over_selection=1.1), 3, 99) == 4
    assert count_requested(Federation(over_selection=10.0, unseen_clients=2), 3, 10) == 8
    assert len(sample_clients(Federation(cohort=4, over_selection=1.5), 10, 0)) == 6


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=6), st.floats(0.1, 50), st.integers(1, 6))
def test_a_round_takes_no_longer_for_asking_more_and_no_longer_than_its_deadline(
    speeds: list[float], deadline: float, wanted: int
) -> None:
    all_ = stints(Devices(steps_per_second=tuple(speeds)), [ClientLoad(5, 0, 0)] * len(speeds))
    whole, few = simulate_round(all_, wanted, None), simulate_round(all_[:wanted], wanted, None)
    assert whole.seconds <= few.seconds
    cut = simulate_round(all_, wanted, deadline)
    assert cut.seconds <= deadline
    assert set(cut.cohort) <= set(whole.cohort)


# ---- a buffer


def timed(*seconds: float) -> Any:
    """What becomes of clients that take so long, each at its turn."""

    def start(version: int, client: int, draw: int, now: float) -> RoundTrip:
        return RoundTrip(client, version, now + seconds[client], True, 0)

    return start


def told(trips: Sequence[RoundTrip]) -> list[tuple[int, int]]:
    return [(trip.client, trip.version) for trip in trips]


def test_a_buffer_fills_as_clients_finish_and_others_begin() -> None:
    # Two at work of three that take 1, 4 and 10 seconds, the first free one begins. 0 ends at 1 and
    # waits in the buffer, so 2 begins at 1; 1 ends at 4. From version 1: 0 begins at 4 and ends at
    # 5, 1 begins at 5 and ends at 9; 2 is at work still, until 11, on version 0.
    start = timed(1, 4, 10)
    first = fill_buffer(Queue(), 2, 2, lambda _: (0, 1, 2), partial(start, 0))
    assert told(first.buffer) == [(0, 0), (1, 0)]
    assert (first.queue.clock, first.started) == (4.0, 3)
    assert first.queue.trips == (RoundTrip(2, 0, 11.0, True, 0),)
    second = fill_buffer(first.queue, 2, 2, lambda _: (0, 1, 2), partial(start, 1))
    assert told(second.buffer) == [(0, 1), (1, 1)]
    assert (second.queue.clock, second.started) == (9.0, 2)
    assert second.queue.trips == first.queue.trips


def test_who_finish_together_are_taken_in_the_order_in_which_they_began() -> None:
    # 0 and 1 take 2 seconds, 2 takes none: 2 begins at 2, when 0 ends, and ends at once; but 1
    # ended then too, and began before it
    found = fill_buffer(Queue(), 3, 2, lambda _: (1, 0, 2), partial(timed(2, 2, 0), 0))
    assert told(found.buffer) == [(1, 0), (0, 0), (2, 0)]
    assert found.queue.clock == 2.0


def test_where_nobody_is_free_clients_are_drawn_again() -> None:
    # nobody is there in the first two draws, and only 1 from the third on
    found = fill_buffer(Queue(), 1, 2, lambda n: () if n < 2 else (1,), partial(timed(1, 3), 0))
    assert told(found.buffer) == [(1, 0)]
    assert (found.queue.clock, found.queue.draws, found.started) == (3.0, 3, 1)


def test_who_drops_out_makes_room_and_does_not_count() -> None:
    # 0 drops out after a second, and is drawn again, since nothing of it waits
    def start(client: int, draw: int, now: float) -> RoundTrip:
        return RoundTrip(client, 0, now + 1 + client, draw > 0 or client > 0, 7)

    found = fill_buffer(Queue(), 2, 2, lambda _: (0, 1), start)
    # 0: 0 to 1, dropped; 1 to 2, arrives; 1: 0 to 2, and it began before
    assert told(found.buffer) == [(1, 0), (0, 0)]
    assert told(found.dropped) == [(0, 0)]
    assert (found.queue.clock, found.started) == (2.0, 3)


def test_who_is_at_work_comes_back_from_the_servers_memory() -> None:
    trips = (RoundTrip(3, 12, 1 / 3, True, 2**40 + 1), RoundTrip(0, 11, 2.5, False, 0))
    for queue in (Queue(0.1, 7, trips), Queue(0.1, 7), Queue()):
        payload = encode_server_state(ServerState(9, {}, queue=queue))
        assert decode_server_state(9, payload) == ServerState(9, {}, queue=queue)


@given(st.lists(st.floats(0, 9), min_size=2, max_size=6), st.integers(1, 6), st.integers(1, 6))
def test_the_clock_never_goes_back_and_nobody_trains_twice_on_a_version(
    seconds: list[float], wanted: int, at_once: int
) -> None:
    clients = range(len(seconds))
    queue, seen = Queue(), set()
    for version in range(6):
        found = fill_buffer(
            queue,
            min(wanted, len(seconds)),
            min(at_once, len(seconds)),
            lambda _: clients,
            partial(timed(*seconds), version),
        )
        assert found.queue.clock >= queue.clock
        assert all(trip.end >= found.queue.clock for trip in found.queue.trips)
        assert not seen & set(told(found.buffer))
        seen |= set(told(found.buffer))
        queue = found.queue


# ---- whole federations on a line


def federated(
    values: Sequence[float],
    devices: Devices,
    algorithm: Algorithm = Algorithm(),  # noqa: B008
    state: ServerState | None = None,
    **plan: Any,
) -> tuple[list[Commit], list[Order]]:
    """Clients that hold a number each; a step goes half of the way to it."""
    shards = [line_shard(str(c), value) for c, value in enumerate(values)]
    job = Train(
        Clients(Line(), algorithm, shards, 0), Budget(9), lambda _: Recipe(partial(SGD, lr=0.5))
    )
    trained: list[Order] = []

    def engine(orders: Sequence[Order], job: Job) -> Iterator[Any]:
        trained.extend(orders)
        return run_serially(orders, job)

    federation = Federation(clients=len(values), **plan)
    start = state or algorithm.init({"w": torch.tensor(0.0)})
    done = list(rounds(start, algorithm, engine, job, federation, Roster(devices=devices)))
    return done, trained


def fedbuff(buffer: int, staleness: float = 0.5) -> Algorithm:
    return METHODS["fedbuff"].make(Method(buffer=buffer, staleness=staleness))


def w(done: Commit) -> float:
    return float(done.state.adapter["w"])


def test_who_comes_after_the_deadline_is_never_trained() -> None:
    # client 0 takes 1 second and client 1 takes 10: halfway to 4, then halfway from 2 to 4
    devices = Devices(steps_per_second=(1.0, 0.1))
    done, trained = federated([4, 8], devices, rounds=2, deadline=5.0)
    assert [w(each) for each in done] == [2.0, 3.0]
    assert [order.clients for order in trained] == [(0,), (0,)]
    assert [each.timing for each in done] == [Timing(5.0, (1,), 0), Timing(10.0, (1,), 0)]
    # both received the adapter
    assert [each.bytes_down for each in done] == [2 * SIZE] * 2


def test_more_than_the_cohort_are_asked_and_the_first_of_them_count() -> None:
    # all three are asked, 0 and 2 come first after 2 seconds: the mean of halfway to 4 and to 8
    devices = Devices(steps_per_second=(1.0, 0.1, 0.5))
    done, trained = federated([4, 99, 8], devices, rounds=1, cohort=2, over_selection=1.5)
    assert [order.clients for order in trained] == [(0,), (2,)]
    assert w(done[0]) == 3.0
    assert done[0].timing == Timing(2.0, (1,), 0)
    assert done[0].bytes_down == 3 * SIZE


def test_a_round_that_nobody_finishes_changes_nothing_but_the_time() -> None:
    devices = Devices(steps_per_second=(0.1,), up=(1e9,))
    for algorithm in (Algorithm(), METHODS["fedadam"].make(Method())):
        done, trained = federated([4, 8], devices, algorithm, rounds=2, deadline=5.0)
        assert [(w(each), each.updates, each.bytes_down) for each in done] == [
            (0.0, [], 2 * SIZE)
        ] * 2
        assert [each.state.queue.clock for each in done] == [5.0, 10.0]
        assert [each.state.round for each in done] == [1, 2]
        assert not trained


def test_a_model_of_its_own_takes_a_client_as_long_again() -> None:
    # one step a second: one batch for the shared model, and the same batch for its own
    for name, seconds in (("fedgen-edge", 1.0), ("ditto", 2.0)):
        devices, algorithm = Devices(steps_per_second=(1.0,)), METHODS[name].make(Method())
        done, _ = federated([4, 8], devices, algorithm, rounds=1)
        assert done[0].timing == Timing(seconds, (), 0)
        assert [update.steps for update in done[0].updates] == [1, 1]


def test_pooled_data_are_those_of_the_clients_that_count() -> None:
    # client 2 takes 10 seconds; of the others: to 2, then halfway to 8
    devices = Devices(steps_per_second=(1.0, 1.0, 0.1))
    pooled = METHODS["centralised"].make(Method())
    done, _ = federated([4, 8, 99], devices, pooled, rounds=1, deadline=5.0)
    assert w(done[0]) == 5.0
    assert done[0].timing == Timing(5.0, (2,), 0)


def test_devices_that_are_always_there_and_never_wait_change_nothing_bit_by_bit() -> None:
    values = [1.0, 2.0, 5.0, 7.0, 11.0]
    for name in ("fedgen-edge", "fedadam", "centralised", "fedbuff"):
        algorithm = METHODS[name].make(Method())
        plain, _ = federated(values, Devices(), algorithm, rounds=5, cohort=3)
        timed_, _ = federated(
            values, Devices(available=(1.0,), fails=(0.0,)), algorithm, rounds=5, cohort=3
        )
        assert [told_of(each) for each in timed_] == [told_of(each) for each in plain]
        assert [each.timing for each in plain] == [None] * 5
        assert [each.timing for each in timed_] == [Timing(0.0)] * 5


def told_of(done: Commit) -> tuple[Any, ...]:
    who = [(u.order.clients, u.order.round, u.loss, u.bytes_up) for u in done.updates]
    return w(done), who, done.bytes_down


def test_only_those_who_are_there_are_asked() -> None:
    plan, devices = Federation(seed=3, cohort=2), Devices(available=(0.3,))
    for r in range(50):
        there = [c for c in range(6) if is_available(devices, 3, r, c)]
        asked = sample_clients(plan, 6, r, devices=devices)
        assert set(asked) <= set(there)
        assert len(asked) == min(2, len(there))
        assert sorted(list_available(plan, 6, devices, r)) == there


def test_two_clients_of_unequal_speed_and_a_buffer_of_one() -> None:
    # 0 takes 1 second, 1 takes 2.5; each commit moves by half of the way, and counts 1 / (1 + s).
    #   1.0: (0, v0) 0 + 4/2 = 2
    #   2.0: (0, v1) 2 + 2/2 = 3
    #   2.5: (1, v0) half of 8 is 4, two commits behind: 3 + 4/3
    #   3.0: (0, v2) half of the way from 3 to 4, one behind: + 1/4
    devices = Devices(steps_per_second=(1.0, 0.4))
    done, trained = federated([4, 8], devices, fedbuff(1, 1.0), rounds=4)
    assert [(o.clients[0], o.round) for o in trained] == [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert [w(each) for each in done] == pytest.approx([2, 3, 13 / 3, 13 / 3 + 1 / 4])
    assert [each.timing for each in done] == [Timing(at) for at in (1.0, 2.0, 2.5, 3.0)]
    # two begin at first, and then one a commit
    assert [each.bytes_down for each in done] == [2 * SIZE, SIZE, SIZE, SIZE]
    # 1 works on version 3 and 0 on version 2 no more: of older ones none is kept but 1's
    kept = [sorted((v, *adapter) for v, adapter in each.state.versions.items()) for each in done]
    assert kept == [[(0, "w")], [(0, "w")], [(2, "w")], [(3, "w")]]


def test_a_stale_buffer_moves_the_server_less() -> None:
    # two updates of one example, to 4 and 8 from 0: mean of 2 and 4; one behind, by exponent 1,
    # each counts half, and the mean is of two still
    algorithm = fedbuff(2, 1.0)
    order = Order((0,), 0, {"w": torch.tensor(0.0)})
    updates = [
        Update(replace(order, clients=(c,)), {"w": torch.tensor(d)}, {}, 1.0, 0.0, 1, 0)
        for c, d in enumerate((2.0, 4.0))
    ]
    fresh = ServerState(0, {"w": torch.tensor(0.0)})
    assert float(algorithm.step(fresh, updates).adapter["w"]) == 3.0
    assert float(algorithm.step(replace(fresh, round=1), updates).adapter["w"]) == 1.5
    updates = [replace(updates[0], weight=3.0), replace(updates[1], order=replace(order, round=1))]
    # (3 * 2 / 2 + 1 * 4) / 4
    assert float(algorithm.step(replace(fresh, round=1), updates).adapter["w"]) == 1.75


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=6),
    st.integers(1, 3),
    st.floats(0, 3),
    st.floats(0.1, 9),
)
def test_with_equal_devices_the_first_commit_is_fedavgs_first_round(
    values: list[float], cohort: int, staleness: float, speed: float
) -> None:
    devices = Devices(steps_per_second=(speed,), up=(100.0,), available=(0.8,))
    plan: dict[str, Any] = {"rounds": 1, "cohort": cohort}
    (one,), _ = federated(values, devices, fedbuff(cohort, staleness), **plan)
    (other,), _ = federated(values, devices, **plan)
    if len(other.updates) == cohort:  # else it waits for those who come later
        assert [u.order for u in one.updates] == [u.order for u in other.updates]
        assert w(one) == w(other)
        assert one.timing == other.timing


SLOW = Devices(
    steps_per_second=(1.0, 0.3, 2.0), up=(50.0, 400.0), down=(900.0,), available=(0.8,),
    fails=(0.2, 0.0),
)  # fmt: skip


@pytest.mark.parametrize("name", ["fedgen-edge", "fedavgm", "fedbuff"])
def test_from_any_commit_on_the_clock_and_the_clients_are_the_same(name: str) -> None:
    plan: dict[str, Any] = {"rounds": 8, "cohort": 3, "over_selection": 1.5, "deadline": 9.0}
    algorithm, values = METHODS[name].make(Method(buffer=2)), [1.0, 2.0, 5.0, 7.0, 11.0]
    whole, _ = federated(values, SLOW, algorithm, **plan)
    clocks = [each.timing.clock for each in whole if each.timing]
    assert clocks == sorted(clocks)
    assert clocks[0] > 0
    assert any(each.timing.dropped for each in whole if each.timing)
    for at in (1, 4, 7):
        rest, _ = federated(values, SLOW, algorithm, whole[at - 1].state, **plan)
        assert [told_of(each) for each in rest] == [told_of(each) for each in whole[at:]]
        assert [each.timing for each in rest] == [each.timing for each in whole[at:]]


def test_a_federation_without_its_number_of_clients_says_which_setting_is_missing() -> None:
    with pytest.raises(
        ConfigError, match=r"^federation\.clients is missing, .*: set it to as many"
    ):
        cohort_size(Federation(), 0)
