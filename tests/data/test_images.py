import io
import os
import pickle
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SHARED
from fedgen_edge.config import Data
from fedgen_edge.data import images
from fedgen_edge.data.corpus import Corpus, Images
from fedgen_edge.data.sources import read
from fedgen_edge.errors import ConfigError, DataError


def settings(source: Any, path: Path | None = None, **more: Any) -> Data:
    return Data(source=source, path=str(path) if path else None, **more)


def pixels_of(corpus: Corpus) -> torch.Tensor:
    assert isinstance(corpus.examples, Images)
    return corpus.examples.pixels


def paint(path: Path, value: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (value,) * len(Image.new(mode, (1, 1)).getbands())
    Image.new(mode, size, colour if len(colour) > 1 else value).save(path)
    return path


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Two classes of three pictures of one colour each."""
    for at, name in enumerate(("cat", "dog")):
        for i in range(3):
            paint(tmp_path / name / f"{i}.png", 10 * at + i)
    return tmp_path


# ---- digits


def test_digits_are_scikit_learns_in_bytes() -> None:
    corpus = read(settings("digits"))
    # 0 to 16 become 0 to 255: sixteen is full, eight is half, rounded to the even number.
    assert pixels_of(corpus).shape == (1797, 1, 8, 8)
    assert set(pixels_of(corpus).unique().tolist()) == {round(n * 255 / 16) for n in range(17)}
    assert corpus.labels is not None
    assert corpus.labels[:3] == ["0", "1", "2"]


# ---- CIFAR-10


def batch(first: int) -> tuple[np.ndarray, list[int]]:
    return np.add.outer([first, first + 1], np.arange(3072)).astype(np.uint8), [3, 9]


def test_cifars_pickles_and_binaries_are_the_same_pictures(tmp_path: Path) -> None:
    old, raw = tmp_path / "pickles", tmp_path / "binaries"
    old.mkdir()
    raw.mkdir()
    for name, first in (("data_batch_1", 0), ("test_batch", 7)):
        data, labels = batch(first)
        (old / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}, protocol=2))
        rows = [struct.pack("B", n) + row.tobytes() for n, row in zip(labels, data, strict=True)]
        (raw / f"{name}.bin").write_bytes(b"".join(rows))
    one, two = read(settings("cifar10", old)), read(settings("cifar10", raw))
    assert torch.equal(pixels_of(one), pixels_of(two))
    # the first 1,024 bytes are red, row by row; tests come first
    assert pixels_of(one)[0, 0, 0, :3].tolist() == [7, 8, 9]
    assert (one.labels, one.splits) == (["cat", "truck"] * 2, ["test"] * 2 + ["train"] * 2)
    assert (two.labels, two.splits) == (one.labels, one.splits)


def test_cifar_is_scaled_to_the_size_that_is_asked_for(tmp_path: Path) -> None:
    planes = np.repeat(np.uint8([10, 20, 30]), 1024)  # one colour stays what it is at any size
    (tmp_path / "test_batch.bin").write_bytes(b"\x03" + planes.tobytes())
    pictures = pixels_of(read(settings("cifar10", tmp_path, size=16)))
    colour = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.equal(pictures, colour.expand(1, 3, 16, 16))


def test_packed_cifar_that_was_changed_is_read_again(tmp_path: Path) -> None:
    for when, value in enumerate((5, 9), 1):
        drawn = io.BytesIO()
        Image.new("RGB", (32, 32), (value,) * 3).save(drawn, "webp", lossless=True)
        blob = np.frombuffer(drawn.getvalue(), np.uint8)
        np.savez(tmp_path / "test.npz", webp=blob, offsets=[0, len(blob)], labels=[0])
        os.utime(tmp_path / "test.npz", (when, when))
        assert pixels_of(read(settings("cifar10", tmp_path))).unique().tolist() == [value]


def test_packed_cifar_that_is_damaged_in_any_way_is_named_in_one_line(tmp_path: Path) -> None:
    drawn, path = io.BytesIO(), tmp_path / "test.npz"
    Image.new("RGB", (32, 32)).save(drawn, "webp", lossless=True)
    blob = np.frombuffer(drawn.getvalue(), np.uint8)
    np.savez_compressed(path, webp=blob, offsets=[0, len(blob)], labels=[0])
    whole = path.read_bytes()
    cut = [whole[:at] for at in range(len(whole))]
    altered = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(len(whole))]
    for damaged in (*cut, *altered):
        path.write_bytes(damaged)
        with suppress(DataError):  # some bytes mean nothing
            read(settings("cifar10", tmp_path))
    for wrong in ({"offsets": 5}, {"offsets": [0.0, 9.0]}, {"offsets": [0]}, {"labels": ["a"]}):
        np.savez(path, **{"webp": blob, "offsets": [0, len(blob)], "labels": [0], **wrong})
        with pytest.raises(DataError, match=r"test\.npz cannot be read"):
            read(settings("cifar10", tmp_path))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('run')",))


def test_a_pickle_that_calls_anything_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(DataError, match=r"test_batch is no batch \(it asks for builtins\.exec\)"):
        read(settings("cifar10", tmp_path))


@pytest.mark.parametrize("claim", [10**11, 10**16])
def test_an_archive_that_claims_more_than_it_can_hold_is_refused(
    tmp_path: Path, claim: int
) -> None:
    header = io.BytesIO()
    told = {"descr": "|u1", "fortran_order": False, "shape": (claim,)}
    np.lib.format.write_array_header_1_0(header, told)
    with zipfile.ZipFile(tmp_path / "test.npz", "w") as archive:
        archive.writestr("webp.npy", header.getvalue() + b"few")
    with pytest.raises(DataError, match=rf"test\.npz cannot be read .*claims {claim} bytes"):
        read(settings("cifar10", tmp_path))


@pytest.mark.parametrize("claim", [10**11, 10**16])
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "frame", "shape"])
def test_a_pickle_that_claims_more_than_it_has_is_refused(
    tmp_path: Path, kind: str, claim: int
) -> None:
    size = struct.pack("<Q", claim)
    array = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]}, protocol=2)
    content = {
        "bytes": b"\x80\x04\x8e" + size + b"few.",
        "bytearray": b"\x80\x05\x96" + size + b"few.",
        "frame": b"\x80\x04\x95" + size + b"N.",
        "shape": array.replace(b"M\x00\x0c", b"\x8a\x08" + size),
    }
    (tmp_path / "test_batch").write_bytes(content[kind])
    with pytest.raises(DataError, match="test_batch is no batch"):
        read(settings("cifar10", tmp_path))


@pytest.mark.parametrize("labels", [["a"], 5, [[0]], [None], [0.5], [-1]])
def test_labels_that_are_no_numbers_of_classes_are_named(tmp_path: Path, labels: Any) -> None:
    held = {b"data": np.zeros((1, 3072), np.uint8), b"labels": labels}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(held))
    with pytest.raises(DataError, match="test_batch"):
        read(settings("cifar10", tmp_path))


def test_a_short_binary_and_a_high_label_are_named(tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    path.write_bytes(bytes(3072))
    with pytest.raises(DataError, match=r"test_batch\.bin is cut short"):
        read(settings("cifar10", tmp_path))
    path.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(DataError, match="1 pictures and 1 labels, between 10 and 10"):
        read(settings("cifar10", tmp_path))


def test_packed_cifar_is_read_as_its_pixels(tmp_path: Path) -> None:
    if not (SHARED / "cifar10").is_dir():
        pytest.skip("the data folder beside the repository is not here: no CIFAR-10")
    for name in ("small_train.npz", "small_test.npz"):
        (tmp_path / name).symlink_to(SHARED / "cifar10" / name)
    corpus = read(settings("cifar10", tmp_path))
    assert corpus.splits is not None
    assert (corpus.splits.count("test"), corpus.splits.count("train")) == (500, 1000)
    assert corpus.labels is not None
    assert {corpus.labels.count(name) for name in images.CIFAR10} == {150}
    # published means of the whole training set: 0.4914, 0.4822, 0.4465
    means = pixels_of(corpus)[500:].float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.02, rtol=0)


# ---- folders


def test_a_folder_of_classes_is_read_in_order(zoo: Path) -> None:
    corpus = read(settings("images", zoo))
    assert corpus.labels == ["cat"] * 3 + ["dog"] * 3
    assert pixels_of(corpus)[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert isinstance(corpus.examples, Images)
    assert corpus.examples.classes == ("cat", "dog")


def test_equal_pictures_count_once_and_tests_come_first(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "cat" / "a.png", 5)
    paint(tmp_path / "train" / "cat" / "b.png", 6)
    paint(tmp_path / "test" / "cat" / "c.png", 5)
    corpus = read(settings("images", tmp_path))
    assert (corpus.splits, corpus.duplicates) == (["test", "train"], 1)


def test_pictures_are_scaled_where_a_size_is_given(zoo: Path) -> None:
    paint(zoo / "dog" / "wide.png", 99, (32, 16))
    with pytest.raises(DataError, match=r"wide\.png is 32 x 16 .* give data\.size"):
        read(settings("images", zoo))
    assert pixels_of(read(settings("images", zoo, size=8))).shape == (7, 3, 8, 8)


@pytest.mark.parametrize(
    ("mode", "size", "said"),
    [
        ("RGB", (1, 1), "is 1 x 1: sides must be from 4 to 1024"),
        ("RGB", (2000, 8), "is 2000 x 8: sides"),
        ("CMYK", (8, 8), "is CMYK: save it as 8-bit RGB or grey"),
        ("I;16", (8, 8), "is I;16: save it"),
        ("L", (8, 8), "8 x 8 with 1 channels, 0.png is 8 x 8 with 3"),
    ],
)
def test_an_odd_picture_is_named(zoo: Path, mode: str, size: tuple[int, int], said: str) -> None:
    path = zoo / "dog" / ("odd.jpg" if mode == "CMYK" else "odd.png")
    paint(path, 1, size, mode)
    with pytest.raises(DataError) as told:
        read(settings("images", zoo))
    assert path.name in str(told.value)
    assert said in str(told.value)


def test_a_bomb_is_refused_before_it_unfolds(zoo: Path) -> None:
    # a header that promises 20,000 x 20,000 pixels, and nothing behind it
    whole = paint(zoo / "dog" / "bomb.png", 1).read_bytes()
    claimed = struct.pack(">II", 20000, 20000)
    (zoo / "dog" / "bomb.png").write_bytes(whole[:16] + claimed + whole[24:])
    with pytest.raises(DataError, match=r"bomb\.png"):
        read(settings("images", zoo))


def test_a_truncated_picture_is_named(zoo: Path) -> None:
    path = zoo / "cat" / "0.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(DataError, match=r"0\.png is no whole picture"):
        read(settings("images", zoo))


def test_a_folder_without_classes_or_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folders"):
        read(settings("images", tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="has no pictures"):
        read(settings("images", tmp_path))


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git", "__MACOSX", "a_empty"])
def test_a_folder_that_is_hidden_or_empty_is_no_class_and_shifts_no_number(
    zoo: Path, name: str
) -> None:
    before = read(settings("images", zoo))
    (zoo / name).mkdir()
    if name != "a_empty":  # all of these sort before "cat"
        paint(zoo / name / "copy.png", 77)
        paint(zoo / "cat" / name / "copy.png", 78)
        paint(zoo / "cat" / "._0.png", 79)
    after = read(settings("images", zoo))
    assert isinstance(after.examples, Images)
    assert after.examples.classes == ("cat", "dog")
    assert after.labels == before.labels
    assert torch.equal(pixels_of(after), pixels_of(before))


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev", "Val"])
def test_folders_beside_train_are_the_splits_of_their_names(
    tmp_path: Path, validation: str
) -> None:
    for value, split in enumerate(("train", validation, "test")):
        for at, name in enumerate(("cat", "dog")):
            paint(tmp_path / split / name / "a.png", 10 * value + at)
    corpus = read(settings("images", tmp_path))
    assert corpus.splits == ["test"] * 2 + ["validation"] * 2 + ["train"] * 2
    assert pixels_of(corpus)[:, 0, 0, 0].tolist() == [20, 21, 10, 11, 0, 1]
    assert corpus.labels == ["cat", "dog"] * 3


def test_a_folder_beside_train_that_is_no_split_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "cat" / "a.png", 1)
    paint(tmp_path / "extra" / "cat" / "b.png", 2)
    with pytest.raises(DataError, match=r"has 'extra' beside the split 'train': rename one"):
        read(settings("images", tmp_path))


def test_a_class_may_bear_the_name_of_a_split(zoo: Path) -> None:
    paint(zoo / "test" / "a.png", 30)
    corpus = read(settings("images", zoo))
    assert isinstance(corpus.examples, Images)
    assert (corpus.examples.classes, corpus.splits) == (("cat", "dog", "test"), None)


def test_endings_of_pictures_count_in_any_case(tmp_path: Path) -> None:
    for value, name in enumerate(("A.PNG", "B.JPEG", "c.Jpg")):
        paint(tmp_path / "cat" / name, 80 * value)
    assert len(read(settings("images", tmp_path)).examples) == 3


# ---- who may see what


def test_public_and_private_pictures_share_nothing_and_lose_nothing() -> None:
    plan = {"public": 0.2, "unseen": ("8", "9")}
    public = read(settings("digits", part="public", **plan))
    private = read(settings("digits", **plan))
    seen, held = ({row.numpy().tobytes() for row in pixels_of(c)} for c in (public, private))
    assert not seen & held
    assert len(seen) + len(held) + private.duplicates == 1797
    assert public.labels is not None
    assert private.labels is not None
    assert not {"8", "9"} & set(public.labels)
    for name in "01234567":
        both = public.labels.count(name) + private.labels.count(name)
        assert public.labels.count(name) == round(0.2 * both)


def test_classes_can_be_kept_and_renumbered() -> None:
    few = read(settings("digits", classes=("3", "1"), names=tuple("9876543210")))
    assert few.labels is not None
    assert set(few.labels) == {"1", "3"}
    assert isinstance(few.examples, Images)
    assert few.examples.classes == tuple("9876543210")
    with pytest.raises(ConfigError, match=r"data\.unseen names 'ten'"):
        read(settings("digits", unseen=("ten",)))
