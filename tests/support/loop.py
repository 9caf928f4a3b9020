"""Carriers that end in this process, and all that can go wrong on the way; a server over them."""

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from fedgen_edge import files
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.config import Settings, to_toml
from fedgen_edge.deploy import settings as deployed
from fedgen_edge.deploy.server import federation
from fedgen_edge.deploy.server.audit import Audit
from fedgen_edge.deploy.server.federation import Deployment
from fedgen_edge.deploy.server.main import ServerContext, make_deployment, prepare_server
from fedgen_edge.deploy.server.stages import proceed
from fedgen_edge.network.flower.carrier import unwrap, wrap
from fedgen_edge.network.messages import (
    Answer,
    Carrier,
    Reply,
    WorkRequest,
    decode_message,
    digest,
    encode_line,
    make_refusal,
)
from fedgen_edge.runs import records
from fedgen_edge.runs.run import Event
from fedgen_edge.types import Leaves

Handle = Callable[[str, bytes], tuple[str, bytes]]
"""What a site makes of a line and a payload."""
Fault = Callable[["Loop", WorkRequest, Reply], list[Reply]]
"""What comes of some work and its right reply."""
TIMES = ("seconds", "evaluate_seconds")


@dataclass(frozen=True)
class When:
    """Some work: of a site, a kind, a round and an attempt; none is any."""

    site: str | None = None
    kind: str | None = "train"
    round: int | None = None
    attempt: int | None = None

    def meets(self, site: str, work: WorkRequest) -> bool:
        """Whether this work is meant."""
        pairs = (
            (self.site, site),
            (self.kind, work.kind),
            (self.round, work.round),
            (self.attempt, work.attempt),
        )
        return all(wanted in {None, found} for wanted, found in pairs)


@dataclass
class Loop:
    """The `exchange.Carrier` that a loop over sites is; time is up once all have been asked."""

    sites: dict[str, Handle]
    faults: list[tuple[When, Fault]] = field(default_factory=list)
    away: set[str] = field(default_factory=set)
    slow: list[str] = field(default_factory=list)
    """Answer after all others, in this order."""
    asked: list[tuple[str, WorkRequest]] = field(default_factory=list)
    heard: list[Reply] = field(default_factory=list)
    held: list[Reply] = field(default_factory=list)
    """Come with what is asked next."""

    def present(self) -> list[str]:
        return sorted(self.sites.keys() - self.away)

    def exchange(self, work: Mapping[str, WorkRequest], seconds: float) -> Generator[Reply]:
        assert seconds > 0
        self.asked += work.items()
        late, self.held = self.held, []
        for reply in [r for r in late if r.site in work]:
            yield self._brought(reply)
        for site in [*sorted(work.keys() - {*self.slow}), *self.slow]:
            if site not in work:
                continue
            for reply in self._replies(site, work[site]):
                yield self._brought(reply)

    def _brought(self, reply: Reply) -> Reply:
        self.heard.append(reply)
        return reply

    def _replies(self, site: str, work: WorkRequest) -> list[Reply]:
        if site in self.away:
            return [Reply(site, "", b"", failed="it could not be asked: it is away")]
        try:
            right = Reply(site, *self.sites[site](encode_line(work), work.payload))
        except Exception as error:
            return [Reply(site, "", b"", failed=type(error).__name__)]
        for when, fault in self.faults:
            if when.meets(site, work):
                return fault(self, work, right)
        return [right]

    def rounds(self, kind: str = "train") -> list[tuple[int, int, str]]:
        """Round, attempt and site of all that was asked of a kind."""
        return [(w.round, w.attempt, name) for name, w in self.asked if w.kind == kind]


