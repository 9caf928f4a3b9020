"""The server's end of a run: sends messages, and fetches replies bit by bit.

Flower's own fetching trusts what sites send. It waits for a reply that never comes whole, up to two
hours; it fails with the one that cannot be read, and loses those that came with it; and it makes an
array as long as its sender says. So here each reply is fetched apart, without waiting, and measured
before it is put together.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import fedgen_edge.engines.flower_guard  # noqa: F401 - says which Flower is needed

# isort: split
from flwr.app import Array, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import HttpGrid

from fedgen_edge.engines.flower_client import Pulse, Server

SPELL = 1.0
"""Seconds that one look for replies may fetch for."""
SMALL = 2**20
"""Bytes of an object of a reply, at most, but for chunks of the payload."""
LOST, MALFORMED = 4, 0
"""Flower's codes of an error: a reply that is no more, and any other."""


@dataclass
class Coming:
    """A reply that is being fetched."""

    head: Message
    """Without its content; what it says of itself, Flower's server has checked."""
    missing: list[str]
    """Ids of its objects that are still to be fetched."""
    held: dict[str, bytes] = field(default_factory=dict)
    """Its objects that are here, by their ids."""

    @property
    def answers(self) -> str:
        """Id of the message that it replies to."""
        return self.head.metadata.reply_to_message_id

    def whole(self, largest: int) -> Message:
        """The message, or an error in its place."""
        try:
            if expanded(self.held) > largest:
                return self.failed(f"the message is longer than {largest} bytes", MALFORMED)
            made = inflate_object_from_contents(self.head.metadata.message_id, self.held)
            content = made.content if isinstance(made, Message) else None
        except Exception as error:  # whatever a hostile site may have thought of
            return self.failed(f"the message cannot be read: {type(error).__name__}", MALFORMED)
        if not isinstance(content, RecordDict):
            return self.failed("the message has no content", MALFORMED)
        return make_message(self.head.metadata, content)

    def failed(self, why: str, code: int) -> Message:
        """An error in the message's place."""
        return make_message(self.head.metadata, error=Error(code, why))


def expanded(held: Mapping[str, bytes]) -> int:
    """Bytes that the arrays among objects have once put together: one may repeat a chunk.

    Raises:
        ValueError: an object that holds no payload is as long as if it did.
    """
    total = 0
    for content in held.values():
        kind, parts, _ = get_object_head_values_from_object_content(content)
        if kind != ArrayChunk.__qualname__ and len(content) > SMALL:
            raise ValueError(kind)
        if kind == Array.__qualname__:
            order = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(held[parts[place]]) for place in order)
    return total


class Link:
    """A run at Flower's server; what `flower.FlowerCarrier` sends and fetches by."""

    def __init__(self, grid: HttpGrid, server: Server, pulse: Pulse, largest: int) -> None:
        """A run that is begun.

        Args:
            grid: Flower's own, connected, for sending.
            server: where it is connected to.
            pulse: keeps its task alive.
            largest: bytes of a reply, at most.
        """
        self._grid, self._server, self._pulse = grid, server, pulse
        self._largest = largest
        self._open: set[str] = set()
        self._coming: list[Coming] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; the id of each, in order, and none or an empty one for what could not be sent.

        Raises:
            CarrierError: the server is away for long, or has given the run up.
        """
        self._pulse.check()
        with self._server.asked():
            ids = list(self._grid.push_messages(list(messages)))
        self._open.update(each for each in ids if each)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these that have come whole; those that nobody waits for are dropped.

        Raises:
            CarrierError: the server is away for long, or has given the run up.
        """
        self._pulse.check()
        wanted = set(message_ids)
        with self._server.asked():
            self._look()
            for late in [each for each in self._coming if each.answers not in wanted]:
                self._done(late)
            return self._fetched(time.monotonic() + SPELL)

    def _look(self) -> None:
        # All that are open are asked for, so that the server keeps nothing of the abandoned ones.
        request = PullAppMessagesRequest(message_ids=self._open)
        found = self._grid._runtime_client.PullMessages(request)
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            head = message_from_proto(proto)
            parts = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
            coming = Coming(head, parts)
            self._coming.append(coming)
            # The server brings each once, and forgets what was asked.
            self._open.discard(coming.answers)

    def _fetched(self, until: float) -> list[Message]:
        whole = []
        for coming in list(self._coming):
            message = self._fetch(coming, until)
            if message is not None:
                self._done(coming)
                whole.append(message)
        return whole

    def _fetch(self, coming: Coming, until: float) -> Message | None:
        """Get on with a reply; nothing while it is not whole."""
        if coming.head.has_error():
            return coming.head
        # A payload comes in chunks of some MB; more objects than that are no message of ours.
        if len(coming.missing) + len(coming.held) > 16 + self._largest // 2**20:
            return coming.failed("the message is in too many parts", MALFORMED)
        while coming.missing and time.monotonic() < until:
            found = self._grid._runtime_client.PullObject(
                PullObjectRequest(
                    node=self._grid.node,
                    run_id=coming.head.metadata.run_id,
                    object_id=coming.missing[0],
                )
            )
            if not found.object_found:
                return coming.failed("the message was not sent to its end", LOST)
            if not found.object_available:
                return None
            coming.held[coming.missing.pop(0)] = found.object_content
            if sum(map(len, coming.held.values())) > self._largest:
                return coming.failed(f"the message is longer than {self._largest} bytes", MALFORMED)
        return None if coming.missing else coming.whole(self._largest)

    def _done(self, coming: Coming) -> None:
        self._coming.remove(coming)
        self._grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node,
                run_id=coming.head.metadata.run_id,
                message_object_id=coming.head.metadata.message_id,
            )
        )
