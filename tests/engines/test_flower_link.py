"""Replies that a site makes by hand: fetched bit by bit, measured, and never trusted."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity

from fedgen_edge.engines.flower import BYTES, unwrap, wrap
from fedgen_edge.engines.flower_client import Server
from fedgen_edge.engines.flower_link import Link, expanded

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
    grid = SimpleNamespace(
        _runtime_client=shelf,
        node=Node(node_id=1),
        push_messages=lambda messages: [each.metadata.message_id for each in messages],
    )
    pulse = SimpleNamespace(check=lambda: None)
    new: Callable[..., Link] = getattr(Link, "__wrapped__", Link)
    made = object.__new__(Link)
    del new
    made.__dict__.update(
        _grid=grid, _server=Server("here", None, 0.0), _pulse=pulse, _largest=LARGEST
    )
    made.__dict__.update(_open=set(), _coming=[])
    made.push_messages([asked()])
    return made


def asked(name: str = ASKED) -> Message:
    message = Message(wrap("?", b""), 7, "query.train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = name
    return message


def reply(content: RecordDict) -> Message:
    return Message(content, reply_to=asked())
