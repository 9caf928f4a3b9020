"""Messages over Flower, in process: what a carrier makes of sites that fail, repeat or deceive."""

import time
from dataclasses import replace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge.errors import RefusedError
from fedgen_edge.network.flower.carrier import BYTES, FlowerCarrier, unwrap, wrap
from fedgen_edge.network.messages import (
    MAX_LINE_BYTES,
    Reply,
    Terms,
    WorkRequest,
    decode_message,
    encode_line,
)
from support.loop import InlineGrid

NAMES = {11: "north", 22: "south", 33: "west"}
WORK = WorkRequest("train", Terms("r", "s", "b"), 0, 0, 0, None, b"abc")


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def carrier(grid: InlineGrid) -> FlowerCarrier:
    return FlowerCarrier(grid, lambda: NAMES, poll=0.001)


def everyone(*payloads: bytes) -> dict[str, WorkRequest]:
    return {
        name: replace(WORK, client=i, payload=payloads[i % len(payloads)])
        for i, name in enumerate(NAMES.values())
    }


def test_each_site_is_asked_once_and_its_answer_comes_back_with_its_name() -> None:
    grid, work = InlineGrid(), everyone(b"one", b"two", b"three")
    replies = list(carrier(grid).exchange(work, 60.0))
    assert {r.site: decode_message(WorkRequest, r.line, r.payload) for r in replies} == work
    assert [r.failed for r in replies] == [None] * 3
    assert len(grid.sent) == 3


def test_those_who_are_present_are_named_in_order() -> None:
    assert carrier(InlineGrid()).present() == ["north", "south", "west"]


def test_equal_payloads_are_one_object_and_others_are_not() -> None:
    grid = InlineGrid()
    list(carrier(grid).exchange(everyone(b"same", b"same", b"other"), 60.0))
    records = [message.content["payload"] for message in grid.sent]
    assert records[0] is records[1]
    assert records[0] is not records[2]
    kinds = [type(o).__name__ for m in grid.sent for o in get_all_nested_objects(m).values()]
    assert kinds.count("Array") == 3  # one a message, of which two have the same id
    assert len({o for m in grid.sent for o in get_all_nested_objects(m)}) == 3 * 3 + 2 * 3


def test_a_message_lives_as_long_as_the_exchange_and_names_its_kind() -> None:
    grid = InlineGrid()
    list(carrier(grid).exchange({"west": WORK}, 7.5))
    (message,) = grid.sent
    assert (message.metadata.ttl, message.metadata.message_type) == (7.5, "query.train")
    assert message.metadata.dst_node_id == 33


def test_a_site_that_never_answers_ends_with_the_time_and_no_reply() -> None:
    grid = InlineGrid({22: lambda *_: []})
    started = time.monotonic()
    replies = list(carrier(grid).exchange(everyone(b""), 0.05))
    assert {r.site for r in replies} == {"north", "west"}
    assert 0.05 <= time.monotonic() - started < 30
    assert grid.pulls > 1


def test_a_reply_comes_as_soon_as_it_is_there_not_at_the_end() -> None:
    grid = InlineGrid({22: lambda *_: [], 33: lambda *_: []})
    replies = carrier(grid).exchange(everyone(b""), 3600.0)
    assert next(replies).site == "north"
    replies.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_what_comes_after_an_exchange_was_closed_is_never_brought() -> None:
    late: list[Message] = []
    grid = InlineGrid({22: lambda _, right: late.append(right) or []})
    replies = carrier(grid).exchange(everyone(b"old"), 3600.0)
    assert {next(replies).site, next(replies).site} == {"north", "west"}
    replies.close()  # pyright: ignore[reportAttributeAccessIssue]
    grid.faults = {}
    grid.replies += late
    again = list(carrier(grid).exchange(everyone(b"new"), 60.0))
    assert sorted(r.site for r in again) == ["north", "south", "west"]
    assert {r.payload for r in again} == {b"new"}


def test_an_error_is_its_message_s_site_s_whoever_reports_it() -> None:
    def unavailable(message: Message, right: Message) -> list[Message]:
        error = Message(Error(5, "Node Unavailable"), reply_to=message)
        error.metadata.__dict__["_src_node_id"] = 1
        return [error]

    replies = list(carrier(InlineGrid({22: unavailable})).exchange(everyone(b""), 60.0))
    failed = {r.site: r.failed for r in replies}
    assert failed.pop("south") == "Node Unavailable (Flower's error 5)"
    assert failed == {"north": None, "west": None}


