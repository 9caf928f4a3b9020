"""Text from where it lies: one example each, with its client, label and split where it has them.

A source is a function from settings to rows, in an order that is always the same.
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
from fedgen_edge.data.corpus import Corpus, Texts, shared_out
from fedgen_edge.data.folders import iterate_files, list_entries, list_splits
from fedgen_edge.data.text_files import UNREADABLE, Row, existing, fault, lines
from fedgen_edge.errors import ConfigError

TEXT = {".txt"}
SHORTEST_DOCSTRING = 5  # words
PATHLESS = {"docstrings", "digits"}
TEST_FOLDERS = {"test", "tests", "idle_test"}

# Tests come first: of equal texts the first is kept, so what a test scores stays whole.
PTB_SPLITS = {"test": "test", "valid": "validation", "train": "train"}


def read(settings: config.Data) -> Corpus:
    """The corpus that the settings name.

    Blank texts are skipped, and of identical ones the first is kept. A limit takes examples evenly
    from the whole, so that clients and splits keep their shares.

    Raises:
        DataError: the data are missing, empty or not text; names the file and the line.
        ConfigError: no such package, or no path.
        MissingExtraError: a hub data set or Parquet, without the extra that reads it.
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
    first: dict[str, Row] = {}
    met: set[str | None] = set()
    filled, blanks = 0, 0
    for row in SOURCES[settings.source](settings):
        met.add(row.group)
        if row.text.strip():
            first.setdefault(row.text, row)
            filled += 1
        else:
            blanks += 1
    kept = list(first.values())
    if not kept:
        raise fault(settings, f" holds no text for data.source={settings.source!r}: add some")
    if emptied := met - {row.group for row in kept}:
        said = f"{len(emptied)} of the clients, {min(map(str, emptied))!r} first, have no text"
        raise fault(settings, f": {said} that others lack: give them some, or leave them out")
    own = _of_part(settings, kept)
    limit = min(settings.limit or len(own), len(own))
    few = [own[i * len(own) // limit] for i in range(limit)]
    lost = {row.group for row in kept} - {row.group for row in few}
    if lost and settings.part == "private":  # what is public belongs to nobody
        cut = limit < len(own)
        cause = f"limit={limit}" if cut else f"public={settings.public}"
        raise ConfigError(
            f"data.{cause} leaves {len(lost)} of the clients, {min(map(str, lost))!r} first, "
            f"without text: {'raise' if cut else 'lower'} it"
        )
    return _corpus(few, filled - len(kept), blanks)


def _of_part(settings: config.Data, rows: list[Row]) -> list[Row]:
    """The public ones, or those that clients hold."""
    if settings.part == "private" and not settings.public:
        return rows
    labels, splits = [row.label for row in rows], [row.split for row in rows]
    if unknown := [name for name in settings.unseen if name not in labels]:
        there = ", ".join(sorted({*filter(None, labels)})) or "none"
        raise ConfigError(f"data.unseen names {unknown[0]!r}: labels are {there}")
    chosen = shared_out(settings, range(len(rows)), labels, splits)
    if not chosen:
        raise ConfigError(
            f"data.public={settings.public} leaves no {settings.part} text: change it, or add text"
        )
    return [rows[at] for at in chosen]


def _corpus(rows: list[Row], duplicates: int, blanks: int) -> Corpus:
    words = [len(row.text.split()) + row.marks for row in rows]
    return Corpus(
        Texts([row.text for row in rows], words),
        groups=_known([row.group for row in rows]),
        labels=_known([row.label for row in rows]),
        splits=_known([row.split for row in rows]),
        duplicates=duplicates,
        blanks=blanks,
    )


def _known(column: list[str | None]) -> list[str] | None:
    """A column that no row lacks."""
    found = [value for value in column if value is not None]
    return found if len(found) == len(column) else None


def docstrings(settings: config.Data) -> Iterator[Row]:
    """Docstrings of the standard library, read from its source and never imported."""
    for package in settings.packages:
        texts = [text for path in modules(package) for text in _docstrings_in(path)]
        yield from (Row(text, group=package) for text in texts or [""])


def modules(package: str) -> list[Path]:
    """Source files of a package of the standard library, sorted, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    if package.isidentifier():
        paths = [library / f"{package}.py", *sorted((library / package).rglob("*.py"))]
        inner = {path: {*path.relative_to(library).parts[1:]} for path in paths if path.is_file()}
        if inner:
            return [path for path, parts in inner.items() if not parts & TEST_FOLDERS]
    known = sorted(path.stem for path in library.iterdir() if path.suffix == ".py" or path.is_dir())
    near = difflib.get_close_matches(package, known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"data.packages={package!r} is not in this Python: did you mean {near!r}?")


def _docstrings_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text.split()) >= SHORTEST_DOCSTRING:
                yield text


def ptb(settings: config.Data) -> Iterator[Row]:
    """The Penn Treebank in Mikolov's three files, which are its splits."""
    root = existing(settings)
    for name, split in PTB_SPLITS.items():
        path = root / f"ptb.{name}.txt"
        path = path if path.is_file() else root / f"{name}.txt"
        for block in _blocks(lines(settings, path), settings.lines):
            yield Row("\n".join(block), split=split, marks=len(block))


def brown(settings: config.Data) -> Iterator[Row]:
    """The Brown corpus in NLTK's layout, zipped or not; a genre is a client and a label."""
    root = _brown_root(settings)
    for number, line in enumerate(lines(settings, root / "cats.txt"), start=1):
        match line.split():
            case [document, genre]:
                sentences = map(readable, lines(settings, root / document))
            case _:
                raise fault(settings, f": cats.txt, line {number} is not like 'ca01 news'")
        for block in _blocks(sentences, settings.lines):
            yield Row(" ".join(block), group=genre, label=genre)


def _brown_root(settings: config.Data) -> Path | zipfile.Path:
    path = existing(settings)
    if (path / "cats.txt").is_file():
        return path
    try:
        top = zipfile.Path(path / "brown.zip" if path.is_dir() else path)
    except UNREADABLE:
        raise fault(settings, " is not the Brown corpus: give NLTK's brown.zip") from None
    return top if (top / "cats.txt").is_file() else top / "brown"


def readable(sentence: str) -> str:
    """Brown's `word/TAG` tokens as they were once printed."""
    text = " ".join(token.rsplit("/", 1)[0] for token in sentence.split())
    text = re.sub(r"([;?!]) \1", r"\1", text)
    text = re.sub(r"`` | ?''", '"', text)
    return re.sub(r" ([,.;:?!)])", r"\1", text).replace("( ", "(")


def _blocks(text: Iterable[str], size: int) -> Iterator[list[str]]:
    filled = [line.strip() for line in text if line.strip()]
    yield from (filled[start : start + size] for start in range(0, len(filled), size))


def folder(settings: config.Data) -> Iterator[Row]:
    """Paragraphs of `*.txt` files: a file at the top is a client, and so is each sub-folder.

    Folders of splits may lie above the clients'.
    """
    root = existing(settings)
    if not root.is_dir():
        raise fault(settings, " is no folder: give one of *.txt files")
    for top, split in list_splits(settings, root, TEXT):
        for client, path in _files_of_clients(settings, top):
            for paragraph in re.split(r"\n\s*\n", "\n".join(lines(settings, path))):
                if paragraph.strip():
                    yield Row(paragraph.strip("\n"), group=client, split=split)


def _files_of_clients(settings: config.Data, top: Path) -> Iterator[tuple[str, Path]]:
    for entry in list_entries(top):
        if entry.is_dir():
            yield from ((entry.name, path) for path in iterate_files(entry, TEXT))
        elif entry.suffix.lower() in TEXT:
            if (top / entry.stem).is_dir():
                both = f"both {entry.name!r} and a folder {entry.stem!r}"
                raise fault(settings, f" has {both}: rename one")
            yield entry.stem, entry


SOURCES: dict[str, Callable[[config.Data], Iterator[Row]]] = {
    "docstrings": docstrings,
    "ptb": ptb,
    "brown": brown,
    "folder": folder,
    "jsonl": tables.read_jsonl,
    "json": tables.read_json,
    "csv": tables.read_csv,
    "parquet": tables.read_parquet,
    "hub": tables.read_hub,
}
