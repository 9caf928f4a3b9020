"""Files damaged in many ways, for whoever reads them."""

import contextlib
import json
import random
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tomli_w

from fedgen_edge.errors import FedGenError

WRONG = ["wrong", 10**400, {"a": 1}, None, True, -1, [], 0.5]
"""Values of other types than a field has, or beyond its range."""


def some(path: Path, count: int) -> list[bytes]:
    """So many of a file's damages, drawn by its name."""
    every = list(damages(path))
    return random.Random(path.name).sample(every, min(count, len(every)))


def mistake(act: Callable[[], object], content: bytes) -> str:
    """The message of the one kind of error that a user may see; empty where there is none."""
    try:
        act()
    except FedGenError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(content[:200]) from error
    return ""


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
