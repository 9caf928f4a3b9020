"""Read text from records with named fields: JSON, CSV, Parquet, and Hugging Face data sets.

Python's own modules read JSON and CSV, since a value must stay as the file has it: type inference
would turn a client's name into a date, 007 into 7, and NA into a missing value.
"""

import csv
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedgen_edge import config
from fedgen_edge.data.folders import SPLIT_OF, SPLITS
from fedgen_edge.data.text_files import (
    LINE_LIMIT,
    UNREADABLE,
    TextRow,
    get_data_path,
    make_error,
    open_bytes,
    read_lines,
)
from fedgen_edge.errors import DataError, MissingExtraError

CLIENT_NAME = re.compile(r"(?![. ]+$)[^/\\\0-\x1f]{1,64}")
FIELDS = ("text_field", "client_field", "label_field")
ENDINGS = {
    **{".csv": "csv", ".parquet": "parquet"},
    **{".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"},
}
"""The source that reads a file with this ending, optionally followed by `.gz`."""
SAVED_FILES = ("dataset_dict.json", "state.json")
"""A folder written by `save_to_disk` has one of these."""


def check_ending(settings: config.Data) -> None:
    """Refuse a file that needs another source.

    Raises:
        DataError: the file needs another source, which the message names.
    """
    path = Path(str(settings.path))
    source = ENDINGS.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if source is None or not os.path.isfile(path):
        return
    if source == "json" and settings.source != "json" and not _is_array(path):
        source = "jsonl"
    if source != settings.source:
        raise make_error(
            settings,
            f" is one file that data.source={settings.source!r} does not read: "
            f"set data.source={source!r}",
        )


def _is_array(path: Path) -> bool:
    try:
        with open_bytes(path) as file:
            return file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except UNREADABLE:
        return False


