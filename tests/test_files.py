"""Writes are whole or not there: whatever fails on the way, the old content stands."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedgen_edge import files


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses when what was written is to be seen on it."""

    def refuse(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", refuse)


# ---- a file


def test_write_makes_the_file_and_its_folders(tmp_path: Path) -> None:
    files.write(tmp_path / "a" / "b.txt", b"new")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"new"
    assert names(tmp_path) == ["a", "a/b.txt"]


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a longer content")
    files.write(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_fails_while_it_is_made_leaves_the_old_file(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half of"
        raise ValueError("stopped")

    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="stopped"):
        files.write_parts(path, parts())
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_a_reader_of_the_old_file_keeps_it_to_its_end(tmp_path: Path) -> None:
    # Replaced, not overwritten: an open handle still sees the old file.
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        files.write(path, b"new")
        assert reader.read() == b"old"


@pytest.mark.usefixtures("full_disk")
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="no space left"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


# ---- a folder


def fill(draft: Path, content: str) -> None:
    (draft / "inner").mkdir()
    (draft / "inner" / "a.txt").write_text(content)


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    with files.replace_folder(tmp_path / "run" / "done") as draft:
        fill(draft, "new")
        assert not (tmp_path / "run" / "done").exists()
    assert (tmp_path / "run" / "done" / "inner" / "a.txt").read_text() == "new"
    assert names(tmp_path / "run") == ["done", "done/inner", "done/inner/a.txt"]


def test_a_new_folder_takes_the_old_ones_place_with_all_that_was_in_it(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "old.txt").write_text("old")
    with files.replace_folder(tmp_path / "done") as draft:
        fill(draft, "new")
    assert names(tmp_path) == ["done", "done/inner", "done/inner/a.txt"]


@pytest.mark.parametrize("stop", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_the_old_folder_untouched(
    stop: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "old.txt").write_text("old")
    with pytest.raises(stop), files.replace_folder(tmp_path / "done") as draft:  # noqa: PT012
        fill(draft, "new")
        raise stop
    assert names(tmp_path) == ["done", "done/old.txt"]
    assert (tmp_path / "done" / "old.txt").read_text() == "old"


@pytest.mark.usefixtures("full_disk")
def test_a_folder_that_cannot_be_kept_leaves_the_old_one_untouched(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "old.txt").write_text("old")
    with (
        pytest.raises(OSError, match="no space left"),
        files.replace_folder(tmp_path / "done") as draft,
    ):
        fill(draft, "new")
    assert names(tmp_path) == ["done", "done/old.txt"]


def test_what_a_killed_process_left_in_the_draft_is_not_taken_along(tmp_path: Path) -> None:
    # The same process number again: drafts are named by it.
    stale = tmp_path / f".done.{os.getpid()}"
    stale.mkdir()
    (stale / "half.txt").write_text("half")
    with files.replace_folder(tmp_path / "done") as draft:
        fill(draft, "new")
    assert names(tmp_path) == ["done", "done/inner", "done/inner/a.txt"]


# ---- a digest


def test_a_digest_is_the_sha_256_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert files.digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_what_a_killed_process_left_is_put_right(tmp_path: Path) -> None:
    (tmp_path / ".a.json.4711").write_text("half")
    (tmp_path / "sub" / ".b.4711").mkdir(parents=True)
    (tmp_path / ".c.4711.old").mkdir()  # replaced, and the new one not yet in its place
    (tmp_path / ".d.4711.old").mkdir()
    (tmp_path / "d").mkdir()  # the new one is in its place
    (tmp_path / ".lock").write_text("")
    files.clean_drafts(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", "c", "d", "sub"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").touch()
    real = Path.replace

    def fails(self: Path, to: Path) -> Path:
        if Path(to) == target and not self.name.endswith(".old"):
            raise OSError("no")
        return real(self, to)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no"), files.replace_folder(target) as draft:
        (draft / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["adapter", "old"]
