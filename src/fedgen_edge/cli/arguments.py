"""Parse a command's arguments; every mistake becomes one line."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import tyro

from fedgen_edge.config import Settings, describe_unknown, load
from fedgen_edge.errors import ConfigError, suggest
from fedgen_edge.files import find_recipe

CommandT = TypeVar("CommandT")

TAKE_SETTINGS = frozenset(("run", "pretrain", "plan", "deploy init"))
"""Commands that accept every setting of a run."""


def parse(
    kind: type[CommandT], args: list[str], name: str, default: CommandT | None = None
) -> CommandT:
    """Parse arguments with tyro, whose page-long errors become one line."""
    captured = io.StringIO()
    run_tyro = partial(tyro.cli, kind, args=args, prog=f"fedgen {name}")
    if default is not None:
        run_tyro = partial(run_tyro, default=default)
    if "--help" in args or "-h" in args:
        return run_tyro()
    try:
        with (
            contextlib.redirect_stderr(captured),
            contextlib.redirect_stdout(captured),
            _widen_terminal(),
        ):
            return run_tyro()
    except SystemExit:
        options = [f"--{field.replace('_', '-')}" for field in kind.__annotations__]
        raise ConfigError(_summarize_error(captured.getvalue(), name, options)) from None


@contextlib.contextmanager
def _widen_terminal() -> Iterator[None]:
    """Prevent line breaks in the output that is parsed."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "5000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _summarize_error(page: str, command: str, options: list[str]) -> str:
    text = " ".join(re.sub(r"[╭╮╰╯│─]|-{3,}", " ", page).split())
    if unrecognized := re.search(r"Unrecognized options: ([^\s,=]+)", text):
        return _describe_unrecognized(unrecognized[1], command, options)
    invalid = re.search(
        r"Error parsing (\S+): \d+ validation errors? for \w+ (\S+) (.*?) \[type=\S+ "
        r"input_value=(.*?), input_type",
        text,
    )
    if invalid:
        part, key, reason, value = invalid.groups()
        name = f"{part.removeprefix('settings.')}.{key}"
        reason = reason[0].lower() + reason[1:]
        return f"{name}={value}: {reason}; `fedgen run --help` explains it"
    text = re.sub(r"^(Required options|Missing argument|Invalid choice|Value error) ", "", text)
    text = text.split(" Argument helptext")[0].split(" For full helptext")[0]
    return f"{text} (`fedgen {command} --help` explains it)"


def _describe_unrecognized(word: str, command: str, options: list[str]) -> str:
    if word.startswith("--") and command in TAKE_SETTINGS:
        return describe_unknown(word.removeprefix("--"), options)
    if word.startswith("-"):
        suggestion = suggest(word, options) if word.startswith("--") else ""
        hint = suggestion or f"`fedgen {command} --help` lists them"
        return f"fedgen {command} has no option {word}: {hint}"
    hint = f"`fedgen {command} --help` explains it"
    if word.lower() in {"true", "false"}:
        hint = "a switch takes no value: say --NAME, or --no-NAME"
    elif word.endswith(".toml") and command in TAKE_SETTINGS:
        hint = f"a recipe comes first: fedgen {command} {word} --..."
    return f"fedgen {command} cannot use {word!r} here: {hint}"


def pop_recipe(args: list[str]) -> tuple[str | None, Settings]:
    """Remove a leading recipe from the arguments, and return it with its settings."""
    name = args.pop(0) if args and not args[0].startswith("-") else None
    return name, load(find_recipe(name)) if name else Settings()
