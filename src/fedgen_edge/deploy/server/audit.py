"""The audit log: who sent what, and what became of it; never what was in it.

`audit.jsonl` is only added to. Each line has its own SHA-256 and that of the line before, so a line
that was altered, taken out or put in between is found. Lines cut off at the end are not: a file
cannot tell that there was more.

A server writes, in this order: `opened` as it begins an attempt at a round; `accepted` and
`refused` for each message; the round's checkpoint; `committed`. A crash between the last two leaves
a round that was committed without its line, and a checkpoint that is lost or damaged leaves a line
without its round. So the checkpoint alone says what was committed: see `accepted`.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedgen_edge import files
from fedgen_edge.errors import CheckpointError

Line = dict[str, Any]
FIELDS = frozenset(("site", "round", "attempt", "payload", "code"))
"""What a line may say beside its event and its time: names, numbers, a payload's SHA-256, a code.
"""


class AcceptedMessage(NamedTuple):
    """A site's message that counts."""

    round: int
    payload: str
    """Its SHA-256."""


class Audit:
    """The log of one run, as its one writer has it; a reader calls `lines`."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Read what there is, and cut off a last line that was not written whole.

        Raises:
            CheckpointError: a line was altered, by its number.
        """
        if not path.exists():
            files.write(path, b"")
        self.path, self.clock = path, clock
        self.lines = read_lines(path)
        self._size = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, self._size)
        self._open: tuple[object, object] | None = None

    def write(self, event: str, **fields: str | int) -> None:
        """Add a line, and see it on the disk.

        What a failed write left is overwritten by the next.

        Args:
            event: `opened`, `accepted`, `refused`, `committed`, or any other word.
            fields: some of FIELDS; of `accepted`, `site`, `round`, `attempt` and `payload`.
        """
        if fields.keys() - FIELDS:
            raise ValueError(f"an audit line has no {sorted(fields.keys() - FIELDS)}")
        attempt = fields.get("round"), fields.get("attempt")
        if event == "accepted" and attempt != self._open:
            raise ValueError("an accepted message belongs to the attempt that was opened last")
        previous = self.lines[-1]["digest"] if self.lines else ""
        moment = datetime.fromtimestamp(self.clock(), UTC).isoformat(timespec="milliseconds")
        line = {**fields, "event": event, "time": moment, "previous": previous}
        line["digest"] = _hash_line(line)
        text = _encode_line(line) + b"\n"
        with self.path.open("r+b") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(text)
        self.lines.append(line)
        if event == "opened":
            self._open = attempt

    def get_refusals(self) -> Counter[str]:
        """Refused messages of each site in this run, before a restart too."""
        return count_refusals(self.lines)

    def get_accepted(self, committed: int) -> dict[str, AcceptedMessage]:
        """Each site's last message that counts, when the checkpoint has so many rounds."""
        return find_accepted(self.lines, committed)


def read_lines(path: Path) -> list[Line]:
    """Every whole line, checked; a reader needs no lock, and sees no line that is half written.

    Raises:
        CheckpointError: a line was altered, by its number.
    """
    log_lines: list[Line] = []
    complete_lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, text in enumerate(complete_lines, 1):
        previous = log_lines[-1]["digest"] if log_lines else ""
        line = _parse_line(text)
        if line is None or line["previous"] != previous:
            raise CheckpointError(
                f"{path}: line {number} is not as it was written, or one before it is missing: "
                "keep the file as evidence, and begin a new run"
            )
        log_lines.append(line)
    return log_lines


def count_refusals(log: Iterable[Line]) -> Counter[str]:
    """Refused messages of each site."""
    return Counter(str(line.get("site")) for line in log if line["event"] == "refused")


def find_accepted(log: Iterable[Line], committed: int) -> dict[str, AcceptedMessage]:
    """Each site's last message that counts: its round is one of the checkpoint's.

    What a round accepted is that of its last attempt, as an attempt that is opened takes the place
    of all that was accepted for its round, or for later ones. That is right whichever of the
    checkpoint and the `committed` line a crash has lost, and after a checkpoint that was gone back
    to.

    Args:
        log: the lines.
        committed: rounds of the checkpoint that the run goes on from (`ServerState.round`).
    """
    per_site: dict[str, list[AcceptedMessage]] = {}
    for line in log:
        if line["event"] == "opened":
            for messages in per_site.values():
                while messages and messages[-1].round >= line["round"]:
                    messages.pop()
        if line["event"] == "accepted":
            per_site.setdefault(line["site"], []).append(
                AcceptedMessage(line["round"], line["payload"])
            )
    committed_per_site = {
        site: [t for t in all_ if t.round < committed] for site, all_ in per_site.items()
    }
    return {site: messages[-1] for site, messages in committed_per_site.items() if messages}


def _parse_line(text: bytes) -> Line | None:
    """A line that is as it was written, to the byte; else none."""
    try:
        line = json.loads(text)
        content = {k: v for k, v in line.items() if k != "digest"}
        is_intact = line["digest"] == _hash_line(content) and _encode_line(line) == text
        is_intact = is_intact and {"event", "previous"} <= line.keys()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return line if is_intact else None


def _encode_line(line: Line) -> bytes:
    return json.dumps(line, sort_keys=True).encode()


def _hash_line(line: Line) -> str:
    return hashlib.sha256(_encode_line(line)).hexdigest()
