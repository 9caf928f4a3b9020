"""Whatever became of a run's files, a command does its work or says in one line what is damaged."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import sentences
from fedgen_edge import cli
from fedgen_edge.config import from_table
from fedgen_edge.experiments.run import create, proceed

WRONG = ["wrong", 10**400, {"a": 1}, None, True, -1, [], 0.5]
"""Values of other types than a field has, or beyond its range."""
SKIPPED = {"report.html", "adapter_config.json", ".lock"}
"""Files that no command reads, and PEFT's, whose reader has tests of its own."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that a run of text writes."""
    folder = tmp_path_factory.mktemp("damage")
    rows = [{"text": text, "who": f"client {c}"} for c in range(2) for text in sentences(8, c)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = from_table(
        {
            "backbone": {"path": "tiny", "precision": "float32"},
            "data": {"source": "jsonl", "path": str(folder / "text.jsonl"), "length": 16}
            | {"client_field": "who"},
            "federation": {"rounds": 2},
            "method": {"name": "fedper"},
            "training": {"batch": 8},
            "personal": {"epochs": 1},
            "engine": {"threads": 1},
            "evaluation": {"baselines": ["local-only"], "sample_tokens": 1, "prompts": ["One"]},
        }
    )
    for _ in proceed(create(settings, folder / "run"), folder / "run"):
        pass
    return folder / "run"


def of_every_field(value: Any) -> Iterator[Any]:
    """The value with one field missing, or wrong, each in turn."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        inner = value[key]
        rest = {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else None
        if rest is not None:
            yield rest
        changed = [wrong for wrong in WRONG if type(wrong) is not type(inner)]
        if isinstance(inner, dict | list) and inner:
            changed = [*changed[:3], *of_every_field(inner)]
        for other in changed:
            copy = value.copy()
            copy[key] = other
            yield copy


def written(path: Path, value: Any) -> bytes:
    return json.dumps(value).encode() + (b"\n" if path.suffix == ".jsonl" else b"")


def damages(path: Path) -> Iterator[bytes]:
    """A file's content, damaged in many ways."""
    content = path.read_bytes()
    yield from (b"", content[: len(content) // 2], content[:-1], b"\xff" + content[1:])
    yield from (b"\0" * len(content), b"\xff\n", b"[]\n", b"17\n", b"null\n", b'"text"\n', b"{}\n")
    yield from (b"[" * 5000 + b"]" * 5000 + b"\n", b'{"a":' * 300 + b"1" + b"}" * 300 + b"\n")
    yield b"9" * 5000 + b"\n"
    if path.suffix == ".json":
        yield from (written(path, value) for value in of_every_field(json.loads(content)))
    if path.suffix == ".toml":
        yield from (b"a = " + b"[" * 5000 + b"]" * 5000, b"seed = " + b"9" * 5000)
        yield from (b"seed = 0x" + b"9" * 5000, b'task = "a\\u0000"', b"a" + b".a" * 300 + b" = 1")
        for value in of_every_field(tomllib.loads(content.decode())):
            with contextlib.suppress(TypeError):  # None is no value of TOML
                yield tomli_w.dumps(value).encode()
    if path.suffix == ".jsonl":
        first, *rest = content.splitlines(keepends=True)
        for value in of_every_field(json.loads(first)):
            yield written(path, value) + b"".join(rest)
        yield from (b"".join(rest), first + b"[]\n" + b"".join(rest), b"\n" + content)


def commands(run: Path, out: Path) -> dict[str, list[str]]:
    return {
        "resume": ["resume", str(run)],
        "report": ["report", str(run), "--out", str(out / "report.html")],
        "generate": ["generate", str(run), "--prompt", "a", "--tokens", "1"],
        "export": ["export", str(run), "--out", str(out / "export")],
        "status": ["status", str(run)],
    }


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """A command's exit status, and what it says of a mistake."""
    capsys.readouterr()
    status: object = 0
    try:
        cli.main(arguments)
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err
