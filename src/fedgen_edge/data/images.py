"""Read images from files: one size, one number of channels, each with its class.

Only arrays, lists and numbers are unpickled: a file that asks for more is refused unread.
"""

import hashlib
import io
import itertools
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from fedgen_edge import config
from fedgen_edge.data.archives import PickledArray, check_npz, read_pickle
from fedgen_edge.data.corpus import Corpus, Images, select_part
from fedgen_edge.data.folders import SPLITS, iterate_files, list_folders, list_splits
from fedgen_edge.errors import ConfigError, DataError

CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SIDES = (4, 1024)
"""Minimum and maximum pixels of a side."""
MODES = ("L", "RGB")
"""Pillow's names for 8-bit images, in gray and in color."""
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
DAMAGED = (
    *(OSError, EOFError, KeyError, IndexError, TypeError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, Image.DecompressionBombError),
)
"""Errors of an archive of arrays that is truncated, altered, or not an archive."""


class SplitImages(NamedTuple):
    """Images of one split, or all images if the source has no splits."""

    pixels: Tensor
    """uint8 `[images, channels, height, width]`."""
    class_numbers: Tensor
    """Class number of each image."""
    split: str | None = None


class ImageSource(NamedTuple):
    """The images of a source, and the names of their classes."""

    parts: list[SplitImages]
    classes: tuple[str, ...]


