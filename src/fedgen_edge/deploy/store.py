"""A site's state on disk: the run that it is in, the updates that it made, and its own adapter.

An update lies beside what the site keeps if it counts. Which one counted, the server says by the
hash of its payload, in every message; so nothing here is ever moved from pending to kept, and a
crash between two writes cannot leave one without the other.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedgen_edge import files
from fedgen_edge.engines.exchange import digest
from fedgen_edge.errors import CheckpointError
from fedgen_edge.experiments import record_types, records
from fedgen_edge.types import Leaves
from fedgen_edge.uplink.transform import decode, encode

Said = dict[str, Any]
KEPT = 3
"""Updates of a run that are not deleted yet."""
NOTE, PAYLOAD, MEMORY = "trained.json", "payload.safetensors", "memory.safetensors"


@dataclass(frozen=True)
class Asked:
    """All that an answer depends on: asked the same again, a site answers the same."""

    round: int
    client: int
    base: str
    """SHA-256 of the payload that it worked from."""
    accepted: str | None
    """SHA-256 of the site's last payload that counts; none before the first."""


@dataclass(frozen=True)
class Trained:
    """An update, and what the site keeps if it counts."""

    asked: Asked
    payload: bytes
    memory: Leaves
    said: Said


@dataclass(frozen=True)
class Past:
    """What a site did in one run."""

    folder: Path

    def keep(self, trained: Trained) -> None:
        """Write an update down, and forget those that can no longer count."""
        memory = encode(trained.memory)
        note = {
            "asked": asdict(trained.asked),
            "said": trained.said,
            "payload": digest(trained.payload),
            "memory": digest(memory),
        }
        target = self._place(trained.asked)
        with files.folder(target) as draft:
            (draft / PAYLOAD).write_bytes(trained.payload)
            (draft / MEMORY).write_bytes(memory)
            (draft / NOTE).write_text(json.dumps(note, sort_keys=True))
        self._prune(target)

    def again(self, asked: Asked) -> tuple[Said, bytes] | None:
        """What was said and sent for the same work before; none where it is to be done."""
        place = self._place(asked)
        note = _note(place)
        try:
            return (note["said"], _checked(place / PAYLOAD, note["payload"])) if note else None
        except CheckpointError:
            return None

    def remembered(self, accepted: str | None) -> Leaves | None:
        """What the site kept with the payload of this hash; none where it has no such payload.

        Raises:
            CheckpointError: it is damaged.
        """
        if accepted is None:
            return {}
        for place, note in self._notes():
            if note["payload"] == accepted:
                return decode(_checked(place / MEMORY, note["memory"]))
        return None

    def lost(self, accepted: str | None) -> bool:
        """Whether there is no payload of this hash here, and so nothing that was kept with it."""
        return accepted is not None and all(n["payload"] != accepted for _, n in self._notes())

    @property
    def personal(self) -> Path:
        """Folder of the site's own adapter."""
        return self.folder / "personal"

    def begin_tuning(self) -> None:
        """From here until `tuned` the folder of the site's own adapter is nobody's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tuning.unlink(missing_ok=True)

    def tuned(self, asked: Asked, said: Said) -> None:
        """Write down what was said of the adapter that lies in its folder."""
        note = {"asked": asdict(asked), "said": said}
        files.write(self._tuning, json.dumps(note, sort_keys=True).encode())

    def tuned_again(self, asked: Asked) -> Said | None:
        """What was said of the same work before; none where it is to be done."""
        note = _read(self._tuning, record_types.SiteTuning)
        there = note is not None and note["asked"] == asdict(asked) and self.personal.is_dir()
        return note["said"] if note and there else None

    @property
    def _tuning(self) -> Path:
        return self.folder / "personal.json"

    def _place(self, asked: Asked) -> Path:
        key = digest(json.dumps(asdict(asked), sort_keys=True).encode())
        return self.folder / "trained" / f"{asked.round:05d}-{key[:16]}"

    def _notes(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every update with what stands beside it, the newest round first."""
        for place in sorted(self.folder.glob("trained/[0-9]*"), reverse=True):
            if note := _note(place):
                yield place, note

    def _prune(self, newest: Path) -> None:
        """Keep the newest, what it began from, and what that began from.

        A server that goes back to the commit before its last asks from there.
        """
        notes = dict(self._notes())
        kept, wanted = [newest], notes[newest]["asked"]["accepted"]
        for place, note in notes.items():
            if len(kept) < KEPT and place != newest and note["payload"] == wanted:
                kept.append(place)
                wanted = note["asked"]["accepted"]
        for place in {*self.folder.glob("trained/[0-9]*")} - {*kept}:
            (place / NOTE).unlink(missing_ok=True)  # first: what is half deleted is no update
            shutil.rmtree(place)


@dataclass(frozen=True)
class State:
    """All that a site keeps, in a folder that nobody else can read."""

    folder: Path

    def bound(self) -> str | None:
        """The run that the site is in."""
        note = _read(self.folder / "run.json", record_types.SiteRun)
        return note["run"] if note else None

    def bind(self, run: str) -> None:
        """Enter a run, or enter it again."""
        self.past(run).folder.mkdir(parents=True, exist_ok=True)
        files.write(self.folder / "run.json", json.dumps({"run": run}).encode())

    def past(self, run: str) -> Past:
        """What the site did in a run."""
        return Past(self.folder / "runs" / run)


def open_state(folder: Path) -> State:
    """A site's state, made where there is none; for the one process that writes there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    files.sweep(folder)
    return State(folder)


def _note(place: Path) -> dict[str, Any] | None:
    return _read(place / NOTE, record_types.SiteUpdate)


def _read(path: Path, of: type) -> dict[str, Any] | None:
    """What a file says; none where it is not there, or not as it was written."""
    try:
        return records.read_json(path, of)
    except CheckpointError:
        return None


def _checked(path: Path, wanted: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError:
        content = None
    if content is None or digest(content) != wanted:
        raise CheckpointError(
            f"{path} is missing, truncated or altered: restore it, or delete its folder to go on "
            "as one that kept nothing"
        )
    return content
