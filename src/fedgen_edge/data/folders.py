"""List the data files of a user's folder, and the folders that are splits.

Hidden files and folders, and folders whose names begin with two underscores, belong to tools
(`.ipynb_checkpoints`, `.git`, `__MACOSX`): nothing in them is data.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from fedgen_edge import config
from fedgen_edge.errors import DataError

SPLITS = {
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
    "train": ("train", "training"),
}
"""Names of each split, as Hugging Face `datasets` knows them. The test split comes first: among
equal examples the first is kept, so that the test split stays complete."""
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}


def iterate_files(folder: Path, endings: Collection[str]) -> Iterator[Path]:
    """Yield the visible files below a folder with these endings, in any case, sorted by folder.

    Links to folders are not followed: they can form cycles.
    """
    for path in list_entries(folder):
        if path.is_dir() and not path.is_symlink():
            yield from iterate_files(path, endings)
        elif path.suffix.lower() in endings and path.is_file():
            yield path


def list_folders(root: Path, endings: Collection[str]) -> list[Path]:
    """List the visible folders in a folder that hold a file with such an ending, sorted."""
    folders = [path for path in list_entries(root) if path.is_dir()]
    return [path for path in folders if any(iterate_files(path, endings))]


def list_entries(folder: Path) -> list[Path]:
    """List the entries of a folder that belong to the user and not to a tool, sorted.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not _is_tool_file(path))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): make it readable") from None


def _is_tool_file(path: Path) -> bool:
    return path.name.startswith(".") or (path.name.startswith("__") and path.is_dir())


def list_splits(
    settings: config.Data, root: Path, endings: Collection[str]
) -> list[tuple[Path, str | None]]:
    """List the folders of splits with their splits, tests first; or the root, if it has none.

    Raises:
        DataError: something else lies beside a split's folder.
    """
    folders = list_folders(root, endings)
    files = [path for path in list_entries(root) if path.suffix.lower() in endings]
    splits = [(path, SPLIT_OF[path.name.lower()]) for path in folders if _is_split(path)]
    other_names = [path.name for path in [*folders, *files] if not _is_split(path)]
    if other_names and "train" in (split for _, split in splits):
        raise DataError(
            f"data.path={settings.path!r} has {other_names[0]!r} beside the split "
            f"{splits[-1][0].name!r}: rename one of them, or move it away"
        )
    if other_names or not splits:
        return [(root, None)]
    return [(path, name) for name in SPLITS for path, split in splits if split == name]


def _is_split(folder: Path) -> bool:
    return folder.name.lower() in SPLIT_OF
