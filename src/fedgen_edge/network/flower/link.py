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

import fedgen_edge.network.flower.version  # noqa: F401 - says which Flower is needed

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

from fedgen_edge.network.flower.http import FlowerServer, Heartbeat

FETCH_SECONDS = 1.0
"""Seconds that one look for replies may fetch for."""
MAX_OBJECT_BYTES = 2**20
"""Bytes of an object of a reply, at most, but for chunks of the payload."""
LOST, MALFORMED = 4, 0
"""Flower's codes of an error: a reply that is no more, and any other."""


@dataclass
class IncomingReply:
    """A reply that is being fetched."""

    head: Message
    """Without its content; what it says of itself, Flower's server has checked."""
    missing_ids: list[str]
    """Ids of its objects that are still to be fetched."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Its objects that are here, by their ids."""

    @property
    def request_id(self) -> str:
        """Id of the message that it replies to."""
        return self.head.metadata.reply_to_message_id

    def assemble(self, max_bytes: int) -> Message:
        """The message, or an error in its place."""
        try:
            if count_expanded_bytes(self.objects) > max_bytes:
                return self.make_error(f"the message is longer than {max_bytes} bytes", MALFORMED)
            message = inflate_object_from_contents(self.head.metadata.message_id, self.objects)
            content = message.content if isinstance(message, Message) else None
        except Exception as error:  # whatever a hostile site may have thought of
            return self.make_error(f"the message cannot be read: {type(error).__name__}", MALFORMED)
        if not isinstance(content, RecordDict):
            return self.make_error("the message has no content", MALFORMED)
        return make_message(self.head.metadata, content)

    def make_error(self, reason: str, code: int) -> Message:
        """An error in the message's place."""
        return make_message(self.head.metadata, error=Error(code, reason))


def count_expanded_bytes(objects: Mapping[str, bytes]) -> int:
    """Bytes that the arrays among objects have once put together: one may repeat a chunk.

    Raises:
        ValueError: an object that holds no payload is as long as if it did.
    """
    total = 0
    for content in objects.values():
        kind, chunk_ids, _ = get_object_head_values_from_object_content(content)
        if kind != ArrayChunk.__qualname__ and len(content) > MAX_OBJECT_BYTES:
            raise ValueError(kind)
        if kind == Array.__qualname__:
            chunk_places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(objects[chunk_ids[place]]) for place in chunk_places)
    return total


class Link:
    """A run at Flower's server; what `flower.FlowerCarrier` sends and fetches by."""

    def __init__(
        self, grid: HttpGrid, server: FlowerServer, heartbeat: Heartbeat, max_bytes: int
    ) -> None:
        """A run that is begun.

        Args:
            grid: Flower's own, connected, for sending.
            server: where it is connected to.
            heartbeat: keeps its task alive.
            max_bytes: bytes of a reply, at most.
        """
        self._grid, self._server, self._heartbeat = grid, server, heartbeat
        self._max_bytes = max_bytes
        self._pending_ids: set[str] = set()
        self._incoming: list[IncomingReply] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; the id of each, in order, and none or an empty one for what could not be sent.

        Raises:
            CarrierError: the server is away for long, or has given the run up.
        """
        self._heartbeat.check()
        with self._server.translate_errors():
            ids = list(self._grid.push_messages(list(messages)))
        self._pending_ids.update(each for each in ids if each)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these that have come whole; those that nobody waits for are dropped.

        Raises:
            CarrierError: the server is away for long, or has given the run up.
        """
        self._heartbeat.check()
        wanted = set(message_ids)
        with self._server.translate_errors():
            self._poll_replies()
            for abandoned in [each for each in self._incoming if each.request_id not in wanted]:
                self._confirm_receipt(abandoned)
            return self._fetch_replies(time.monotonic() + FETCH_SECONDS)

    def _poll_replies(self) -> None:
        # All that are open are asked for, so that the server keeps nothing of the abandoned ones.
        request = PullAppMessagesRequest(message_ids=self._pending_ids)
        pulled = self._grid._runtime_client.PullMessages(request)
        for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            head = message_from_proto(proto)
            object_ids = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
            incoming = IncomingReply(head, object_ids)
            self._incoming.append(incoming)
            # The server brings each once, and forgets what was asked.
            self._pending_ids.discard(incoming.request_id)

    def _fetch_replies(self, deadline: float) -> list[Message]:
        complete = []
        for incoming in list(self._incoming):
            message = self._fetch_reply(incoming, deadline)
            if message is not None:
                self._confirm_receipt(incoming)
                complete.append(message)
        return complete

    def _fetch_reply(self, incoming: IncomingReply, deadline: float) -> Message | None:
        """Get on with a reply; nothing while it is not whole."""
        if incoming.head.has_error():
            return incoming.head
        # A payload comes in chunks of some MB; more objects than that are no message of ours.
        if len(incoming.missing_ids) + len(incoming.objects) > 16 + self._max_bytes // 2**20:
            return incoming.make_error("the message is in too many parts", MALFORMED)
        while incoming.missing_ids and time.monotonic() < deadline:
            pulled = self._grid._runtime_client.PullObject(
                PullObjectRequest(
                    node=self._grid.node,
                    run_id=incoming.head.metadata.run_id,
                    object_id=incoming.missing_ids[0],
                )
            )
            if not pulled.object_found:
                return incoming.make_error("the message was not sent to its end", LOST)
            if not pulled.object_available:
                return None
            incoming.objects[incoming.missing_ids.pop(0)] = pulled.object_content
            if sum(map(len, incoming.objects.values())) > self._max_bytes:
                return incoming.make_error(
                    f"the message is longer than {self._max_bytes} bytes", MALFORMED
                )
        return None if incoming.missing_ids else incoming.assemble(self._max_bytes)

    def _confirm_receipt(self, incoming: IncomingReply) -> None:
        self._incoming.remove(incoming)
        self._grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node,
                run_id=incoming.head.metadata.run_id,
                message_object_id=incoming.head.metadata.message_id,
            )
        )