def read_jsonl(settings: config.Data) -> Iterator[TextRow]:
    """Read one JSON object per line."""
    for number, line in enumerate(read_lines(settings, get_data_path(settings)), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(": line")[0]
            raise make_error(
                settings, f", line {number} is not JSON ({reason}): correct it"
            ) from None
        if not isinstance(record, dict):
            raise make_error(settings, f", line {number} is not a JSON object: write {{...}}")
        yield make_row(settings, record, f", line {number}")


def read_json(settings: config.Data) -> Iterator[TextRow]:
    """Read one JSON array of objects."""
    path = _get_file(settings)
    try:
        with open_bytes(path) as file:
            records = json.load(file)
    except (ValueError, RecursionError, *UNREADABLE) as error:
        raise make_error(
            settings,
            f" is not one JSON array ({error}): correct it, or set data.source='jsonl' if each "
            "line is an object",
        ) from None
    if not isinstance(records, list):
        raise make_error(settings, " is not a JSON array: write [{...}, {...}]")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise make_error(settings, f", entry {number} is not a JSON object: write {{...}}")
        yield make_row(settings, record, f", entry {number}")


def read_csv(settings: config.Data) -> Iterator[TextRow]:
    """Read comma-separated values below a header line; each value is text."""
    path = _get_file(settings)
    previous_limit = csv.field_size_limit(LINE_LIMIT)
    try:
        raw_file = cast(BinaryIO, open_bytes(path))
        with io.TextIOWrapper(raw_file, "utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_names(settings, reader.fieldnames or ())
            for record in reader:
                yield make_row(
                    settings, _check_record(settings, record, reader), _format_place(reader)
                )
    except (ValueError, csv.Error, *UNREADABLE) as error:
        raise make_error(
            settings, f" cannot be read as CSV in UTF-8 ({error}): correct it"
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def _check_record(
    settings: config.Data, record: dict[str, Any], reader: csv.DictReader
) -> dict[str, Any]:
    if None in record or None in record.values():
        raise make_error(
            settings,
            f"{_format_place(reader)} has not as many values as the first line has "
            "names: put text with "
            'commas into "quotes"',
        )
    return record


def _format_place(reader: csv.DictReader) -> str:
    return f", line {reader.line_num}"


def read_parquet(settings: config.Data) -> Iterator[TextRow]:
    """Read one Parquet file, in parts, and only the columns that the settings name."""
    path = _get_file(settings)
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("data.source='parquet'", "hub") from None
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            columns = _check_names(settings, file.schema_arrow.names)
            batches = file.iter_batches(1000, columns=columns)
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, record in enumerate(records, start=1):
                yield make_row(settings, record, f", row {number}")
    except (ValueError, NotImplementedError, *UNREADABLE) as error:
        reason = str(error).partition("\n")[0]
        raise make_error(settings, f" cannot be read as Parquet ({reason}): correct it") from None


def _check_names(settings: config.Data, names: Collection[str]) -> list[str]:
    """Return the fields that the settings name, each of which must occur exactly once."""
    wanted = [getattr(settings, setting) for setting in FIELDS]
    for setting, name in zip(FIELDS, wanted, strict=True):
        if name is not None and list(names).count(name) != 1:
            field_names = ", ".join(names) or "none"
            quantity = "two" if name in names else "no"
            raise make_error(
                settings, f" has {quantity} data.{setting}={name!r}: its fields are {field_names}"
            )
    return [name for name in dict.fromkeys(wanted) if name is not None]


def _get_file(settings: config.Data) -> Path:
    path = get_data_path(settings)
    if path.is_dir():
        raise make_error(
            settings, " is a folder: give one file, or read all with data.source='hub'"
        )
    return path


def read_hub(settings: config.Data) -> Iterator[TextRow]:
    """Read a Hugging Face data set, by name or folder; its own splits are kept."""
    splits = _load_dataset(settings)
    if not SPLIT_OF.keys() & splits.keys():
        split_names = ", ".join(map(str, splits))
        raise make_error(
            settings, f" has no split train, validation or test, only {split_names}: rename one"
        )
    for split, names in SPLITS.items():
        for name in (name for name in names if name in splits):
            for number, record in enumerate(splits[name], start=1):
                row = make_row(settings, record, f", split {name!r}, row {number}")
                yield row._replace(split=split)


def _load_dataset(settings: config.Data) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise MissingExtraError("data.source='hub'", "hub") from None
    path = str(settings.path)
    try:
        if any(os.path.isfile(Path(path, name)) for name in SAVED_FILES):
            if settings.config is not None:
                raise make_error(
                    settings,
                    f" was written by save_to_disk: leave data.config={settings.config!r} out",
                )
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return cast(Mapping[str, Any], splits)
        return cast(Mapping[str, Any], datasets.load_dataset(path, settings.config))
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError,
            NotImplementedError, DatasetsError) as error:  # fmt: skip
        raise _explain_failure(settings, str(error)) from None


def _explain_failure(settings: config.Data, reason: str) -> DataError:
    """Explain in one line why `datasets` cannot load."""
    if choice := re.search(r"[Aa]vailable(?: configs)?: \[(.*)\]", reason):
        return make_error(
            settings,
            f" with data.config={settings.config!r} is no data set: set data.config to one of "
            f"{choice[1]}",
        )
    return make_error(
        settings, f" is no data set by name or folder: {reason.partition(chr(10))[0]}"
    )


def make_row(settings: config.Data, record: Mapping[str, Any], place: str) -> TextRow:
    """Make the row of a record from the fields that the settings name.

    Raises:
        DataError: a field is missing or holds something else; names its place.
    """
    text = _read_field(settings, record, "text_field", place)
    client = _read_field(settings, record, "client_field", place)
    if client is not None and not CLIENT_NAME.fullmatch(client):
        problem = f"data.client_field={settings.client_field!r} is {client[:64]!r}"
        rule = "use at most 64 characters, without slashes, as it will name a folder"
        raise make_error(settings, f"{place}: {problem}: {rule}")
    return TextRow(text or "", client, _read_field(settings, record, "label_field", place))


def _read_field(
    settings: config.Data, record: Mapping[str, Any], setting: str, place: str
) -> str | None:
    """Return the text of a field, if the settings name one; a client or a label may be a number.

    A null text counts as blank.
    """
    name = getattr(settings, setting)
    if name is None:
        return None
    if name not in record:
        field_names = ", ".join(map(str, record))
        raise make_error(
            settings, f"{place} has no data.{setting}={name!r}: its fields are {field_names}"
        )
    value = record[name]
    if value is None and setting == "text_field":
        return None
    if isinstance(value, int) and setting != "text_field":
        return sys.intern(str(value))
    problem = f"{place}: data.{setting}={name!r}"
    if not isinstance(value, str):
        raise make_error(
            settings, f"{problem} holds {type(value).__name__}, not text: make it a string"
        )
    if re.search("[\0\ud800-\udfff]", value):
        raise make_error(settings, f"{problem} holds a NUL or half a character: remove it")
    return value if setting == "text_field" else sys.intern(str(value))
