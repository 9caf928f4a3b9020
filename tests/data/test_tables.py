"""Files of records: each value stays what the file says, and every mistake is one line."""

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge.config import Data
from fedgen_edge.data.sources import read
from fedgen_edge.errors import ConfigError, FedGenError, MissingExtraError

ROWS = [
    {"text": "one, two", "client": "007", "label": "NA"},
    {"text": 'a "quoted"\nline', "client": "7", "label": "null"},
    {"text": "2024-01-02", "client": "2024-01-03", "label": "1.50"},
]
"""Values that type inference would change."""
FIELDS: Any = {"client_field": "client", "label_field": "label"}

SHORTENED = gzip.compress(b"text\na\n", mtime=0)[:-9]


def settings(source: Any, path: Path, **more: Any) -> Data:
    return Data(source=source, path=str(path), **more)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the file's ending says, in any case."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra fedgen-edge[hub]")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        return path
    plain = path.with_name("plain")
    with plain.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            json.dump(rows, file, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    content = plain.read_bytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def refusal(data: Data) -> str:
    with pytest.raises(FedGenError) as caught:
        read(data)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data.path={data.path!r}")
    return message


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("csv", "d.csv"),
        ("csv", "D.CSV"),
        ("csv", "d.csv.gz"),
        ("json", "d.json"),
        ("json", "d.json.gz"),
        ("jsonl", "d.jsonl"),
        ("jsonl", "d.jsonl.gz"),
        ("parquet", "d.parquet"),
    ],
)
def test_every_value_stays_as_it_was_written(tmp_path: Path, source: str, name: str) -> None:
    corpus = read(settings(source, write(tmp_path / name, ROWS), **FIELDS))
    assert corpus.examples.texts == [row["text"] for row in ROWS]
    assert corpus.groups == [row["client"] for row in ROWS]
    assert corpus.labels == [row["label"] for row in ROWS]


@pytest.mark.parametrize("name", ["d.csv", "d.json", "d.jsonl", "d.parquet"])
def test_blank_texts_are_left_out_and_counted(tmp_path: Path, name: str) -> None:
    blanks = [{**ROWS[0], "text": text} for text in (None, "", " \n ")]
    path = write(tmp_path / name, [ROWS[0], *blanks, ROWS[1], ROWS[1]])
    corpus = read(settings(path.suffix[1:], path, **FIELDS))
    assert corpus.examples.texts == [ROWS[0]["text"], ROWS[1]["text"]]
    assert (corpus.blanks, corpus.duplicates) == (3, 1)


def test_a_csv_may_have_a_mark_of_its_encoding_and_windows_ends_of_lines(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("\ufefftext,client\r\nä,ann\r\n\r\n".encode())
    corpus = read(settings("csv", tmp_path / "d.csv", client_field="client"))
    assert (corpus.examples.texts, corpus.groups) == (["ä"], ["ann"])


def test_a_text_of_a_csv_may_be_as_long_as_a_line_and_its_limit_is_given_back(
    tmp_path: Path,
) -> None:
    before = csv.field_size_limit()
    long = "word " * 100_000
    path = write(tmp_path / "d.csv", [{"text": long}])
    assert read(settings("csv", path)).examples.words == [100_000 + 1]
    assert csv.field_size_limit() == before


def test_parquet_reads_columns_that_are_named_and_codes_of_text(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra fedgen-edge[hub]")
    arrow = pytest.importorskip("pyarrow")
    columns = {
        "text": arrow.array([f"text {i}" for i in range(2500)], arrow.large_string()),
        "client": arrow.array(["ann", "bob"] * 1250).dictionary_encode(),
        "label": arrow.array(range(2500)),
        "other": arrow.array([b"\xff"] * 2500),
    }
    parquet.write_table(arrow.table(columns), tmp_path / "d.parquet", row_group_size=900)
    corpus = read(settings("parquet", tmp_path / "d.parquet", **FIELDS))
    assert corpus.examples.texts == [f"text {i}" for i in range(2500)]
    assert corpus.groups == ["ann", "bob"] * 1250
    assert corpus.labels == [str(i) for i in range(2500)]


# ---- mistakes


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        (name, wrong, right)
        for name, right in (
            ("d.csv", "csv"),
            ("D.CSV", "csv"),
            ("d.csv.gz", "csv"),
            ("d.parquet", "parquet"),
            ("d.json", "json"),
            ("d.jsonl", "jsonl"),
        )
        for wrong in ("jsonl", "json", "csv", "parquet", "hub", "folder", "ptb")
        if wrong != right
    ],
)
def test_a_file_of_another_source_is_answered_with_that_source(
    tmp_path: Path, name: str, wrong: str, right: str
) -> None:
    path = write(tmp_path / name, ROWS)
    assert refusal(settings(wrong, path)).endswith(
        f" is one file that data.source={wrong!r} does not read: set data.source={right!r}"
    )


