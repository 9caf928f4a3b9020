"""A run's folder: what is written, where, and by one process at a time; and its checked reads."""

import fcntl
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedgen_edge import files
from fedgen_edge.errors import CheckpointError, ConfigError
from fedgen_edge.runs.record_types import TYPES

Line = dict[str, Any]
REPLACED_WHOLE = frozenset(("evaluation.jsonl", "samples.jsonl", "distances.jsonl"))
"""Files that are replaced whole, so that a cut line is a damaged one."""
MAX_VALUE_LENGTH = 60
"""Letters of a wrong value that a message has."""
type_adapter = cache(TypeAdapter)
"""What checks values of a type: made once."""


def claim(folder: Path) -> None:
    """Make the folder of a new run.

    Raises:
        ConfigError: it holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a run" if (folder / "settings.toml").exists() else "other files"
        raise ConfigError(
            f"out={str(folder)!r} already holds {what}: "
            f"name another folder, or go on with `fedgen resume {folder}`"
        )
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Be the only process that writes to this run; the lock ends with the process."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder} is in use by another process: wait for it") from None
        yield


def is_locked(folder: Path) -> bool:
    """Whether some process writes to this run now."""
    try:
        with (folder / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line of JSON, and see it on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[Line]:
    """Every whole line of a JSON-lines file; none where there is no file."""
    return list(iter_lines(path))


def iter_lines(path: Path) -> Iterator[Line]:
    """The same, one at a time: with many clients, all of them take much room.

    A last line without its end was never written whole, and does not count.

    Raises:
        CheckpointError: a line is not as it was written, by its number.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and path.name in REPLACED_WHOLE:
                raise CheckpointError(f"{path} is cut short in line {number}: restore it")
            if line.endswith(b"\n") and line.strip():
                yield _read(line, f"{path}, line {number},", TYPES.get(path.name))


def truncate(path: Path, count: int) -> None:
    """Keep the first lines: what came after the commit that is gone on from never happened."""
    if path.exists():
        complete_lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]
        files.write(path, b"".join(line + b"\n" for line in complete_lines[:count]))


def read_json(path: Path, of: Any = None) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        of: type of the value, where it is not the one that the file's name says.

    Raises:
        CheckpointError: it is missing, or not as it was written.
    """
    return _read(_bytes(path), str(path), of or TYPES.get(path.name))


def read_toml(path: Path) -> Any:
    """The tables of a TOML file, of whichever version of these settings.

    Raises:
        CheckpointError: it is missing, or not as it was written.
    """
    try:
        return files.parse(_bytes(path), tomllib.loads)
    except ValueError as error:
        raise CheckpointError(f"{path} is cut short or altered: {error}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is not a whole run's folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _read(text: bytes, where: str, of: Any) -> Any:
    """The value of a text in JSON, of a type."""
    try:
        value = files.parse(text, json.loads)
        if of is not None:
            type_adapter(of).validate_python(value)
    except ValidationError as error:  # which is a ValueError too
        raise CheckpointError(f"{where} is altered: {_describe_first_error(error)}") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is cut short or altered: {error}") from None
    return value


def _describe_first_error(error: ValidationError) -> str:
    """What is wrong first, by the name of the field."""
    first_error = error.errors(include_url=False)[0]
    name = ".".join(map(str, first_error["loc"])) or "it"
    if first_error["type"] == "missing":
        return f"it has no {name!r}"
    return (
        f"{name} is {repr(first_error['input'])[:MAX_VALUE_LENGTH]}: {first_error['msg'].lower()}"
    )


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file."""
    files.write(path, json.dumps(value, indent=1, sort_keys=True).encode())


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file; its lines may be made as they are written."""
    files.write_parts(path, ((json.dumps(v, sort_keys=True) + "\n").encode() for v in values))


def folder_name(client: str) -> str:
    """A client's name as a folder's: letters, digits, `_`, `-`, and no leading dot."""
    encoded = re.sub(r"[^\w-]", "_", client).encode()[:80]  # a file system counts bytes, to 255
    return encoded.decode(errors="ignore") or "_"


def folder_names(clients: Sequence[str]) -> dict[str, str]:
    """The folder of each client; names that would meet get a number."""
    folders: dict[str, str] = {}
    used_names: set[str] = set()
    for client in clients:
        base = name = folder_name(client)
        number = 2
        while name in used_names:
            name, number = f"{base}-{number}", number + 1
        folders[client] = name
        used_names.add(name)
    return folders


class TensorBoardWriter:
    """TensorBoard's view of a run."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: Line) -> None:
        """Show one round."""
        at = line["round"]
        if line["loss"] is not None:
            self.writer.add_scalar("train/loss", line["loss"], at)
        self.writer.add_scalar("bytes/up", line["bytes_up"], at)
        if line["validation"]:
            validation = line["validation"]
            self.writer.add_scalar("validation/loss", validation["total"] / validation["count"], at)
        self.writer.flush()


def list_cohort_members(folder: Path) -> set[str]:
    """Clients that some round of these drew."""
    return {name for line in iter_lines(folder / "rounds.jsonl") for name in line["cohort"]}
