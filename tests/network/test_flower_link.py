"""Replies that a site makes by hand: fetched bit by bit, measured, and never trusted."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedgen_edge.network.flower.carrier import BYTES, unwrap, wrap
from fedgen_edge.network.flower.http import FlowerServer, Heartbeat
from fedgen_edge.network.flower.link import Link, count_expanded_bytes

ASKED = "a" * 64
LARGEST = 2**20


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@dataclass
class Shelf:
    """What a SuperLink holds of replies; objects that are None have not come yet."""

    replies: list[tuple[Message, ObjectTree]] = field(default_factory=list)
    objects: dict[str, bytes | None] = field(default_factory=dict)
    asked: list[set[str]] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)

    def put(self, reply: Message) -> dict[str, bytes | None]:
        """Lay a reply down; its objects, by their ids."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.replies.append((reply, get_object_tree(reply)))
        made = {key: each.deflate() for key, each in get_all_nested_objects(reply).items()}
        self.objects.update(made)
        return self.objects

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        self.asked.append(set(request.message_ids))
        given, self.replies = self.replies, []
        heads = [message_to_proto(remove_content_from_message(reply)) for reply, _ in given]
        return PullAppMessagesResponse(
            messages_list=heads, message_object_trees=[tree for _, tree in given]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        found = request.object_id in self.objects
        content = self.objects.get(request.object_id)
        return PullObjectResponse(
            object_found=found, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def link(shelf: Shelf) -> Link:
    """A link that waits for what was asked."""
    grid = HttpGrid("nowhere", token="none")
    grid._client = shelf  # pyright: ignore[reportAttributeAccessIssue]
    server = FlowerServer("nowhere", None, 0.0)
    made = Link(grid, server, Heartbeat(server, "none"), LARGEST)
    made._pending_ids.add(ASKED)
    return made


def reply(content: RecordDict | Error) -> Message:
    """A site's reply to what was asked."""
    message = Message(wrap("?", b""), 7, "query.train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = ASKED
    return Message(content, reply_to=message)  # pyright: ignore[reportCallIssue, reportArgumentType]


def failure(shelf: Shelf, made: Link | None = None) -> str:
    """Why the one reply on a shelf failed."""
    (found,) = (made or link(shelf)).pull_messages([ASKED])
    assert found.metadata.reply_to_message_id == ASKED
    assert shelf.confirmed == [found.metadata.message_id]
    return found.error.reason or ""


def test_a_reply_comes_whole_and_once() -> None:
    shelf = Shelf()
    shelf.put(reply(wrap("said", b"payload")))
    made = link(shelf)
    (found,) = made.pull_messages([ASKED])
    assert unwrap(found.content) == ("said", b"payload")
    assert found.metadata.reply_to_message_id == ASKED
    assert made.pull_messages([ASKED]) == []
    assert shelf.asked == [{ASKED}, set()]
    assert shelf.confirmed == [found.metadata.message_id]


@pytest.mark.parametrize("place", range(6))
def test_a_reply_that_is_not_whole_is_not_waited_for(place: int) -> None:
    shelf = Shelf()
    objects = shelf.put(reply(wrap("said", b"payload")))
    assert len(objects) == 6  # message, records, line, array's record, array and chunk
    late = list(objects)[place]
    content, objects[late] = objects[late], None
    made = link(shelf)
    assert made.pull_messages([ASKED]) == []
    assert made.pull_messages([ASKED]) == []
    assert shelf.asked == [{ASKED}, set()]
    objects[late] = content
    (found,) = made.pull_messages([ASKED])
    assert unwrap(found.content) == ("said", b"payload")


def test_a_reply_that_never_gets_whole_is_a_failure_of_its_own() -> None:
    shelf = Shelf()
    objects = shelf.put(reply(wrap("said", b"payload")))
    del objects[list(objects)[2]]
    assert failure(shelf) == "the message was not sent to its end"


def test_a_reply_that_nobody_waits_for_is_dropped_unfetched() -> None:
    shelf = Shelf()
    shelf.put(reply(wrap("said", b"payload")))
    shelf.objects.clear()
    made = link(shelf)
    assert made.pull_messages(["b" * 64]) == []
    assert len(shelf.confirmed) == 1
    assert made.pull_messages([ASKED]) == []


def test_an_error_is_brought_without_fetching() -> None:
    shelf = Shelf()
    shelf.put(reply(Error(2, "ValueError")))
    shelf.objects.clear()
    assert failure(shelf) == "ValueError"


def test_whom_a_reply_answers_is_what_the_server_checked_not_what_the_site_wrote() -> None:
    shelf, sent = Shelf(), reply(wrap("said", b""))
    sent.metadata.__dict__["_reply_to_message_id"] = "f" * 64
    shelf.put(sent)
    sent.metadata.__dict__["_reply_to_message_id"] = ASKED
    (found,) = link(shelf).pull_messages([ASKED])
    assert found.metadata.reply_to_message_id == ASKED


@pytest.mark.parametrize(
    "junk", [b"", b"junk", b"Array 0 0\x00{}", b"\xff" * 99, b"Message  0\x00"]
)
@pytest.mark.parametrize("place", range(6))
def test_no_object_can_raise(place: int, junk: bytes) -> None:
    shelf = Shelf()
    objects = shelf.put(reply(wrap("said", b"payload")))
    objects[list(objects)[place]] = junk
    assert failure(shelf).startswith(("the message cannot be read", "the message has no content"))


def repeating(array: Array, times: int) -> bytes:
    """The array's object, saying that its one chunk comes so many times."""
    body = {"dtype": "uint8", "shape": [1], "stype": BYTES, "arraychunk_ids": [0] * times}
    return add_header_to_object_body(json.dumps(body).encode(), array)


def test_an_array_is_as_long_as_its_chunks_however_often_they_come() -> None:
    array = Array("uint8", (1000,), BYTES, b"x" * 1000)
    ((key, chunk),) = array.slice_array()
    content = chunk.deflate()
    assert count_expanded_bytes({key: content, "array": array.deflate()}) == len(content)
    assert count_expanded_bytes({key: content, "array": repeating(array, 70)}) == 70 * len(content)


def test_an_array_that_would_fill_the_memory_is_not_made() -> None:
    shelf, array = Shelf(), Array("uint8", (2**19,), BYTES, b"x" * 2**19)
    objects = shelf.put(reply(RecordDict({"payload": ArrayRecord({"bytes": array})})))
    objects[array.object_id] = repeating(array, 100_000)  # 50 GB
    assert failure(shelf) == f"the message is longer than {LARGEST} bytes"


def test_what_is_no_payload_may_not_be_long() -> None:
    shelf = Shelf()
    shelf.put(reply(wrap("x" * (LARGEST - 2000), b"")))
    (found,) = link(shelf).pull_messages([ASKED])
    assert found.has_content()
    shelf = Shelf()
    shelf.put(reply(wrap("x" * LARGEST, b"")))
    made = link(shelf)
    made._max_bytes = 2 * LARGEST
    assert failure(shelf, made) == "the message cannot be read: ValueError"


def test_a_payload_may_be_as_long_as_was_agreed_and_no_longer() -> None:
    shelf = Shelf()
    shelf.put(reply(wrap("said", b"x" * (LARGEST - 2000))))
    (found,) = link(shelf).pull_messages([ASKED])
    assert len(unwrap(found.content)[1]) == LARGEST - 2000
    shelf = Shelf()
    shelf.put(reply(wrap("said", b"x" * LARGEST)))
    assert failure(shelf) == f"the message is longer than {LARGEST} bytes"


def test_a_reply_in_many_parts_is_not_fetched() -> None:
    shelf = Shelf()
    shelf.put(reply(RecordDict({str(i): ConfigRecord({"i": i}) for i in range(50)})))
    shelf.objects.clear()
    assert failure(shelf) == "the message is in too many parts"