def read(settings: config.Data) -> Corpus:
    """Read the images that the settings name; among identical ones the first is kept.

    Args:
        settings: settings of the data.

    Raises:
        DataError: the images are missing, damaged, or of different kinds; names the file.
        ConfigError: the settings name an unknown class.
    """
    source = SOURCES[settings.source](settings)
    names = settings.names or source.classes
    for key in ("classes", "unseen"):
        for name in getattr(settings, key):
            if name not in names:
                raise ConfigError(f"data.{key} names {name!r}: there are {', '.join(names)}")
    parts = sorted(source.parts, key=lambda part: [*SPLITS, None].index(part.split))
    pixels = torch.cat([part.pixels for part in parts])
    labels = [source.classes[n] for part in parts for n in part.class_numbers.tolist()]
    splits = [part.split for part in parts for _ in range(len(part.pixels))]
    first_positions: dict[bytes, int] = {}
    for at, row in enumerate(pixels.numpy()):
        first_positions.setdefault(hashlib.sha256(row.tobytes()).digest(), at)
    candidates = [
        at for at in first_positions.values() if labels[at] in (settings.classes or names)
    ]
    chosen = select_part(settings, candidates, labels, splits)
    if not chosen:
        problem = f"data.source={settings.source!r} holds no {settings.part} pictures with "
        raise DataError(f"{problem}data.public={settings.public}: change that, or add some")
    limit = min(settings.limit or len(chosen), len(chosen))
    limited = [chosen[i * len(chosen) // limit] for i in range(limit)]
    return Corpus(
        Images(pixels[limited], names),
        None,
        [labels[at] for at in limited],
        None if None in splits else [str(splits[at]) for at in limited],
        len(pixels) - len(first_positions),
    )


def read_digits(_settings: config.Data) -> ImageSource:
    """Read scikit-learn's 1,797 handwritten digits, 8 x 8 gray pixels."""
    from sklearn.datasets import load_digits

    dataset: Any = load_digits()
    pixels = torch.from_numpy(np.round(dataset.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    return ImageSource([SplitImages(pixels, torch.from_numpy(dataset.target))], tuple("0123456789"))


def read_cifar10(settings: config.Data) -> ImageSource:
    """Read CIFAR-10: lossless WebP, or the authors' pickles or binaries (Krizhevsky 2009)."""
    root = _get_root_folder(settings)
    for layout in (_read_webp_archives, _read_pickles, _read_binaries):
        parts = list(layout(settings, root))
        if parts:
            return ImageSource([_resize_images(settings, part) for part in parts], CIFAR10)
    raise _make_error(
        settings,
        " holds no CIFAR-10: give a folder with train.npz and test.npz, with data_batch_1 to 5 and "
        "test_batch, or with the same as .bin",
    )


def _resize_images(settings: config.Data, part: SplitImages) -> SplitImages:
    """Scale the images to `data.size` if it is given."""
    side = settings.size
    if side is None or side == part.pixels.shape[-1]:
        return part
    return part._replace(
        pixels=F.interpolate(part.pixels, (side, side), mode="bilinear", antialias=True)
    )


def _read_webp_archives(settings: config.Data, root: Path) -> Iterator[SplitImages]:
    for path in sorted(root.glob("*t*.npz")):
        split = "test" if "test" in path.stem else "train"
        try:
            pixels, numbers = _decode_webp_archive(path)
        except DAMAGED as error:
            raise _make_error(
                settings, f": {path.name} cannot be read ({error}): correct it"
            ) from None
        yield _make_part(settings, path, pixels.transpose(0, 3, 1, 2), numbers, split)


def _decode_webp_archive(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images, `[images, height, width, 3]`, and their class numbers."""
    check_npz(path)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        blob, ends = archive["webp"].tobytes(), archive["offsets"]
        numbers = _to_integers(archive["labels"])
    files = (io.BytesIO(blob[low:high]) for low, high in itertools.pairwise(ends))
    return np.stack([_decode_small_image(one) for one in files]), numbers


def _decode_small_image(file: io.BytesIO) -> np.ndarray:
    with Image.open(file, formats=("WEBP",)) as image:
        if image.size != (32, 32):
            raise ValueError(f"a picture is {image.width} x {image.height}, not 32 x 32")
        return np.asarray(image.convert("RGB"))


def _read_pickles(settings: config.Data, root: Path) -> Iterator[SplitImages]:
    for path in sorted(p for p in root.glob("*_batch*") if not p.suffix):
        split = "test" if path.name.startswith("test") else "train"
        try:
            batch = read_pickle(path)
            pixels = batch[b"data"].read().reshape(-1, 3, 32, 32)
            if pixels.dtype != np.uint8:
                raise ValueError("its pictures are not of bytes")
            numbers = _to_integers(batch[b"labels"])
        except (pickle.UnpicklingError, AttributeError, *DAMAGED) as error:
            raise _make_error(
                settings, f": {path.name} is no batch ({error}): correct it"
            ) from None
        yield _make_part(settings, path, pixels, numbers, split)


def _to_integers(labels: Any) -> np.ndarray:
    if isinstance(labels, list) and not {*map(type, labels)} <= {int}:
        raise ValueError("its labels are no list of whole numbers")
    numbers = labels.read() if isinstance(labels, PickledArray) else np.asarray(labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError("its labels are no list of whole numbers")
    return numbers


def _read_binaries(settings: config.Data, root: Path) -> Iterator[SplitImages]:
    for path in sorted(root.glob("*_batch*.bin")):
        split = "test" if path.name.startswith("test") else "train"
        raw = np.fromfile(path, np.uint8)
        if len(raw) % 3073:
            raise _make_error(settings, f": {path.name} is cut short: its records have 3,073 bytes")
        rows = raw.reshape(-1, 3073)
        yield _make_part(settings, path, rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], split)


def _make_part(
    settings: config.Data, path: Path, pixels: np.ndarray, numbers: np.ndarray, split: str
) -> SplitImages:
    if len(numbers) != len(pixels) or not set(numbers.tolist()) <= {*range(len(CIFAR10))}:
        raise _make_error(
            settings,
            f": {path.name} has {len(pixels)} pictures and {len(numbers)} labels, between "
            f"{min(numbers.tolist(), default=0)} and {max(numbers.tolist(), default=0)}: each "
            "needs one from 0 to 9",
        )
    return SplitImages(
        torch.from_numpy(np.ascontiguousarray(pixels)),
        torch.from_numpy(numbers.astype(np.int64)),
        split,
    )


def read_folder(settings: config.Data) -> ImageSource:
    """Read a folder of images for each class, cropped to squares of `data.size` if it is given.

    Folders of splits may contain the class folders. A folder without images is not a class.
    """
    root = _get_root_folder(settings)
    tops = list_splits(settings, root, ENDINGS)
    classes = sorted({path.name for top, _ in tops for path in list_folders(top, ENDINGS)})
    if not classes:
        lacks = "pictures in folders" if any(map(Path.is_dir, root.iterdir())) else "folders"
        endings = ", ".join(sorted(ENDINGS))
        raise _make_error(
            settings,
            f" has no {lacks}: put each class's pictures ({endings}) into a folder of its name",
        )
    parts = [_read_class_folders(settings, top, classes, split) for top, split in tops]
    if len({part.pixels.shape[1:] for part in parts}) > 1:
        names = " and ".join(top.name for top, _ in tops)
        raise _make_error(settings, f": {names} are of unlike kinds or sizes: give data.size")
    return ImageSource(parts, tuple(classes))


def _read_class_folders(
    settings: config.Data, top: Path, classes: list[str], split: str | None
) -> SplitImages:
    files = [
        (path, number)
        for number, name in enumerate(classes)
        if (top / name).is_dir()
        for path in iterate_files(top / name, ENDINGS)
    ]
    if not files:
        raise _make_error(settings, f": {top} has no folder of a class with pictures: add some")
    images = [_read_image(settings, path) for path, _ in files]
    first_shape = images[0].shape
    for (path, _), image in zip(files, images, strict=True):
        if image.shape != first_shape:
            kinds = [f"{w} x {h} with {c} channels" for c, h, w in (image.shape, first_shape)]
            raise _make_error(
                settings,
                f": {path} is {kinds[0]}, {files[0][0].name} is {kinds[1]}: save all as RGB or all "
                "as grey, and give data.size, to which they are scaled",
            )
    numbers = torch.tensor([number for _, number in files])
    return SplitImages(torch.from_numpy(np.stack(images)), numbers, split)


def _read_image(settings: config.Data, path: Path) -> np.ndarray:
    """Read one image, `[channels, height, width]`.

    Its header is checked before its pixels are read, so that none expands beyond the limits.
    """
    low, high = SIDES
    try:
        with Image.open(path) as image:
            if not low <= min(image.size) <= max(image.size) <= high:
                size_problem = f"{image.width} x {image.height}: sides must be from {low} to {high}"
                raise _make_error(settings, f": {path} is {size_problem}")
            if image.mode not in MODES:
                raise _make_error(
                    settings, f": {path} is {image.mode}: save it as 8-bit RGB or grey"
                )
            side = settings.size
            resized = ImageOps.fit(image, (side, side)) if side else image
            pixels = np.asarray(resized)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _make_error(settings, f": {path} is no whole picture ({error}): remove it") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _get_root_folder(settings: config.Data) -> Path:
    root = Path(str(settings.path))
    if not root.is_dir():
        raise _make_error(
            settings, f" is no folder: give what data.source={settings.source!r} reads"
        )
    return root


def _make_error(settings: config.Data, what: str) -> DataError:
    return DataError(f"data.path={settings.path!r}{what}")


SOURCES: dict[str, Callable[[config.Data], ImageSource]] = {
    "digits": read_digits,
    "cifar10": read_cifar10,
    "images": read_folder,
}
