import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedgen_edge.errors import CheckpointError
from fedgen_edge.report import plots
from fedgen_edge.report.page import headline, samples, write
from fedgen_edge.report.summary import read
from fedgen_edge.tasks.language.task import MEASURE
from support.reports import BITS, make_run, several

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would find: tags that close, ids, and each table's surroundings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.around_tables: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "table":
            self.around_tables.append(self.open[-1][1])
        if tag not in VOID:
            self.open.append((tag, found.get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write([run], run / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> str:
    here = tmp_path_factory.mktemp("several")
    return write(several(here), here / "report.html").read_text("utf-8")


def test_what_a_run_says_is_text_and_never_markup(page: str, comparison: str) -> None:
    for text in (page, comparison):
        assert "<script" not in text
    assert "&lt;script&gt;" in page


def test_the_page_asks_nobody_for_anything(page: str, comparison: str) -> None:
    for text in (page, comparison):
        without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
        assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", without_names)
        assert "default-src 'none'" in text


def test_the_page_is_whole_and_its_ids_are_unique(page: str, comparison: str) -> None:
    for text in (page, comparison):
        found = Page(text)
        assert found.open == []
        assert len(found.ids) == len(set(found.ids))


def test_tables_scroll_on_their_own_on_a_phone(page: str, comparison: str) -> None:
    for text in (page, comparison):
        assert 'name="viewport" content="width=device-width' in text
        assert set(Page(text).around_tables) == {"scroll"}
        assert "prefers-color-scheme: dark" in text


def test_every_picture_refers_to_its_own_parts(page: str) -> None:
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(Page(page).ids)


def test_the_headline_has_the_numbers(run: Path) -> None:
    # 2^6, 2^5, 2^4, 2^3; 3 clients x 3 rounds x 2,000 bytes against 9 x 1 MB, 99.8 % less.
    told = headline(read(run))
    assert "64.0 with the frozen backbone, 32.0 with training alone" in told
    assert "16.0 with the global adapter, 8.00 with personal adapters" in told
    assert "18.0 kB" in told
    assert "9.00 MB: 99.80\N{NO-BREAK SPACE}% less" in told


def test_the_headline_tells_newcomers_apart(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    clients = json.loads((folder / "clients.json").read_text())
    clients[0]["newcomer"] = True
    (folder / "clients.json").write_text(json.dumps(clients))
    assert "For the 1 who never trained: 64.0 with" in headline(read(folder))


def test_the_page_shows_gains_findings_and_settings(page: str) -> None:
    assert "87.5\N{NO-BREAK SPACE}%" in page  # 8 against 64
    assert "Nothing found" in page
    assert "lr = 0.001" in page


def test_the_page_shows_gains_as_a_distribution_newcomers_apart(tmp_path: Path) -> None:
    # All clients have 8 for 16, half less; the third never took part, and has not trained alone.
    folder = make_run(tmp_path / "run")
    clients = json.loads((folder / "clients.json").read_text())
    clients[2]["newcomer"] = True
    (folder / "clients.json").write_text(json.dumps(clients))
    text = write([folder], tmp_path / "page.html").read_text("utf-8")
    rows = re.findall(r"<tr><th>(personal over [\w-]+)(.*?)</tr>", text, re.S)
    told = {(name, "newcomers" in rest): re.findall(r"<td>([^<]*)</td>", rest)
            for name, rest in rows}  # fmt: skip
    half, all_, none = (f"{share}\N{NO-BREAK SPACE}%" for share in ("50.0", "100", "0"))
    assert told["personal over global", False] == ["2", half, half, all_, none]
    assert told["personal over global", True] == ["1", half, half, all_, none]
    assert ("personal over local-only", False) in told
    assert ("personal over local-only", True) not in told
    assert "The same for the 1 that never took part" in text


def test_the_page_names_the_layer_that_is_worst_by_each_number(page: str) -> None:
    # Of two layers, the errors are 0.1 and 0.2 in round 1, a third of that in round 3.
    row = re.search(r"<tr><th>aggregation error</th>(.*?)</tr>", page, re.S)
    assert row
    told = re.sub(r"<[^>]+>", " ", row[1]).split()
    assert told[:6] == ["0.150", "[0.100,", "0.200]", "0.0500", "[0.0333,", "0.0667]"]
    assert told[-1] == "0.0667"
    assert "&lt;script&gt;" in row[1]


def test_pictures_are_saved_beside_the_run_and_readable_alone(run: Path, page: str) -> None:
    names = sorted(path.stem for path in (run / "plots").iterdir())
    assert names == sorted(plots.PLOTS)
    for path in (run / "plots").iterdir():
        text = path.read_text("utf-8")
        assert text.startswith("<svg")
        assert "prefers-color-scheme" in text
        assert "<text" in text


def test_two_writes_are_the_same_byte_for_byte(run: Path, page: str, tmp_path: Path) -> None:
    assert write([run], tmp_path / "again.html").read_text("utf-8") == page


def test_samples_stand_side_by_side(run: Path, page: str) -> None:
    (sample,) = samples(read(run))
    assert [model for model, _ in sample["texts"]] == ["backbone", "global", "personal"]
    assert "<b>The </b>backbone &lt;/p&gt;" in page  # the prompt is not said twice


def test_a_sample_without_a_client_stands_in_for_every_client(run: Path, tmp_path: Path) -> None:
    rows = [
        {"model": "backbone", "client": None, "prompt": "p", "text": "before"},
        {"model": "personal", "client": "c", "prompt": "p", "text": "after"},
    ]
    make_run(tmp_path / "run")
    (tmp_path / "run" / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (sample,) = samples(read(tmp_path / "run"))
    assert sample["texts"] == [("backbone", {"text": "before"}), ("personal", {"text": "after"})]


def test_a_picture_is_in_the_page_itself_and_a_missing_one_is_named(tmp_path: Path) -> None:
    row = {"model": "global", "client": None, "prompt": "cat", "picture": "samples/0-0.png"}
    folder = make_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CheckpointError, match=r"samples/0-0\.png is missing"):
        write([folder], tmp_path / "page.html")
    (folder / "samples").mkdir()
    (folder / row["picture"]).write_bytes(b"\x89PNG")
    text = write([folder], tmp_path / "page.html").read_text()
    assert '<img src="data:image/png;base64,iVBORw==" alt="global: cat">' in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("")
    (tmp_path / "run.json").write_text(json.dumps({"measure": MEASURE}))
    text = write([tmp_path], tmp_path / "report.html").read_text("utf-8")
    assert "The run has not finished" in text
    assert "svg" not in Page(text).tags


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(CheckpointError):
        write([tmp_path / "nowhere"], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_client_that_was_never_tested_has_a_row_without_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    left = json.loads((run / "clients.json").read_text())
    left.append({**left[0], "client": "revoked"})
    (run / "clients.json").write_text(json.dumps(left))
    page = write([run], tmp_path / "page.html").read_text()
    row = re.search(r"<tr><th>revoked</th>(.*?)</tr>", page, re.S)
    assert row
    assert row[1].count("<td>\u2013</td>") == len(BITS)
