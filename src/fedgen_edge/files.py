"""Atomic writes, which are complete or absent whenever the machine stops; and checked reads."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHIPPED = ("recipes", "requirements-kit.lock")
"""Files that lie inside a wheel of this package, and beside its sources in a checkout."""
DRAFT = re.compile(r"\.(.+?)\.\d+(\.old)?")
"""The name of a draft: the target's name and the writing process's id."""

MAX_DEPTH = 50
"""Maximum nesting of lists and tables in a file; ours have six levels."""
MAX_INTEGER = 2**63 - 1
"""TOML has no larger integers, and no setting or record needs one."""


def write(path: Path, content: bytes) -> None:
    """Replace a file atomically, and make sure that it is on the disk before returning."""
    write_parts(path, (content,))


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Replace a file atomically with content that may be produced while it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a draft folder; it replaces the path when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    old = draft.with_name(f"{draft.name}.old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*.safetensors"):  # safetensors lets only the owner read them
            file.chmod(draft.stat().st_mode & 0o666)
        for file in [p for p in draft.rglob("*") if p.is_file()]:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        _sync(draft)
        if path.exists():
            path.replace(old)
        draft.replace(path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def clean_drafts(root: Path) -> None:
    """Clean up after a killed process: delete drafts below a folder, and restore a replaced folder.

    Call it only where no other process writes.
    """
    for draft in sorted(root.rglob(".*")):
        match = DRAFT.fullmatch(draft.name)
        if match and draft.exists():
            target = draft.with_name(match[1])
            if match[2] and not target.exists():
                draft.replace(target)
            elif draft.is_dir():
                shutil.rmtree(draft)
            else:
                draft.unlink()


def parse(text: str | bytes, parser: Callable[[str], Any]) -> Any:
    """Parse a text that may be damaged or hostile.

    Args:
        text: bytes must be UTF-8.
        parser: `json.loads` or `tomllib.loads`.

    Raises:
        ValueError: the text has no value, or none that we would write; says why in one sentence.
    """
    try:
        value = parser(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's limit on digits
            raise ValueError("a whole number in it has thousands of digits") from None
        raise
    _check_value(value)
    return value


def _check_value(value: Any) -> None:
    """Refuse values that would fail later, in code that expects ordinary ones."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(v, int) and abs(v) > MAX_INTEGER for v in level):
            raise ValueError("a whole number in it is beyond 64 bits")
        tables = [v.values() if isinstance(v, dict) else v for v in level if _holds_others(v)]
        level = [inner for table in tables for inner in table]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _holds_others(value: Any) -> bool:
    return isinstance(value, dict | list)


def find_shipped(name: str) -> Path:
    """Return the path of a file or folder that is shipped with the package."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.exists() else package.parents[1] / name


def find_recipe(name: str) -> Path:
    """Return the file of that name, or else the shipped `recipes/NAME`."""
    path, folder = Path(name), find_shipped("recipes")
    if not path.is_file() and path.parent.as_posix() in {".", "recipes"}:
        for shipped in (folder / path.name, folder / f"{path.name}.toml"):
            if shipped.is_file():
                return shipped
    return path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
