"""Write measured results into the pages that quote them, between marks.

    python paper/fill.py

`<!-- results:NAME -->` begins a table or an item of the paper, and `<!-- quote:NAME -->` a number
within a sentence, which `paper/quotes.toml` defines; `<!-- end -->` ends both. Every number comes
from a file under `paper/results` or `benchmarks/results`; codes come from the code.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import benchmark_tables
import code_tables
import figures
import kept
import quotes
import varying
import views
from fedgen_edge import files
from fedgen_edge.errors import ConfigError, FedGenError
from items import ROOT, list_shown, read

DOCS = ROOT / "docs"
HOME = DOCS / "results"
"""Where links of the tables are written from."""
MARK = re.compile(r"<!-- (results|quote):([\w-]+) -->(.*?)<!-- end -->", re.DOTALL)


def make_item(name: str, scale: str) -> str:
    """An item of the paper: its table, and its figure below it."""
    item = read(name, scale)
    table = views.table(item, rows := kept.read_whole(item))
    if "repeats" in item and kept.path_of(there := read(item["repeats"], scale)).exists():
        table += "\n" + varying.compare_repeat(item, rows, there, kept.read_whole(there))
    if "figure" not in item:
        return table
    return f"{table}\n\n![{item['title']}](../figures/{figures.path_of(item).name})"


def across(axis: str, scale: str) -> str:
    """The best values of every measured item that varies the same, and has runs of its own."""
    items = [read(name, own) for name, own in list_shown() if own == scale]
    same = [item for item in items if item.get("axis") == axis and "of" not in item]
    measured_items = [item for item in same if kept.path_of(item).exists()]
    if not measured_items:
        raise FileNotFoundError(axis)
    return varying.bests([(item, kept.read_whole(item)) for item in measured_items])


def list_unmeasured() -> str:
    """The items and scales that have no records yet."""
    missing = [
        f"`{name}` ({scale})"
        for name, scale in list_shown()
        if not kept.path_of(read(name, scale)).exists()
    ]
    return f"Not measured yet: {', '.join(missing) or 'nothing'}."


PARTS: dict[str, Callable[[], str]] = {
    **{f"{name}-{scale}": partial(make_item, name, scale) for name, scale in list_shown()},
    "ranks": partial(across, "rank", "small"),
    "unmeasured": list_unmeasured,
    "speed": benchmark_tables.speed,
    "compiled": benchmark_tables.compile_gain,
    "peak": benchmark_tables.peak,
    "memory": benchmark_tables.memory,
    "simulators": benchmark_tables.simulators,
    "overhead": benchmark_tables.overhead,
    "planned": benchmark_tables.plan_accuracy,
    "network": benchmark_tables.network,
    "peers": benchmark_tables.peers,
    "backbones": benchmark_tables.backbones,
    "codes": code_tables.codes,
    "matrix": code_tables.matrix,
}


def find_pages() -> Iterator[Path]:
    """Every page that has a mark."""
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        if MARK.search(page.read_text("utf-8")):
            yield page


def fill_page(page: Path) -> str:
    """A page's text, with what the records say now between its marks.

    Raises:
        ConfigError: a mark has a name that nothing is known by.
    """

    def fill_mark(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        if kind == "results" and name in PARTS:
            text = f"\n\n{relink(_make(PARTS[name]), page)}\n\n"
        elif kind == "quote" and name in quotes.read_quotes():
            text = quotes.evaluate(quotes.read_quotes()[name])
        else:
            raise ConfigError(f"{page.name}: nothing is called {kind}:{name}: correct the mark")
        return f"<!-- {kind}:{name} -->{text}<!-- end -->"

    return MARK.sub(fill_mark, page.read_text("utf-8"))


def _make(part: Callable[[], str]) -> str:
    try:
        return part()
    except FileNotFoundError:
        return "Not measured yet."


def relink(text: str, page: Path) -> str:
    """The text with its links, which are written from `docs/results`, as this page needs them."""

    def move(match: re.Match[str]) -> str:
        target = (HOME / match[1]).resolve()
        return f"]({Path(os.path.relpath(target, page.parent)).as_posix()}"

    return re.sub(r"\]\((\.\./[^)#]*)", move, text)


def draw() -> None:
    """Draw every figure that there are records for."""
    for item in (read(name, scale) for name, scale in list_shown()):
        with suppress(FileNotFoundError):
            if "figure" in item:
                svg = figures.draw_figure(item, kept.read_whole(item))
                files.write(figures.path_of(item), svg.encode())


def main() -> None:
    """Draw the figures, and fill every page that has a mark."""
    draw()
    for page in find_pages():
        page.write_text(fill_page(page), "utf-8")


if __name__ == "__main__":
    try:
        main()
    except FedGenError as error:
        print(f"paper: {error}", file=sys.stderr)
        sys.exit(2)
