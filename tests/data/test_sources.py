"""Every source on data made here, the corpora on the real ones, and every mistake's one line."""

import json
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fedgen_edge import config
from fedgen_edge.data import images
from fedgen_edge.data.sources import SOURCES, Corpus, detokenize, read
from fedgen_edge.errors import ConfigError, DataError, FedGenError, MissingExtraError

SHARED = Path(__file__).parents[3] / "shared" / "data"
FIRST, SECOND = "one two three four five", "six seven eight nine ten"


def settings(source: str, path: Path | None = None, **more: object) -> config.Data:
    place = {} if path is None else {"path": str(path)}
    return config.Data(source=source, **place, **more)  # pyright: ignore[reportArgumentType]


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def words_of(corpus: Corpus, split: str) -> int:
    assert corpus.splits is not None
    return sum(
        n for n, own in zip(corpus.examples.words, corpus.splits, strict=True) if own == split
    )


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of one package and one module, which say so when they are imported."""
    (tmp_path / "pack" / "tests").mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text(f'"""{FIRST}"""\nraise SystemExit("imported")')
    (tmp_path / "pack" / "tests" / "test_it.py").write_text('"""a test is not read at all"""')
    (tmp_path / "pack" / "b.py").write_text(
        f'class A:\n    """{SECOND}\n\n    margin\n      deeper\n    """\n'
        '    def f(self):\n        """too short"""'
    )
    (tmp_path / "single.py").write_text('async def f():\n    """the only text of a module"""')
    (tmp_path / "bare.py").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def test_every_source_of_the_settings_is_there() -> None:
    assert (*SOURCES, *images.SOURCES) == get_args(get_type_hints(config.Data)["source"])


# ---- docstrings


@pytest.mark.usefixtures("library")
def test_docstrings_are_read_and_cleaned_but_never_imported() -> None:
    corpus = read(settings("docstrings", packages=("pack", "single")))
    assert corpus.examples.texts == [
        FIRST,
        f"{SECOND}\n\nmargin\n  deeper",
        "the only text of a module",
    ]
    assert corpus.groups == ["pack", "pack", "single"]
    assert corpus.examples.words == [5 + 1, 7 + 1, 6 + 1]
    assert (corpus.labels, corpus.splits, corpus.duplicates) == (None, None, 0)


def test_docstrings_of_this_python_are_the_same_again_and_enough_in_each_package() -> None:
    corpus = read(config.Data())
    assert corpus == read(config.Data())
    assert corpus.groups is not None
    assert list(dict.fromkeys(corpus.groups)) == list(config.Data().packages)
    assert min(map(corpus.groups.count, config.Data().packages)) >= 50
    assert len(set(corpus.examples.texts)) == len(corpus.examples.texts)


@pytest.mark.usefixtures("library")
def test_package_that_is_not_there_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^data.packages='singel' .* did you mean 'single'\?$"):
        read(settings("docstrings", packages=("singel",)))
    for name in ("", ".", "..", "/", "a.b", "pack/tests"):
        with pytest.raises(ConfigError, match="is not in this Python"):
            read(settings("docstrings", packages=(name,)))


@pytest.mark.usefixtures("library")
def test_package_without_docstrings_is_refused() -> None:
    with pytest.raises(DataError, match=r"^data.packages=.*'bare' first, have no text"):
        read(settings("docstrings", packages=("pack", "bare")))


# ---- PTB and Brown


@pytest.mark.skipif(not (SHARED / "ptb").is_dir(), reason="needs ../shared/data/ptb")
def test_ptb_words_and_ends_of_lines_are_the_published_counts() -> None:
    # Mikolov's counts, <eos> included. In blocks of 32 lines no two are equal.
    corpus = read(settings("ptb", SHARED / "ptb", lines=32))
    assert corpus.duplicates == 0
    counts = {split: words_of(corpus, split) for split in ("train", "validation", "test")}
    assert counts == {"train": 929_589, "validation": 73_760, "test": 82_430}


@pytest.mark.skipif(not (SHARED / "ptb").is_dir(), reason="needs ../shared/data/ptb")
def test_ptb_validation_and_test_stay_whole_where_training_repeats_itself() -> None:
    corpus = read(settings("ptb", SHARED / "ptb"))
    assert corpus.duplicates == 1
    assert (words_of(corpus, "validation"), words_of(corpus, "test")) == (73_760, 82_430)
    assert corpus.groups is None


def test_ptb_lines_are_joined_and_of_equal_examples_the_test_keeps_its_own(tmp_path: Path) -> None:
    # 5 lines of 2 words in blocks of 2: words and ends are 4 + 2, 4 + 2, 2 + 1.
    (tmp_path / "ptb.train.txt").write_text(" a b \n c d \n\n e f \n g h \n i j \n")
    (tmp_path / "valid.txt").write_text(" k l \n")
    (tmp_path / "test.txt").write_text(" a b \n c d \n")
    corpus = read(settings("ptb", tmp_path, lines=2))
    assert corpus.examples.texts == ["a b\nc d", "k l", "e f\ng h", "i j"]
    assert corpus.splits == ["test", "validation", "train", "train"]
    assert corpus.examples.words == [6, 3, 6, 3]
    assert corpus.duplicates == 1


def test_brown_tokens_read_as_they_were_printed() -> None:
    tagged = "``/`` No/rb ''/'' ,/, he/pps said/vbd (/( AP/nn )/) ;/. ;/. and/or/cc Wow/uh !/. !/."
    assert detokenize(tagged) == '"No", he said (AP); and/or Wow!'


@pytest.mark.parametrize("packed", ["zip", "folder of the zip", "folder", "zip without a folder"])
def test_brown_is_read_from_a_zip_or_a_folder(tmp_path: Path, packed: str) -> None:
    files = {"cats.txt": "ca01 news\nck01 fiction\n", "ca01": "\tA/at b/nn\n\nc/nn\nd/nn\n"}
    files["ck01"] = "e/nn ./.\n"
    inside = "" if packed == "zip without a folder" else "brown/"
    with zipfile.ZipFile(tmp_path / "brown.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(inside + name, text)
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / name).write_text(text)
    places = {"folder": tmp_path / "out", "folder of the zip": tmp_path}
    corpus = read(settings("brown", places.get(packed, tmp_path / "brown.zip"), lines=2))
    assert corpus.examples.texts == ["A b c", "d", "e."]
    assert corpus.groups == corpus.labels == ["news", "news", "fiction"]


@pytest.mark.skipif(not (SHARED / "brown").is_dir(), reason="needs ../shared/data/brown")
def test_brown_has_its_fifteen_genres() -> None:
    corpus = read(settings("brown", SHARED / "brown", limit=3000))
    assert len(set(corpus.groups or [])) == 15
    assert len(corpus.examples.texts) == 3000


# ---- the user's own


def test_folder_gives_a_client_for_each_file_and_each_sub_folder(tmp_path: Path) -> None:
    (tmp_path / "bob" / "deep").mkdir(parents=True)
    (tmp_path / "ann.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline\r\n \r\n\r\nsecond\r\n")
    (tmp_path / "bob" / "x.txt").write_text("third")
    (tmp_path / "bob" / "deep" / "y.txt").write_text("fourth")
    (tmp_path / "bob" / "notes.md").write_text("not read")
    corpus = read(settings("folder", tmp_path))
    assert corpus.examples.texts == ["first\nline", "second", "fourth", "third"]
    assert corpus.groups == ["ann", "ann", "bob", "bob"]


def test_folder_reads_endings_in_any_case_and_leaves_hidden_and_empty_folders(
    tmp_path: Path,
) -> None:
    for name in ("bob/C.TXT", ".ipynb_checkpoints/x.txt", "__MACOSX/y.txt", "bob/.git/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "._ann.txt").write_bytes(b"\0")
    (tmp_path / "ANN.TXT").write_text("ann")
    corpus = read(settings("folder", tmp_path))
    assert (corpus.examples.texts, corpus.groups) == (["ann", "bob/C.TXT"], ["ANN", "bob"])


def test_folders_of_splits_lie_above_the_folders_of_clients(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "ann.txt").write_text(f"{split} of ann")
    corpus = read(settings("folder", tmp_path))
    assert corpus.groups == ["ann"] * 3
    assert corpus.splits == ["test", "validation", "train"]
    assert corpus.examples.texts == ["test of ann", "val of ann", "train of ann"]
    (tmp_path / "README.txt").write_text("about")
    assert "has 'README.txt' beside the split" in refusal(settings("folder", tmp_path))


def test_clients_may_bear_the_names_of_splits_beside_others(tmp_path: Path) -> None:
    for name in ("dev", "sales"):
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = read(settings("folder", tmp_path))
    assert (corpus.groups, corpus.splits) == (["dev", "sales"], None)


def test_jsonl_gives_text_client_and_label_and_skips_blank_texts(tmp_path: Path) -> None:
    rows = [{"t": "a b", "user": 7, "kind": "x"}, {"t": " ", "user": 7, "kind": "x"}]
    path = write(tmp_path / "d.jsonl", *rows, {"t": "c", "user": "eve", "kind": "y"})
    named = {"text_field": "t", "client_field": "user", "label_field": "kind"}
    corpus = read(settings("jsonl", path, **named))
    assert corpus.examples.texts == ["a b", "c"]
    assert (corpus.groups, corpus.labels) == (["7", "eve"], ["x", "y"])
    assert corpus.examples.words == [2 + 1, 1 + 1]


def test_first_of_identical_texts_is_kept_and_a_limit_takes_evenly_from_the_rest(
    tmp_path: Path,
) -> None:
    # 8 texts are different; 4 of 8 are the ones at 0, 8/4, 2 * 8/4, 3 * 8/4.
    path = write(tmp_path / "d.jsonl", *({"text": t} for t in "abacdefghb"))
    corpus = read(settings("jsonl", path, limit=4))
    assert (corpus.examples.texts, corpus.duplicates) == (["a", "c", "e", "g"], 2)
    assert read(settings("jsonl", path, limit=99)).examples.texts == list("abcdefgh")


def test_a_limit_that_leaves_clients_without_text_is_refused(tmp_path: Path) -> None:
    rows = ({"text": t, "who": "ann" if t < "e" else "bob"} for t in "abcdefgh")
    path = write(tmp_path / "d.jsonl", *rows)
    assert read(settings("jsonl", path, limit=2, client_field="who")).examples.texts == ["a", "e"]
    with pytest.raises(ConfigError, match=r"data\.limit=1 leaves 1 of the clients, 'bob' first"):
        read(settings("jsonl", path, limit=1, client_field="who"))


def test_a_clients_name_is_in_memory_once(tmp_path: Path) -> None:
    rows = ({"text": t, "who": "client a" if t < "e" else 7} for t in "abcdefgh")
    groups = read(settings("jsonl", write(tmp_path / "d.jsonl", *rows), client_field="who")).groups
    assert groups == ["client a"] * 4 + ["7"] * 4
    assert len({id(group) for group in groups}) == 2


def test_hub_reads_splits_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra fedgen-edge[hub]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", {"text": "a b", "who": "ann"}, {"text": "c", "who": "bob"})
    write(folder / "test.jsonl", {"text": "c", "who": "bob"}, {"text": "d e f", "who": "ann"})
    corpus = read(settings("hub", folder, client_field="who"))
    assert corpus.examples.texts == ["c", "d e f", "a b"]
    assert corpus.splits == ["test", "test", "train"]
    assert corpus.groups == ["bob", "ann", "ann"]
    with pytest.raises(DataError, match=r"split 'test', row 1 has no data.text_field='t'"):
        read(settings("hub", folder, text_field="t"))
    with pytest.raises(DataError, match=r"^data.path=.* is no data set by name or folder: "):
        read(settings("hub", tmp_path / "cache" / "nothing"))


def test_hub_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'the extra hub: pip install "datasets'):
        read(settings("hub", Path("squad")))


# ---- mistakes


def refusal(data: config.Data) -> str:
    with pytest.raises(FedGenError) as caught:
        read(data)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data.path={data.path!r}")
    return message


@pytest.mark.parametrize("source", ["ptb", "brown", "folder", "jsonl"])
def test_missing_path_is_refused(tmp_path: Path, source: str) -> None:
    message = refusal(settings(source, tmp_path / "none"))
    assert f"does not exist: give what data.source='{source}' reads" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty: write text"),
        (b" \n\n\t\n", "is empty: write text"),
        (b"good\nb\0d\n", "line 2 has NUL bytes: save it as UTF-8"),
        (b"good\n\xff\n", "line 2 is not UTF-8: save it as UTF-8"),
        (b"good\n\n" + b"x" * 10_000_000, "line 3 is longer than 1000000 bytes: break it"),
    ],
)
def test_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "ann.txt").write_bytes(content)
    assert f"ann.txt {expected}" in refusal(settings("folder", tmp_path)).replace(",", "")
    (tmp_path / "d.jsonl").write_bytes(content.replace(b"good", b'{"text": "a"}'))
    assert f"d.jsonl {expected}" in refusal(settings("jsonl", tmp_path / "d.jsonl")).replace(
        ",", ""
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", ", line 2 is not JSON (Expecting property name"),
        ("[" * 100_000, ", line 2 is not JSON (maximum recursion"),
        ("3", ", line 2 is not a JSON object: write {...}"),
        ('{"t": "a", "u": 1}', ", line 2 has no data.text_field='text': its fields are t, u"),
        ('{"text": 3}', ", line 2: data.text_field='text' holds int, not text: make it a string"),
        ('{"text": {"a": 1}}', "holds dict, not text"),
        ('{"text": "a", "who": null}', "data.client_field='who' holds NoneType, not text"),
        (r'{"text": "a\u0000"}', "holds a NUL or half a character: remove it"),
        (r'{"text": "a\ud800"}', "holds a NUL or half a character: remove it"),
        ('{"text": "a"}', ", line 2 has no data.client_field='who': its fields are text"),
        ('{"text": "a", "who": [1]}', "data.client_field='who' holds list, not text"),
        ('{"text": "a", "who": "../x"}', "data.client_field='who' is '../x': use at most 64"),
        ('{"text": "a", "who": ".."}', "data.client_field='who' is '..': use at most 64"),
        ('{"text": "a", "who": ""}', "data.client_field='who' is '': use at most 64"),
        ('{"text": "a", "who": "%s"}' % ("x" * 65), "use at most 64 characters, without slashes"),
        ('{"text": " ", "who": "eve"}', ": 1 of the clients, 'eve' first, have no text that"),
        ('{"text": "first", "who": "eve"}', ": 1 of the clients, 'eve' first, have no text that"),
    ],
)
def test_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "first", "who": "ann"}\n' + line)
    assert expected in refusal(settings("jsonl", path, client_field="who"))


def test_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    expected = " holds no text for data.source='folder': add some"
    assert expected in refusal(settings("folder", tmp_path))
    assert "cannot be read ([Errno 21]" in refusal(settings("jsonl", tmp_path))


def test_file_and_folder_of_one_client_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann.txt").write_text("a")
    assert "has both 'ann.txt' and a folder 'ann'" in refusal(settings("folder", tmp_path))


def test_ptb_with_a_file_missing_names_it(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("a")
    assert "valid.txt cannot be read" in refusal(settings("ptb", tmp_path))


def test_what_is_not_brown_is_refused(tmp_path: Path) -> None:
    assert "is not the Brown corpus" in refusal(settings("brown", tmp_path))
    (tmp_path / "cats.txt").write_text("ca01 news\nca02\n")
    (tmp_path / "ca01").write_text("a/b")
    assert "cats.txt, line 2 is not like" in refusal(settings("brown", tmp_path))
    (tmp_path / "cats.txt").write_text("ca09 news")
    assert "ca09 cannot be read" in refusal(settings("brown", tmp_path))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("other", "a")
    assert "cats.txt cannot be read" in refusal(settings("brown", tmp_path / "x.zip"))
