"""Read text: one example per row, with its client, label and split if it has them.

A source is a function from settings to rows, in a fixed order.
"""

import ast
import difflib
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fedgen_edge import config
from fedgen_edge.data import images, tables
from fedgen_edge.data.corpus import Corpus, Texts, select_part
from fedgen_edge.data.folders import iterate_files, list_entries, list_splits
from fedgen_edge.data.text_files import UNREADABLE, TextRow, get_data_path, make_error, read_lines
from fedgen_edge.errors import ConfigError

TEXT = {".txt"}
SHORTEST_DOCSTRING = 5  # words
PATHLESS = {"docstrings", "digits"}
TEST_FOLDERS = {"test", "tests", "idle_test"}

# Tests come first: among equal texts the first is kept, so the test split stays complete.
PTB_SPLITS = {"test": "test", "valid": "validation", "train": "train"}


def read(settings: config.Data) -> Corpus:
    """Read the corpus that the settings name.

    Blank texts are skipped; among identical ones the first is kept. A limit takes examples evenly
    from the whole, so that clients and splits keep their shares.

    Raises:
        DataError: the data are missing, empty or not text; names the file and the line.
        ConfigError: there is no such package, or no path.
        MissingExtraError: the extra that reads hub data sets or Parquet is not installed.
    """
    if settings.path is None and settings.source not in PATHLESS:
        raise ConfigError(
            f"data.path is missing: data.source={settings.source!r} reads from a path, "
            "give one with --data.path"
        )
    if settings.config is not None and settings.source != "hub":
        raise ConfigError(
            f"data.config={settings.config!r} is for data.source='hub', and data.source is "
            f"{settings.source!r}: leave it out"
        )
    if settings.source in images.SOURCES:
        return images.read(settings)
    tables.check_ending(settings)
    first_rows: dict[str, TextRow] = {}
    groups: set[str | None] = set()
    num_filled, blanks = 0, 0
    for row in SOURCES[settings.source](settings):
        groups.add(row.group)
        if row.text.strip():
            first_rows.setdefault(row.text, row)
            num_filled += 1
        else:
            blanks += 1
    rows = list(first_rows.values())
    if not rows:
        raise make_error(settings, f" holds no text for data.source={settings.source!r}: add some")
    if empty_groups := groups - {row.group for row in rows}:
        first = min(map(str, empty_groups))
        problem = f"{len(empty_groups)} of the clients, {first!r} first, have no text"
        raise make_error(
            settings, f": {problem} that others lack: give them some, or leave them out"
        )
    part_rows = _select_rows(settings, rows)
    limit = min(settings.limit or len(part_rows), len(part_rows))
    limited = [part_rows[i * len(part_rows) // limit] for i in range(limit)]
    lost_groups = {row.group for row in rows} - {row.group for row in limited}
    if lost_groups and settings.part == "private":  # public examples belong to no client
        is_limited = limit < len(part_rows)
        cause = f"limit={limit}" if is_limited else f"public={settings.public}"
        raise ConfigError(
            f"data.{cause} leaves {len(lost_groups)} of the clients, "
            f"{min(map(str, lost_groups))!r} first, "
            f"without text: {'raise' if is_limited else 'lower'} it"
        )
    return _corpus(limited, num_filled - len(rows), blanks)


def _select_rows(settings: config.Data, rows: list[TextRow]) -> list[TextRow]:
    """Return the public rows, or those that clients hold."""
    if settings.part == "private" and not settings.public:
        return rows
    labels, splits = [row.label for row in rows], [row.split for row in rows]
    if unknown := [name for name in settings.unseen if name not in labels]:
        there = ", ".join(sorted({*filter(None, labels)})) or "none"
        raise ConfigError(f"data.unseen names {unknown[0]!r}: labels are {there}")
    chosen = select_part(settings, range(len(rows)), labels, splits)
    if not chosen:
        raise ConfigError(
            f"data.public={settings.public} leaves no {settings.part} text: change it, or add text"
        )
    return [rows[at] for at in chosen]


def _corpus(rows: list[TextRow], duplicates: int, blanks: int) -> Corpus:
    words = [len(row.text.split()) + row.marks for row in rows]
    return Corpus(
        Texts([row.text for row in rows], words),
        groups=_get_complete_column([row.group for row in rows]),
        labels=_get_complete_column([row.label for row in rows]),
        splits=_get_complete_column([row.split for row in rows]),
        duplicates=duplicates,
        blanks=blanks,
    )


def _get_complete_column(column: list[str | None]) -> list[str] | None:
    """Return the column if no row lacks its value."""
    values = [value for value in column if value is not None]
    return values if len(values) == len(column) else None


def read_docstrings(settings: config.Data) -> Iterator[TextRow]:
    """Read docstrings of the standard library from its source, without importing it."""
    for package in settings.packages:
        texts = [text for path in list_modules(package) for text in _extract_docstrings(path)]
        yield from (TextRow(text, group=package) for text in texts or [""])


def list_modules(package: str) -> list[Path]:
    """List the source files of a standard-library package, sorted, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    if package.isidentifier():
        paths = [library / f"{package}.py", *sorted((library / package).rglob("*.py"))]
        inner = {path: {*path.relative_to(library).parts[1:]} for path in paths if path.is_file()}
        if inner:
            return [path for path, parts in inner.items() if not parts & TEST_FOLDERS]
    module_names = sorted(
        path.stem for path in library.iterdir() if path.suffix == ".py" or path.is_dir()
    )
    near = difflib.get_close_matches(package, module_names, n=1, cutoff=0.0)[0]
    raise ConfigError(f"data.packages={package!r} is not in this Python: did you mean {near!r}?")


def _extract_docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text.split()) >= SHORTEST_DOCSTRING:
                yield text


def read_ptb(settings: config.Data) -> Iterator[TextRow]:
    """Read the Penn Treebank from Mikolov's three files, which are its splits."""
    root = get_data_path(settings)
    for name, split in PTB_SPLITS.items():
        path = root / f"ptb.{name}.txt"
        path = path if path.is_file() else root / f"{name}.txt"
        for block in _make_blocks(read_lines(settings, path), settings.lines):
            yield TextRow("\n".join(block), split=split, marks=len(block))


def read_brown(settings: config.Data) -> Iterator[TextRow]:
    """Read the Brown corpus in NLTK's layout, zipped or not; a genre is a client and a label."""
    root = _find_brown_root(settings)
    for number, line in enumerate(read_lines(settings, root / "cats.txt"), start=1):
        match line.split():
            case [document, genre]:
                sentences = map(detokenize, read_lines(settings, root / document))
            case _:
                raise make_error(settings, f": cats.txt, line {number} is not like 'ca01 news'")
        for block in _make_blocks(sentences, settings.lines):
            yield TextRow(" ".join(block), group=genre, label=genre)


def _find_brown_root(settings: config.Data) -> Path | zipfile.Path:
    path = get_data_path(settings)
    if (path / "cats.txt").is_file():
        return path
    try:
        top = zipfile.Path(path / "brown.zip" if path.is_dir() else path)
    except UNREADABLE:
        raise make_error(settings, " is not the Brown corpus: give NLTK's brown.zip") from None
    return top if (top / "cats.txt").is_file() else top / "brown"


def detokenize(sentence: str) -> str:
    """Turn Brown's `word/TAG` tokens back into printed text."""
    text = " ".join(token.rsplit("/", 1)[0] for token in sentence.split())
    text = re.sub(r"([;?!]) \1", r"\1", text)
    text = re.sub(r"`` | ?''", '"', text)
    return re.sub(r" ([,.;:?!)])", r"\1", text).replace("( ", "(")


def _make_blocks(text: Iterable[str], size: int) -> Iterator[list[str]]:
    nonblank = [line.strip() for line in text if line.strip()]
    yield from (nonblank[start : start + size] for start in range(0, len(nonblank), size))


def read_folder(settings: config.Data) -> Iterator[TextRow]:
    """Read paragraphs of `*.txt` files: each file at the top is a client, and so is each subfolder.

    Folders of splits may contain the clients' folders.
    """
    root = get_data_path(settings)
    if not root.is_dir():
        raise make_error(settings, " is no folder: give one of *.txt files")
    for top, split in list_splits(settings, root, TEXT):
        for client, path in _list_client_files(settings, top):
            for paragraph in re.split(r"\n\s*\n", "\n".join(read_lines(settings, path))):
                if paragraph.strip():
                    yield TextRow(paragraph.strip("\n"), group=client, split=split)


def _list_client_files(settings: config.Data, top: Path) -> Iterator[tuple[str, Path]]:
    for entry in list_entries(top):
        if entry.is_dir():
            yield from ((entry.name, path) for path in iterate_files(entry, TEXT))
        elif entry.suffix.lower() in TEXT:
            if (top / entry.stem).is_dir():
                both = f"both {entry.name!r} and a folder {entry.stem!r}"
                raise make_error(settings, f" has {both}: rename one")
            yield entry.stem, entry


SOURCES: dict[str, Callable[[config.Data], Iterator[TextRow]]] = {
    "docstrings": read_docstrings,
    "ptb": read_ptb,
    "brown": read_brown,
    "folder": read_folder,
    "jsonl": tables.read_jsonl,
    "json": tables.read_json,
    "csv": tables.read_csv,
    "parquet": tables.read_parquet,
    "hub": tables.read_hub,
}
