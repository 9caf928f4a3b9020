"""Writes that are whole or not there, whatever moment the machine stops at; and checked reads."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHIPPED = ("recipes", "requirements-kit.lock")
"""What a wheel of this package has inside it, and its sources beside them."""
DRAFT = re.compile(r"\.(.+?)\.\d+(\.old)?")
"""Name of a draft: the target's, and the process that writes it."""

MAX_DEPTH = 50
"""Levels of a file's lists and tables, at most: ours have six."""
MAX_INTEGER = 2**63 - 1
"""Whole numbers beyond it TOML does not have, and no setting or record needs."""


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step, and see it on the disk before returning."""
    write_parts(path, (content,))


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """The same, of content that may be made as it is written."""
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
    """A draft folder to fill; it takes the path's place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    old = draft.with_name(f"{draft.name}.old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*.safetensors"):  # which safetensors makes its owner's alone
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
    """Put right what a killed process left below a folder: drafts go, a replaced folder comes back.

    Only for who alone writes there.
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
    """The value of a text that may be damaged or hostile.

    Args:
        text: bytes must be UTF-8.
        parser: `json.loads` or `tomllib.loads`.

    Raises:
        ValueError: in one sentence, why it has none, or none that we write.
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
    """Refuse what would fail later, in code that expects ordinary values."""
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
    """Where a file or folder lies that is shipped with the package."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.exists() else package.parents[1] / name


def find_recipe(name: str) -> Path:
    """The file of that name, or where there is none the one shipped as `recipes/NAME`."""
    path, folder = Path(name), find_shipped("recipes")
    if not path.is_file() and path.parent.as_posix() in {".", "recipes"}:
        for shipped in (folder / path.name, folder / f"{path.name}.toml"):
            if shipped.is_file():
                return shipped
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