def test_lines_of_json_may_be_called_json(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS).rename(tmp_path / "d.json")
    assert len(read(settings("jsonl", path)).examples) == 3
    assert "set data.source='jsonl' if each line is an object" in refusal(settings("json", path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.csv", b"", " has no data.text_field='text': its fields are none"),
        ("d.csv", b"body,who\na,b\n", " has no data.text_field='text': its fields are body, who"),
        (
            "d.csv",
            b"text,text\na,b\n",
            " has two data.text_field='text': its fields are text,",
        ),
        ("d.csv", b"text\n", " holds no text for data.source='csv': add some"),
        ("d.csv", b"text,n\na,1\nb, c,2\n", ", line 3 has not as many values as the first line"),
        ("d.csv", b"text,n\na,1\nb\n", ", line 3 has not as many values as the first line"),
        ("d.csv", b"text\n\xe4\n", " cannot be read as CSV in UTF-8 ('utf-8' codec"),
        (
            "d.csv",
            b'text\n"a\n',
            " cannot be read as CSV in UTF-8 (unexpected end of data): correct",
        ),
        ("d.csv", b"text\na\0b\n", ""),
        ("d.csv.gz", b"text\na\n", " cannot be read as CSV in UTF-8 (Not a gzipped file"),
        ("d.csv.gz", SHORTENED, " cannot be read as CSV in UTF-8 (Compr"),
        ("d.json", b"", " is not one JSON array (Expecting value"),
        ("d.json", b'{"data": []}', " is not a JSON array: write [{...}, {...}]"),
        ("d.json", b'["a"]', ", entry 1 is not a JSON object: write {...}"),
        ("d.json", b'[{"text": "a"}, {"t": 1}]', ", entry 2 has no data.text_field='text'"),
        ("d.json", b"[" * 100_000, " is not one JSON array (maximum recursion"),
        ("d.json", b"[" + b"9" * 5000 + b"]", " is not one JSON array (Exceeds the limit"),
        ("d.jsonl.gz", b'{"text": "a"}', "cannot be read (Not a gzipped file"),
        ("d.parquet", b"", " cannot be read as Parquet (Parquet file size is 0 bytes): correct it"),
        ("d.parquet", b"PAR1" * 9, " cannot be read as Parquet ("),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    source = name.removesuffix(".gz").rpartition(".")[2]
    if source == "parquet":
        pytest.importorskip("pyarrow", reason="needs the extra fedgen-edge[hub]")
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(settings(source, tmp_path / name))


@pytest.mark.parametrize("source", ["csv", "json", "parquet"])
def test_a_folder_in_place_of_a_file_is_answered_with_the_source_of_folders(
    tmp_path: Path, source: str
) -> None:
    assert "is a folder: give one file, or read all with data.source='hub'" in refusal(
        settings(source, tmp_path)
    )


def test_fields_of_parquet_that_are_missing_or_no_text_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", [{"body": "a", "n": 1}])
    said = refusal(settings("parquet", path))
    assert said.endswith(" has no data.text_field='text': its fields are body, n")
    assert ", row 1: data.text_field='n' holds int" in refusal(
        settings("parquet", path, text_field="n")
    )


def test_only_parquet_and_the_hub_want_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {kind: write(tmp_path / f"d.{kind}", ROWS) for kind in ("csv", "json", "jsonl")}
    table = write(tmp_path / "d.parquet", ROWS)
    for name in ("datasets", "pandas", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for kind, path in paths.items():
        assert len(read(settings(kind, path)).examples) == 3
    with pytest.raises(MissingExtraError, match=r"'parquet' needs the extra hub: .*datasets"):
        read(settings("parquet", table))


# ---- Hugging Face data sets


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra fedgen-edge[hub]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def test_one_of_several_configurations_is_taken_by_its_name(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    card = ["---", "configs:"]
    for name in ("one", "two"):
        write(folder / f"{name}.jsonl", [{"text": f"text of {name}"}])
        card += [f"- config_name: {name}", f"  data_files: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---"]))
    corpus = read(settings("hub", folder, config="two"))
    assert corpus.examples.texts == ["text of two"]
    for config in (None, "three"):
        assert refusal(settings("hub", folder, config=config)).endswith(
            f" with data.config={config!r} is no data set: set data.config to one of 'one', 'two'"
        )
    with pytest.raises(ConfigError, match=r"data\.config='two' is for data\.source='hub'"):
        read(settings("jsonl", folder / "one.jsonl", config="two"))


def test_what_save_to_disk_wrote_is_read(hub: Any, tmp_path: Path) -> None:
    few = hub.Dataset.from_list(ROWS)
    few.save_to_disk(str(tmp_path / "one"))
    hub.DatasetDict({"train": few.select([0, 1]), "val": few.select([2])}).save_to_disk(
        str(tmp_path / "splits")
    )
    one = read(settings("hub", tmp_path / "one", **FIELDS))
    assert one.examples.texts == [row["text"] for row in ROWS]
    splits = read(settings("hub", tmp_path / "splits", **FIELDS))
    assert splits.examples.texts == [ROWS[2]["text"], ROWS[0]["text"], ROWS[1]["text"]]
    assert splits.splits == ["validation", "train", "train"]
    with pytest.raises(FedGenError, match=r"written by save_to_disk: leave data.config='b' out"):
        read(settings("hub", tmp_path / "one", config="b"))
    for note in ("state.json", "dataset_info.json"):
        (tmp_path / "one" / note).write_text("{}")
    with pytest.raises(FedGenError, match="is no data set by name or folder"):
        read(settings("hub", tmp_path / "one"))


def test_a_blank_text_of_a_data_set_is_left_out(hub: Any, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    hub.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    corpus = read(settings("hub", tmp_path / "set"))
    assert (corpus.examples.texts, corpus.blanks) == (["a", "b"], 1)
