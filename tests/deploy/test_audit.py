"""The log tells what happened, in the order of its lines, and shows where it was altered."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge.deploy.server import audit
from fedgen_edge.deploy.server.audit import AcceptedMessage, Audit
from fedgen_edge.errors import CheckpointError

EPOCH = "1970-01-01T00:00:01.500+00:00"


def log(folder: Path) -> Audit:
    return Audit(folder / "audit.jsonl", lambda: 1.5)


def attempt(to: Audit, round_: int, number: int, **payloads: str) -> None:
    """One attempt at a round, and what each site sent that counts."""
    to.write("opened", round=round_, attempt=number)
    for site, payload in payloads.items():
        to.write("accepted", site=site, round=round_, attempt=number, payload=payload)


def some(folder: Path) -> Path:
    """A log of five lines."""
    made = log(folder)
    attempt(made, 0, 0, a="11", b="22")
    made.write("refused", site="c", round=0, attempt=0, code="not-finite")
    made.write("committed", round=0, attempt=0)
    return made.path


def test_each_line_holds_the_hash_of_the_line_before(tmp_path: Path) -> None:
    written = [json.loads(line) for line in some(tmp_path).read_text().splitlines()]
    assert written[0]["previous"] == ""
    for before, line in pairwise(written):
        told = {k: v for k, v in before.items() if k != "digest"}
        expected = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        assert line["previous"] == before["digest"] == expected


def test_a_line_says_who_when_and_what_and_nothing_of_the_content(tmp_path: Path) -> None:
    refused = json.loads(some(tmp_path).read_text().splitlines()[3])
    del refused["previous"], refused["digest"]
    assert refused == {
        "event": "refused", "site": "c", "round": 0, "attempt": 0, "code": "not-finite",
        "time": EPOCH,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no \\['reason'\\]"):
        log(tmp_path).write("refused", site="c", reason="what it said")


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("harm", ["altered", "out", "twice", "spaced"])
def test_a_log_that_was_altered_is_refused_with_the_lines_number(
    tmp_path: Path, number: int, harm: str
) -> None:
    path = some(tmp_path)
    text = path.read_text().splitlines(keepends=True)
    line = text[number - 1]
    became = {
        "altered": [line.replace('"attempt": 0', '"attempt": 1')],
        "out": [],
        "twice": [line, line],
        "spaced": [line.replace(": ", ":  ", 1)],
    }[harm]
    path.write_text("".join([*text[: number - 1], *became, *text[number:]]))
    if (harm, number) == ("out", 5):
        # cut off at the end: a file cannot tell that there was more
        assert len(log(tmp_path).lines) == 4
        return
    with pytest.raises(CheckpointError, match=f"line {number + (harm == 'twice')} "):
        log(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some(tmp_path_factory.mktemp("whole"))


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_no_altered_byte_goes_unseen_but_that_of_the_end(
    whole: Path, place: float, flip: int
) -> None:
    content = bytearray(whole.read_bytes())
    at = int(place * len(content))
    content[at] ^= flip
    path = whole.with_name("altered.jsonl")
    path.write_bytes(content)
    if at == len(content) - 1:  # as if the last line had not been written whole
        assert len(audit.read_lines(path)) == 4
    else:
        with pytest.raises(CheckpointError, match="not as it was written"):
            audit.read_lines(path)


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_last_line_that_was_not_written_whole_is_cut_off(tmp_path: Path, left: int) -> None:
    path = some(tmp_path)
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:left])
    assert len(audit.read_lines(path)) == 4  # a reader leaves the file as it is
    assert path.read_bytes().endswith(last[:left])
    again = log(tmp_path)
    assert path.read_bytes() == b"".join(whole)
    again.write("committed", round=0, attempt=0)
    assert [line["event"] for line in audit.read_lines(path)][-2:] == ["refused", "committed"]


def test_what_a_failed_write_left_is_overwritten(tmp_path: Path) -> None:
    made = log(tmp_path)
    attempt(made, 0, 0, a="11")
    with made.path.open("ab") as file:
        file.write(
            b'{"event": "accepted", ' + b"x" * 500 + b"\n"
        )  # written, and not seen on the disk
    made.write("committed", round=0, attempt=0)
    assert [x["event"] for x in log(tmp_path).lines] == ["opened", "accepted", "committed"]


def test_a_line_is_on_the_disk_when_it_has_been_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = log(tmp_path), []
    monkeypatch.setattr("os.fsync", lambda _: seen.append(made.path.read_bytes()))
    made.write("opened", round=0, attempt=0)
    assert seen == [made.path.read_bytes()]
    assert b"opened" in seen[0]


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    some(tmp_path)
    attempt(log(tmp_path), 1, 0, a="33")
    assert len(log(tmp_path).lines) == 7


def test_offences_are_counted_over_restarts(tmp_path: Path) -> None:
    some(tmp_path)
    again = log(tmp_path)
    again.write("refused", site="c", round=1, attempt=0, code="bad-weight")
    again.write("refused", site="a", round=1, attempt=0, code="duplicate")
    assert log(tmp_path).get_refusals() == {"c": 2, "a": 1}


def test_a_site_is_told_its_last_message_that_counts(tmp_path: Path) -> None:
    made = log(tmp_path)
    attempt(made, 0, 0, a="a0", b="b0")
    attempt(made, 1, 0, a="a1")
    attempt(made, 2, 0, b="b2")
    # of three rounds, all; of two, not the third; of none, nothing
    assert made.get_accepted(3) == {"a": AcceptedMessage(1, "a1"), "b": AcceptedMessage(2, "b2")}
    assert made.get_accepted(2) == {"a": AcceptedMessage(1, "a1"), "b": AcceptedMessage(0, "b0")}
    assert made.get_accepted(0) == {}


@pytest.mark.parametrize("line", [True, False])
def test_a_crash_about_the_commit_leaves_what_the_checkpoint_says(
    tmp_path: Path, line: bool
) -> None:
    made = log(tmp_path)
    attempt(made, 0, 0, a="a0")
    made.write("committed", round=0, attempt=0)
    attempt(made, 1, 0, a="a1")
    if line:
        made.write("committed", round=1, attempt=0)
    again = log(tmp_path)
    assert again.get_accepted(2) == {
        "a": AcceptedMessage(1, "a1")
    }  # with its checkpoint, line or no line
    assert again.get_accepted(1) == {"a": AcceptedMessage(0, "a0")}  # without it
    # the round that was lost is tried again, under the same numbers, and another site answers
    attempt(again, 1, 0, b="b1")
    assert again.get_accepted(2) == {"a": AcceptedMessage(0, "a0"), "b": AcceptedMessage(1, "b1")}


def test_an_attempt_that_was_given_up_does_not_count(tmp_path: Path) -> None:
    made = log(tmp_path)
    attempt(made, 0, 0, a="first", b="first")
    attempt(made, 0, 1, b="second")
    assert made.get_accepted(1) == {"b": AcceptedMessage(0, "second")}


def test_rounds_after_a_checkpoint_that_was_gone_back_to_never_happened(tmp_path: Path) -> None:
    made = log(tmp_path)
    for r in range(4):
        attempt(made, r, 0, a=f"a{r}", b=f"b{r}")
    attempt(made, 2, 0, a="again")
    assert made.get_accepted(4) == {"a": AcceptedMessage(2, "again"), "b": AcceptedMessage(1, "b1")}


def test_what_is_accepted_belongs_to_the_attempt_that_is_open(tmp_path: Path) -> None:
    made = log(tmp_path)
    with pytest.raises(ValueError, match="opened last"):
        made.write("accepted", site="a", round=0, attempt=0, payload="x")
    attempt(made, 0, 0, a="x")
    with pytest.raises(ValueError, match="opened last"):
        made.write("accepted", site="a", round=0, attempt=1, payload="x")
    with pytest.raises(ValueError, match="opened last"):
        log(tmp_path).write("accepted", site="b", round=0, attempt=0, payload="x")


def test_a_log_that_is_not_there_is_empty_to_a_reader(tmp_path: Path) -> None:
    assert audit.read_lines(tmp_path / "audit.jsonl") == []
    assert not (tmp_path / "audit.jsonl").exists()
