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
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.errors import CheckpointError
from fedgen_edge.network.messages import digest
from fedgen_edge.runs import record_types, records
from fedgen_edge.types import Leaves

AnswerFields = dict[str, Any]
MAX_UPDATES = 3
"""Updates of a run that are not deleted yet."""
NOTE, PAYLOAD, MEMORY = "trained.json", "payload.safetensors", "memory.safetensors"


@dataclass(frozen=True)
class RequestKey:
    """All that an answer depends on: asked the same again, a site answers the same."""

    round: int
    client: int
    base: str
    """SHA-256 of the payload that it worked from."""
    accepted: str | None
    """SHA-256 of the site's last payload that counts; none before the first."""


@dataclass(frozen=True)
class StoredUpdate:
    """An update, and what the site keeps if it counts."""

    key: RequestKey
    payload: bytes
    memory: Leaves
    fields: AnswerFields


@dataclass(frozen=True)
class RunStore:
    """What a site did in one run."""

    folder: Path

    def save_update(self, update: StoredUpdate) -> None:
        """Write an update down, and forget those that can no longer count."""
        memory = encode(update.memory)
        note = {
            "asked": asdict(update.key),
            "said": update.fields,
            "payload": digest(update.payload),
            "memory": digest(memory),
        }
        target = self._make_update_path(update.key)
        with files.replace_folder(target) as draft:
            (draft / PAYLOAD).write_bytes(update.payload)
            (draft / MEMORY).write_bytes(memory)
            (draft / NOTE).write_text(json.dumps(note, sort_keys=True))
        self._prune(target)

    def find_answer(self, key: RequestKey) -> tuple[AnswerFields, bytes] | None:
        """What was said and sent for the same work before; none where it is to be done."""
        folder = self._make_update_path(key)
        note = _read_note(folder)
        try:
            return (
                (note["said"], _read_verified(folder / PAYLOAD, note["payload"])) if note else None
            )
        except CheckpointError:
            return None

    def load_client_state(self, accepted: str | None) -> Leaves | None:
        """What the site kept with the payload of this hash; none where it has no such payload.

        Raises:
            CheckpointError: it is damaged.
        """
        if accepted is None:
            return {}
        for folder, note in self._iter_notes():
            if note["payload"] == accepted:
                return decode(_read_verified(folder / MEMORY, note["memory"]))
        return None

    def is_update_missing(self, accepted: str | None) -> bool:
        """Whether there is no payload of this hash here, and so nothing that was kept with it."""
        return accepted is not None and all(n["payload"] != accepted for _, n in self._iter_notes())

    @property
    def personal_folder(self) -> Path:
        """Folder of the site's own adapter."""
        return self.folder / "personal"

    def begin_tuning(self) -> None:
        """From here until `tuned` the folder of the site's own adapter is nobody's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tuning_path.unlink(missing_ok=True)

    def record_tuning(self, key: RequestKey, fields: AnswerFields) -> None:
        """Write down what was said of the adapter that lies in its folder."""
        note = {"asked": asdict(key), "said": fields}
        files.write(self._tuning_path, json.dumps(note, sort_keys=True).encode())

    def find_tuning(self, key: RequestKey) -> AnswerFields | None:
        """What was said of the same work before; none where it is to be done."""
        note = _read(self._tuning_path, record_types.SiteTuning)
        is_current = (
            note is not None and note["asked"] == asdict(key) and self.personal_folder.is_dir()
        )
        return note["said"] if note and is_current else None

    @property
    def _tuning_path(self) -> Path:
        return self.folder / "personal.json"

    def _make_update_path(self, request: RequestKey) -> Path:
        key = digest(json.dumps(asdict(request), sort_keys=True).encode())
        return self.folder / "trained" / f"{request.round:05d}-{key[:16]}"

    def _iter_notes(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every update with what stands beside it, the newest round first."""
        for folder in sorted(self.folder.glob("trained/[0-9]*"), reverse=True):
            if note := _read_note(folder):
                yield folder, note

    def _prune(self, newest: Path) -> None:
        """Keep the newest, what it began from, and what that began from.

        A server that goes back to the commit before its last asks from there.
        """
        notes = dict(self._iter_notes())
        retained, wanted_digest = [newest], notes[newest]["asked"]["accepted"]
        for folder, note in notes.items():
            if (
                len(retained) < MAX_UPDATES
                and folder != newest
                and note["payload"] == wanted_digest
            ):
                retained.append(folder)
                wanted_digest = note["asked"]["accepted"]
        for folder in {*self.folder.glob("trained/[0-9]*")} - {*retained}:
            (folder / NOTE).unlink(missing_ok=True)  # first: what is half deleted is no update
            shutil.rmtree(folder)


@dataclass(frozen=True)
class SiteStore:
    """All that a site keeps, in a folder that nobody else can read."""

    folder: Path

    def get_run(self) -> str | None:
        """The run that the site is in."""
        note = _read(self.folder / "run.json", record_types.SiteRun)
        return note["run"] if note else None

    def join_run(self, run: str) -> None:
        """Enter a run, or enter it again."""
        self.get_run_store(run).folder.mkdir(parents=True, exist_ok=True)
        files.write(self.folder / "run.json", json.dumps({"run": run}).encode())

    def get_run_store(self, run: str) -> RunStore:
        """What the site did in a run."""
        return RunStore(self.folder / "runs" / run)


def open_store(folder: Path) -> SiteStore:
    """A site's state, made where there is none; for the one process that writes there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    files.clean_drafts(folder)
    return SiteStore(folder)


def _read_note(folder: Path) -> dict[str, Any] | None:
    return _read(folder / NOTE, record_types.SiteUpdate)


def _read(path: Path, record_type: type) -> dict[str, Any] | None:
    """What a file says; none where it is not there, or not as it was written."""
    try:
        return records.read_json(path, record_type)
    except CheckpointError:
        return None


def _read_verified(path: Path, expected_digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError:
        content = None
    if content is None or digest(content) != expected_digest:
        raise CheckpointError(
            f"{path} is missing, truncated or altered: restore it, or delete its folder to go on "
            "as one that kept nothing"
        )
    return content
