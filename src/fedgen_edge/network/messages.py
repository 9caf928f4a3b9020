"""What a server and a site say to each other, whatever carries it: work, an answer, and a carrier.

A message is a line of JSON and one flat buffer: a safetensors file, whose header is its manifest.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedgen_edge.errors import RefusedError

PROTOCOL = 2
"""Raised by every change of what the messages mean."""
MAX_LINE_BYTES = 64 * 1024
"""Bytes of a message's line of JSON, at most."""
STRICT = ConfigDict(extra="forbid", strict=True)

WorkKind = Literal["join", "train", "evaluate", "personalise"]


@dataclass(frozen=True, config=STRICT)
class Terms:
    """What both sides must hold equal, said in every message; but for `versions`."""

    run: str
    """Name of the run: 32 random hexadecimal digits."""
    recipe: str
    """SHA-256 of the settings that all share."""
    backbone: str
    """SHA-256 of the frozen weights."""
    protocol: int = PROTOCOL
    drawn: str = ""
    """SHA-256 of the leaves that each machine draws for itself: `build.drawn`."""
    versions: str = ""
    """Of what runs at the server; they may differ, and are told where something else does."""


@dataclass(frozen=True, config=STRICT)
class WorkRequest:
    """What the server asks of one site."""

    kind: WorkKind
    terms: Terms
    client: int
    """The site's number, by which its randomness goes."""
    round: int
    """Counted from 0: rounds committed so far."""
    attempt: int
    """Counted from 0 in each round."""
    accepted: str | None
    """SHA-256 of the site's last payload that counts: only now may it keep what came with it."""
    payload: bytes = b""
    """Leaves of the global adapter, encoded; nothing where the work needs none."""


@dataclass(frozen=True, config=STRICT)
class Answer:
    """What a site says of some work; who it is comes from the carrier."""

    kind: WorkKind
    terms: Terms
    round: int
    attempt: int
    base: str
    """SHA-256 of the payload that it worked from."""
    said: dict[str, Any]
    """Numbers: of training, `weight`, `loss`, `steps`, and `cluster` where there are some; of an
    evaluation, its sums. `lost` is true where a site lacks what it kept with its last payload."""
    refused: str | None = None
    """Why the site did not do it: a stable code, with `reason` in what it said."""
    payload: bytes = b""
    """The change of the leaves that are shared, encoded."""


@dataclass(frozen=True)
class Reply:
    """What a carrier brought back from one site."""

    site: str
    """Name, by the key that it holds."""
    line: str
    """The answer as JSON, not read yet: whoever sent it may be hostile."""
    payload: bytes
    failed: str | None = None
    """What the carrier says went wrong, where no answer came."""


Handler = Callable[[str, bytes], tuple[str, bytes]]
"""Makes an answer of some work: line and payload, both ways."""


@runtime_checkable
class Carrier(Protocol):
    """Brings work to sites and answers back; Flower is one, and a test's loop another."""

    def present(self) -> list[str]:
        """Names of the sites that could be asked now, sorted."""
        ...

    def exchange(self, work: Mapping[str, WorkRequest], seconds: float) -> Generator[Reply]:
        """Ask each site; yield replies as they come, until all have, or time is up.

        Closing the iterator gives up the others. What comes late is never brought.
        """
        ...


Message = TypeVar("Message", WorkRequest, Answer)


def encode_line(message: WorkRequest | Answer) -> str:
    """The message as JSON, its payload apart."""
    return TypeAdapter(type(message)).dump_json(message, exclude={"payload"}).decode()


def decode_message(kind: type[Message], text: str, payload: bytes) -> Message:
    """The message that a line and a payload are.

    Raises:
        RefusedError: it is too long, of another protocol, or not of this form.
    """
    if len(text) > MAX_LINE_BYTES:
        raise RefusedError(
            "line-too-long", f"the message's line is longer than {MAX_LINE_BYTES} bytes"
        )
    try:
        protocol = json.loads(text)["terms"]["protocol"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RefusedError("malformed", "the message's line cannot be read") from None
    if protocol != PROTOCOL:
        raise RefusedError(
            "wrong-protocol",
            f"it speaks protocol {str(protocol)[:20]!r}, and this is protocol {PROTOCOL}: install "
            "the same version of fedgen-edge on both sides",
        )
    try:
        return replace(TypeAdapter(kind).validate_json(text), payload=payload)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        location = ascii(".".join(str(part) for part in first["loc"])[:60])[1:-1]
        raise RefusedError("malformed", f"the message's {location}: {first['msg'][:100]}") from None


def digest(payload: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(payload).hexdigest()


def make_refusal(work: WorkRequest, code: str, reason: str) -> Answer:
    """What a site says that did not do the work."""
    return Answer(
        work.kind,
        work.terms,
        work.round,
        work.attempt,
        digest(work.payload),
        {"reason": reason},
        refused=code,
    )