def test_a_reason_that_a_site_wrote_is_one_short_line() -> None:
    def shouts(message: Message, right: Message) -> list[Message]:
        return [Message(Error(2, "a\n\x1b[31m" + "b" * 10_000), reply_to=message)]

    (reply,) = carrier(InlineGrid({22: shouts})).exchange({"south": WORK}, 60.0)
    assert reply.failed is not None
    assert reply.failed.startswith("a[31mbbb")
    assert len(reply.failed) == 300


def test_a_reply_that_comes_twice_counts_once() -> None:
    grid = InlineGrid({22: lambda _, right: [right, right]})
    replies = list(carrier(grid).exchange(everyone(b""), 60.0))
    assert sorted(r.site for r in replies) == ["north", "south", "west"]


def test_a_reply_to_something_else_is_nobody_s() -> None:
    def elsewhere(_: Message, right: Message) -> list[Message]:
        right.metadata.__dict__["_reply_to_message_id"] = "f" * 64
        return [right]

    grid = InlineGrid({22: elsewhere})
    # A grid that brings what was not asked for.
    grid.pull_messages = lambda _: iter([grid.replies.pop()] if grid.replies else [])
    replies = list(carrier(grid).exchange(everyone(b""), 0.05))
    assert {r.site for r in replies} == {"north", "west"}


def test_sites_that_cannot_be_reached_are_told_of_at_once() -> None:
    grid = InlineGrid()
    grid.refused = {22}
    replies = list(carrier(grid).exchange({**everyone(b""), "moon": WORK}, 3600.0))
    failed = {r.site for r in replies if r.failed}
    assert failed == {"south", "moon"}
    assert len(replies) == 4


def test_nobody_to_ask_is_nothing_to_wait_for() -> None:
    assert list(carrier(InlineGrid()).exchange({}, 3600.0)) == []


def test_a_message_is_carried_whole() -> None:
    assert unwrap(wrap(encode_line(WORK), WORK.payload)) == (encode_line(WORK), b"abc")


@settings(max_examples=20)
@given(st.text(max_size=50), st.binary(max_size=50))
def test_any_line_and_payload_come_back(said: str, payload: bytes) -> None:
    assert unwrap(wrap(said, payload)) == (said, payload)


def flat(payload: bytes = b"abc", **changed: object) -> ArrayRecord:
    how = {"dtype": "uint8", "shape": (3,), "stype": BYTES, "data": payload, **changed}
    return ArrayRecord({"bytes": Array(**how)})  # pyright: ignore[reportArgumentType]


SAID = ConfigRecord({"line": "{}"})
HUGE = ConfigRecord({"line": "x" * (MAX_LINE_BYTES + 1)})
ONE = flat()["bytes"]
HOSTILE = {
    "nothing": RecordDict(),
    "no line": RecordDict({"payload": flat()}),
    "no payload": RecordDict({"said": SAID}),
    "more records": RecordDict({"said": SAID, "payload": flat(), "more": SAID}),
    "records swapped": RecordDict({"said": flat(), "payload": SAID}),
    "numbers for a line": RecordDict({"said": MetricRecord({"line": 1}), "payload": flat()}),
    "bytes for a line": RecordDict({"said": ConfigRecord({"line": b"{}"}), "payload": flat()}),
    "two lines": RecordDict({"said": ConfigRecord({"line": "", "b": ""}), "payload": flat()}),
    "a huge line": RecordDict({"said": HUGE, "payload": flat()}),
    "no array": RecordDict({"said": SAID, "payload": ArrayRecord()}),
    "two arrays": RecordDict({"said": SAID, "payload": ArrayRecord({"bytes": ONE, "b": ONE})}),
    "an array of another name": RecordDict({"said": SAID, "payload": ArrayRecord({"b": ONE})}),
    "another dtype": RecordDict({"said": SAID, "payload": flat(dtype="float32")}),
    "another way to read it": RecordDict({"said": SAID, "payload": flat(stype="numpy.ndarray")}),
    "another shape": RecordDict({"said": SAID, "payload": flat(shape=(3, 1))}),
    "another length": RecordDict({"said": SAID, "payload": flat(shape=(2**60,))}),
}  # fmt: skip


@pytest.mark.parametrize("form", HOSTILE)
def test_a_message_of_another_form_is_refused(form: str) -> None:
    with pytest.raises(RefusedError, match=r"malformed|line-too-long"):
        unwrap(HOSTILE[form])


@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_reply_fails_its_site_and_no_other(form: str) -> None:
    def deceives(message: Message, _: Message) -> list[Message]:
        return [Message(HOSTILE[form], reply_to=message)]

    replies = list(carrier(InlineGrid({22: deceives})).exchange(everyone(b"x"), 60.0))
    south = next(r for r in replies if r.site == "south")
    assert south == Reply("south", "", b"", south.failed)
    assert south.failed
    assert {r.payload for r in replies if r.failed is None} == {b"x"}
    assert len(replies) == 3
