"""From a command's arguments to what they ask for; every mistake is one line."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import tyro

from fedgen_edge.config import Settings, load, unknown
from fedgen_edge.errors import ConfigError
from fedgen_edge.files import find_recipe
from fedgen_edge.spelling import suggest

Told = TypeVar("Told")

TAKE_SETTINGS = frozenset(("run", "pretrain", "plan", "deploy init"))
"""Commands that every setting of a run can be given to."""


def parse(kind: type[Told], args: list[str], name: str, default: Told | None = None) -> Told:
    """Read arguments with tyro, whose page-long complaints become one line."""
    said = io.StringIO()
    read = partial(tyro.cli, kind, args=args, prog=f"fedgen {name}")
    if default is not None:
        read = partial(read, default=default)
    if "--help" in args or "-h" in args:
        return read()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), _wide():
            return read()
    except SystemExit:
        options = [f"--{field.replace('_', '-')}" for field in kind.__annotations__]
        raise ConfigError(_one_line(said.getvalue(), name, options)) from None


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """No line breaks in what is read back."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "5000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _one_line(page: str, command: str, options: list[str]) -> str:
    text = " ".join(re.sub(r"[╭╮╰╯│─]|-{3,}", " ", page).split())
    if unrecognized := re.search(r"Unrecognized options: ([^\s,=]+)", text):
        return _unrecognized(unrecognized[1], command, options)
    refused = re.search(
        r"Error parsing (\S+): \d+ validation errors? for \w+ (\S+) (.*?) \[type=\S+ "
        r"input_value=(.*?), input_type",
        text,
    )
    if refused:
        part, key, reason, value = refused.groups()
        name = f"{part.removeprefix('settings.')}.{key}"
        reason = reason[0].lower() + reason[1:]
        return f"{name}={value}: {reason}; `fedgen run --help` explains it"
    text = re.sub(r"^(Required options|Missing argument|Invalid choice|Value error) ", "", text)
    text = text.split(" Argument helptext")[0].split(" For full helptext")[0]
    return f"{text} (`fedgen {command} --help` explains it)"


def _unrecognized(word: str, command: str, options: list[str]) -> str:
    if word.startswith("--") and command in TAKE_SETTINGS:
        return unknown(word.removeprefix("--"), options)
    if word.startswith("-"):
        near = suggest(word, options) if word.startswith("--") else ""
        hint = near or f"`fedgen {command} --help` lists them"
        return f"fedgen {command} has no option {word}: {hint}"
    hint = f"`fedgen {command} --help` explains it"
    if word.lower() in {"true", "false"}:
        hint = "a switch takes no value: say --NAME, or --no-NAME"
    elif word.endswith(".toml") and command in TAKE_SETTINGS:
        hint = f"a recipe comes first: fedgen {command} {word} --..."
    return f"fedgen {command} cannot use {word!r} here: {hint}"


def recipe(args: list[str]) -> tuple[str | None, Settings]:
    """The recipe that comes first, taken off the arguments, and its settings."""
    name = args.pop(0) if args and not args[0].startswith("-") else None
    return name, load(find_recipe(name)) if name else Settings()