def silent(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
    return []


def failed(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
    return [Reply(right.site, "", b"", failed="Node Unavailable (Flower's error 5)")]


def late(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
    loop.held.append(right)
    return []


def twice(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
    return [right, right]


def tampered_line(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
    return [replace(right, line=right.line[:-1])]


def tampered_payload(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
    """The last value is huge."""
    return [replace(right, payload=right.payload[:-1] + b"\x7e")]


def of(other: str) -> Fault:
    """The site sends what another one answers."""

    def fault(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
        theirs = next(w for name, w in loop.asked[::-1] if name == other and w.kind == work.kind)
        return [Reply(right.site, *loop.sites[other](encode_line(theirs), theirs.payload))]

    return fault


def saying(**said: Any) -> Fault:
    """The site says other numbers."""

    def fault(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
        answer = decode_message(Answer, right.line, right.payload)
        return [replace(right, line=encode_line(replace(answer, said={**answer.said, **said})))]

    return fault


def declining(code: str = "failed") -> Fault:
    """The site says that it does not do it."""

    def fault(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
        answer = decode_message(Answer, right.line, right.payload)
        no = replace(answer, said={"reason": "no room"}, refused=code)
        return [replace(right, line=encode_line(no), payload=b"")]

    return fault


def first(act: Callable[[], object]) -> Fault:
    """Something happens before the answer comes."""

    def fault(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
        act()
        return [right]

    return fault


def echo(text: str, payload: bytes) -> tuple[str, bytes]:
    return text, payload


class InlineGrid:
    """A grid of Flower's whose nodes answer at once, but for their faults; else they echo."""

    def __init__(
        self,
        faults: dict[int, Callable[[Message, Message], list[Message]]] | None = None,
        handles: Mapping[int, Handle] | None = None,
    ) -> None:
        self.faults = faults or {}
        self.handles = handles or {}
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self.refused: set[int] = set()
        self.pulls = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        if node in self.refused:
            return ""
        message.metadata.__dict__["_message_id"] = message.object_id
        self.sent.append(message)
        answer = self.handles.get(node, echo)(*unwrap(message.content))
        reply = Message(wrap(*answer), reply_to=message)
        fault = self.faults.get(node, lambda _, right: [right])
        self.replies += fault(message, reply)
        return message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        self.pulls += 1
        asked = set(message_ids)
        found = [r for r in self.replies if r.metadata.reply_to_message_id in asked]
        self.replies = [r for r in self.replies if r not in found]
        return iter(found)


def server(folder: Path, settings: Settings, names: Sequence[str], **plan: Any) -> Path:
    """A server's folder, without what only a network needs."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(to_toml(settings))
    quick = {"address": "localhost:19443", "back_off": 1e-3, "gather": 1e-3, **plan}
    (folder / "federation.toml").write_bytes(
        deployed.encode_toml(deployed.DeploymentSettings(**quick))
    )
    (folder / "revoked").mkdir()
    for name in names:
        files.write(folder / "sites" / f"{name}.pub", b"a key")
    return folder


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits, for a site or for the disk: what was written survives all but a power cut."""
    monkeypatch.setattr(federation, "REINVITE_SECONDS", -1.0)
    monkeypatch.setattr(federation, "POLL_SECONDS", 1e-3)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@dataclass
class Run:
    """A server's run, as far as it came."""

    home: ServerContext
    deployment: Deployment
    events: list[Event] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def log(self) -> list[tuple[Any, ...]]:
        """What the audit log says: event, site, round, attempt, code."""
        keys = ("event", "site", "round", "attempt", "code")
        return [tuple(row.get(k) for k in keys) for row in self.deployment.audit.lines]

    def happened(self, event: str) -> list[tuple[str, int, str]]:
        """Site, round and code of each such line."""
        return [(site, at, code) for what, site, at, _, code in self.log if what == event]


def opened(folder: Path, carrier: Carrier) -> Run:
    """A server that has started, over a carrier."""
    home = prepare_server(folder)
    files.clean_drafts(home.run)
    told: list[str] = []
    audit = Audit(home.run / "audit.jsonl")
    return Run(home, make_deployment(home, carrier, audit, told.append), told=told)


def conduct(folder: Path, carrier: Carrier, until: int | None = None) -> Run:
    """Run a server to its end, or until so many rounds are committed and no further."""
    run = opened(folder, carrier)
    with records.lock_run(run.home.run):
        events = proceed(run.deployment, run.home.run)
        for event in events:
            run.events.append(event)
            if event.stage == "federation" and event.completed == until and "loss" in event.line:
                events.close()  # pyright: ignore[reportAttributeAccessIssue]
                break
    return run


def outcome(run: Path) -> dict[str, Any]:
    """All that a run at a server leaves, times aside."""
    found: dict[str, Any] = {}
    for name in ("rounds", "personal", "evaluation", "samples"):
        rows = records.lines(run / f"{name}.jsonl")
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        found[name] = sorted(rows, key=by_client) if name in {"personal", "evaluation"} else rows
    shared = [p for p in sorted((run / "adapters").glob("*")) if p.name != "clients"]
    found["global"] = {f"{p.name}/{k}": v for p in shared for k, v in model(p).items()}
    return found


def by_client(row: Mapping[str, Any]) -> tuple[str, str]:
    return row.get("model", ""), row["client"]


def model(folder: Path) -> dict[str, bytes]:
    """Values of an adapter's folder, to the bit."""
    paths = sorted(folder.glob("*.safetensors"))
    return {f"{p.name}/{k}": v.numpy().tobytes() for p in paths for k, v in load_file(p).items()}


def same(one: Leaves, other: Leaves) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def sites_json(run: Path) -> Any:
    return json.loads((run / "sites.json").read_text())


@dataclass
class Stub:
    """A site that answers at once, by arithmetic on all that a real one's answer depends on."""

    weight: int = 6
    rounds: int = 3
    run: str | None = None
    """That it has joined."""

    def handle(self, text: str, payload: bytes) -> tuple[str, bytes]:
        work = decode_message(WorkRequest, text, payload)
        if work.kind == "join":
            self.run = work.terms.run
        elif self.run != work.terms.run:
            return encode_line(make_refusal(work, "wrong-run", "ask it to join")), b""
        base = digest(payload)
        key = digest(f"{work.client} {work.round} {work.accepted} {base}".encode())
        number = 1 + int(key[:4], 16) % 97
        said, sent = {}, b""
        if work.kind == "join":
            said = {"weight": self.weight, "train": self.weight, "validation": 2, "test": 2}
            said["items"] = 9 * self.weight
        elif work.kind == "train":
            said = {"weight": self.weight, "loss": number / 8, "steps": self.weight // 2}
            start = decode(work.payload)
            sent = encode({k: torch.full_like(v, number * 1e-6) for k, v in start.items()})
        else:
            said = self._judged(work, {"total": number / 4, "count": 20.0, "words": 10.0})
        return encode_line(
            Answer(work.kind, work.terms, work.round, work.attempt, base, said)
        ), sent

    def _judged(self, work: WorkRequest, sums: dict[str, float]) -> dict[str, Any]:
        if work.kind == "personalise":
            history = [2.0, sums["total"] / 25]
            return {"validation": history, "chosen": 1, "test": sums, "seconds": 0.5}
        return {"validation": sums, **({"test": sums} if work.round >= self.rounds else {})}


def stubs(*names: str, rounds: int = 3) -> dict[str, Stub]:
    """Sites of unequal weight."""
    return {name: Stub(4 + 2 * at, rounds) for at, name in enumerate(names)}
