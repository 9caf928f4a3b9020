"""Carries messages over Flower: work to sites, and their answers back.

A message of Flower's holds two records here: the line of JSON, and one flat array, the payload.
"""

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import fedgen_edge.network.flower.version  # noqa: F401 - says which Flower is needed

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedgen_edge.errors import RefusedError
from fedgen_edge.network.messages import MAX_LINE_BYTES, Reply, WorkRequest, encode_line

BYTES = "fedgen-edge.bytes"
"""How an array's data are to be read: as they are."""


def wrap(text: str, payload: bytes) -> RecordDict:
    """A line and a payload as Flower's records."""
    return _make_records(text, _pack_payload(payload))


def unwrap(content: RecordDict) -> tuple[str, bytes]:
    """The line and the payload in Flower's records.

    Raises:
        RefusedError: they are not as `wrap` makes them.
    """
    line_record, payload_record = content.get("said"), content.get("payload")
    if not isinstance(line_record, ConfigRecord) or not isinstance(payload_record, ArrayRecord):
        raise RefusedError("malformed", "the message lacks its line or its payload")
    text, array = line_record.get("line"), payload_record.get("bytes")
    if (len(content), len(line_record), len(payload_record)) != (2, 1, 1):
        raise RefusedError("malformed", "the message holds more than a line and a payload")
    if not isinstance(text, str) or not isinstance(array, Array):
        raise RefusedError("malformed", "the message's line or payload is of another kind")
    if len(text) > MAX_LINE_BYTES:
        raise RefusedError(
            "line-too-long", f"the message's line is longer than {MAX_LINE_BYTES} bytes"
        )
    if (array.dtype, array.stype, array.shape) != ("uint8", BYTES, (len(array.data),)):
        raise RefusedError("malformed", "the message's payload is not a flat array of bytes")
    return text, array.data


@runtime_checkable
class MessageGrid(Protocol):
    """What of a Flower `Grid` carries messages."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; the id of each, in order, and none or an empty one for what could not be sent."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these that have come, each brought once."""
        ...


@dataclass(frozen=True)
class FlowerCarrier:
    """The `exchange.Carrier` that Flower is."""

    grid: MessageGrid
    find_online_nodes: Callable[[], Mapping[int, str]]
    """The nodes that could be asked now, and the name of each one's site."""
    poll: float = 0.25
    """Seconds between two looks for replies."""

    def present(self) -> list[str]:
        """Names of the sites that could be asked now, sorted."""
        return sorted(self.find_online_nodes().values())

    def exchange(self, work: Mapping[str, WorkRequest], seconds: float) -> Generator[Reply]:
        """Ask each site; yield replies as they come, until all have, or time is up.

        Closing the iterator gives up the others. What comes late is never brought.

        Raises:
            CarrierError: Flower's server is away for long, or has given the run up.
        """
        deadline = time.monotonic() + seconds
        waiting = self._send_work(work, seconds)
        for site in sorted(work.keys() - waiting.values()):
            yield Reply(site, "", b"", failed="it could not be asked: it is away")
        while waiting:
            messages = self.grid.pull_messages(list(waiting))
            seconds_left = deadline - time.monotonic()
            for message in messages:
                # An error says which message failed; its sender is Flower's server, not the site.
                site = waiting.pop(message.metadata.reply_to_message_id, None)
                # Once time is up, Flower's server says of each message that its time is up.
                if site is not None and (seconds_left > 0 or message.has_content()):
                    yield _make_reply(site, message)
            if seconds_left <= 0:
                return
            time.sleep(min(self.poll, seconds_left) if waiting else 0)

    def _send_work(self, work: Mapping[str, WorkRequest], seconds: float) -> dict[str, str]:
        """Send all that can be; the site of each message by its id."""
        nodes = {site: node for node, site in self.find_online_nodes().items() if site in work}
        # A payload that several have is one record, which Flower uploads once.
        records = {id(each.payload): _pack_payload(each.payload) for each in work.values()}
        messages = [
            Message(
                _make_records(encode_line(work[site]), records[id(work[site].payload)]),
                node,
                f"query.{work[site].kind}",
                ttl=float(seconds),
            )
            for site, node in nodes.items()
        ]
        ids = self.grid.push_messages(messages) if messages else []
        return {sent: site for sent, site in zip(ids, nodes, strict=False) if sent}


def _pack_payload(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array("uint8", (len(payload),), BYTES, payload)})


def _make_records(text: str, payload_record: ArrayRecord) -> RecordDict:
    return RecordDict({"said": ConfigRecord({"line": text}), "payload": payload_record})


def _make_reply(site: str, message: Message) -> Reply:
    if message.has_error():
        reason = (
            f"{message.error.reason or 'no reason given'} (Flower's error {message.error.code})"
        )
        # A site may have written the reason.
        return Reply(site, "", b"", failed="".join(filter(str.isprintable, reason))[:300])
    if not message.has_content():
        return Reply(site, "", b"", failed="malformed: the message is empty")
    try:
        text, payload = unwrap(message.content)
    except RefusedError as error:
        return Reply(site, "", b"", failed=str(error))
    return Reply(site, text, payload)
