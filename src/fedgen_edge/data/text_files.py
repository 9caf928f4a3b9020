"""What all sources of text share: rows, lines of files, and error messages."""

import gzip
import os
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple, cast

from fedgen_edge import config
from fedgen_edge.errors import DataError

LINE_LIMIT = 1_000_000  # bytes; a longer line is hardly text
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error)


class TextRow(NamedTuple):
    """One example as its source provides it."""

    text: str
    group: str | None = None
    label: str | None = None
    split: str | None = None
    marks: int = 1  # end marks that a word-level model has to predict


def make_error(settings: config.Data, what: str) -> DataError:
    """Make an error that begins with the setting of the data's path."""
    where = "packages" if settings.source == "docstrings" else "path"
    return DataError(f"data.{where}={getattr(settings, where)!r}{what}")


def get_data_path(settings: config.Data) -> Path:
    """Return the path of the data.

    Raises:
        DataError: the path does not exist.
    """
    path = Path(str(settings.path))
    if not os.path.exists(path):  # Path.exists raises, e.g. for a name that is too long
        raise make_error(
            settings, f" does not exist: give what data.source={settings.source!r} reads"
        )
    return path


def read_lines(settings: config.Data, path: Path | zipfile.Path) -> Iterator[str]:
    """Yield a UTF-8 file's lines, blank ones too, without line ends; one is in memory at a time.

    A file whose name ends in `.gz` is decompressed while it is read.

    Raises:
        DataError: the file cannot be read, is blank, or has a line that is not text.
    """
    blank = True
    try:
        with open_bytes(path) as file:
            for number, raw in enumerate(iter(partial(file.readline, LINE_LIMIT + 1), b""), 1):
                if flaw := _find_flaw(raw):
                    raise make_error(settings, f": {path}, line {number} {flaw}")
                blank = blank and not raw.strip()
                yield raw.decode("utf-8-sig").rstrip("\r\n")
    except UNREADABLE as error:
        raise make_error(settings, f": {path} cannot be read ({error}): give another") from None
    if blank:
        raise make_error(settings, f": {path} is empty: write text to it, or take it away")


def open_bytes(path: Path | zipfile.Path) -> BufferedIOBase:
    """Open a file for reading, decompressed if its name ends in `.gz`."""
    if isinstance(path, Path) and path.suffix.lower() == ".gz":
        return cast(BufferedIOBase, gzip.open(path))
    return cast(BufferedIOBase, path.open("rb"))


def _find_flaw(line: bytes) -> str | None:
    """Say why these bytes are not a line of text, if they are not."""
    if len(line) > LINE_LIMIT:
        return f"is longer than {LINE_LIMIT} bytes: break it into shorter lines"
    if b"\0" in line:
        return "has NUL bytes: save it as UTF-8 text"
    try:
        line.decode()
    except UnicodeDecodeError:
        return "is not UTF-8: save it as UTF-8 text"
    return None
