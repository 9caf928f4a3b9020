"""Round commits: written whole or not at all, checked by hash, chained to the one before.

A run's `checkpoints/00007/` holds `server.safetensors` and `manifest.json`; clients' memory lies in
`memory/`, a file for each version that a kept manifest names.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgen_edge import files
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.errors import CheckpointError
from fedgen_edge.federation.states import decode_server_state, encode_server_state
from fedgen_edge.runs import records
from fedgen_edge.types import Leaves, ServerState

Manifest = dict[str, Any]
FORMAT = 2
"""Of what a checkpoint holds; manifests without a number are of format 1."""


@dataclass
class ClientStateStore(MutableMapping[int, Leaves]):
    """Clients' memory on disk: only what is asked for is loaded.

    A version is a file of its own, so that a commit's manifest stays true whatever is written
    after it.
    """

    folder: Path
    version: int = 0
    """Names the next files; a commit raises it."""
    index: dict[int, tuple[str, str]] = field(default_factory=dict)
    """File and SHA-256 of each client."""

    def __getitem__(self, client: int) -> Leaves:
        name, digest = self.index[client]
        return decode(_read_verified(self.folder / name, digest))

    def __setitem__(self, client: int, leaves: Leaves) -> None:
        payload = encode(leaves)
        name = f"{client:06d}-{self.version:05d}.safetensors"
        files.write(self.folder / name, payload)
        self.index[client] = (name, hashlib.sha256(payload).hexdigest())

    def __delitem__(self, client: int) -> None:
        del self.index[client]

    def __iter__(self) -> Iterator[int]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def commit(run: Path, state: ServerState, memory: ClientStateStore, keep: int) -> None:
    """Make the state the one that a resumed run goes on from."""
    target = run / "checkpoints" / f"{state.round:05d}"
    payload = encode_server_state(state)
    earlier = [p for p in _list_commits(run) if p.name < target.name]
    manifest: Manifest = {
        "format": FORMAT,
        "round": state.round,
        "server": hashlib.sha256(payload).hexdigest(),
        "memory": {str(k): list(v) for k, v in sorted(memory.index.items())},
        "previous": _hash_previous(earlier),
    }
    manifest["digest"] = _hash_manifest(manifest)
    with files.replace_folder(target) as draft:
        (draft / "server.safetensors").write_bytes(payload)
        (draft / "manifest.json").write_text(json.dumps(manifest, sort_keys=True))
    memory.version = state.round
    prune(run, memory, keep)


def find_latest(run: Path) -> tuple[ServerState | None, ClientStateStore, list[str]]:
    """The newest whole commit, its clients' memory, and what was refused on the way.

    Returns:
        None for the state where nothing was committed yet.

    Raises:
        CheckpointError: there are commits, and none is whole, or another version wrote them.
    """
    problems = []
    for folder in reversed(_list_commits(run)):
        _check_format(run, folder / "manifest.json")
        try:
            state, memory = _load(run, folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return state, memory, problems
    if problems:
        raise CheckpointError(f"{run}: no checkpoint is whole: {'; '.join(problems)}")
    return None, ClientStateStore(run / "memory"), []


def load_latest(run: Path) -> tuple[ServerState, ClientStateStore]:
    """The newest whole commit, which there must be.

    Raises:
        CheckpointError: there is none (yet).
    """
    state, memory, _ = find_latest(run)
    if state is None:
        raise CheckpointError(f"{run} has no checkpoint yet: go on with `fedgen resume {run}`")
    return state, memory


def _load(run: Path, folder: Path) -> tuple[ServerState, ClientStateStore]:
    manifest = _read_manifest(folder / "manifest.json")
    payload = _read_verified(folder / "server.safetensors", manifest["server"])
    memory = ClientStateStore(
        run / "memory",
        version=manifest["round"],
        index={int(k): (name, digest) for k, (name, digest) in manifest["memory"].items()},
    )
    for name, digest in memory.index.values():
        _read_verified(memory.folder / name, digest)
    return decode_server_state(manifest["round"], payload), memory


def _check_format(run: Path, path: Path) -> None:
    """Refuse a manifest that another version wrote; a damaged one is for its reader to refuse."""
    try:
        manifest = files.parse(path.read_bytes(), json.loads)
    except (OSError, ValueError):
        return
    if not isinstance(manifest, dict) or "digest" not in manifest:
        return
    if (number := manifest.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {number}, and this version of fedgen-edge reads format "
            f"{FORMAT}: use the version that wrote it, which {run / 'run.json'} names"
        )


def _read_manifest(path: Path) -> Manifest:
    content: Manifest = records.read_json(path)
    if content.pop("digest") != _hash_manifest(content):
        raise CheckpointError(f"{path} is altered: it is not of its own digest")
    return content


def _read_verified(path: Path, digest: str) -> bytes:
    try:
        payload = path.read_bytes()
    except OSError:
        raise CheckpointError(f"{path} is missing") from None
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(f"{path} is truncated or altered")
    return payload


def _hash_manifest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _list_commits(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/[0-9]*"))


def _hash_previous(earlier: list[Path]) -> str | None:
    path = earlier[-1] / "manifest.json" if earlier else None
    return files.digest(path) if path and path.exists() else None


def prune(run: Path, memory: ClientStateStore, keep: int) -> None:
    """Delete old commits, those after the newest one's round, and memory that no commit names.

    A commit does so last, and a resumed run first: a process that was killed may not have.
    """
    current = f"{memory.version:05d}"
    committed = [folder for folder in _list_commits(run) if folder.name <= current]
    for folder in {*_list_commits(run)} - {*committed[-keep:]}:
        shutil.rmtree(folder)
    needed = {name for name, _ in memory.index.values()}.union(
        *map(_list_state_files, committed[-keep:])
    )
    for path in memory.folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()


def _list_state_files(folder: Path) -> set[str]:
    """Files of clients' memory that a commit needs; none where it is not whole."""
    try:
        return {name for name, _ in _read_manifest(folder / "manifest.json")["memory"].values()}
    except CheckpointError:
        return set()
