"""Shell completion of `fedgen`, by tyro."""

from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from fedgen_edge.errors import ConfigError

FLAG = "--tyro-print-completion"
SHELLS = ("bash", "zsh", "fish")


def print_completion(commands: Mapping[str, Any], shell: str) -> None:
    """Print the script that completes these commands' names and options.

    Args:
        commands: for each name a class, an instance with its defaults, or subcommands.
        shell: bash, zsh or fish.

    Raises:
        ConfigError: it is another shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"{FLAG}={shell!r} is none of {', '.join(SHELLS)}: name one of them")
    tyro.cli(_make_union(commands), prog="fedgen", args=[FLAG, shell])


def _make_union(commands: Mapping[str, Any]) -> Any:
    kinds = tuple(_make_subcommand(name, command) for name, command in commands.items())
    return Union[kinds]  # noqa: UP007


def _make_subcommand(name: str, command: Any) -> Any:
    default = {}
    if isinstance(command, Mapping):
        kind = _make_union(command)
    elif isinstance(command, type):
        kind = command
    else:
        kind, default = type(command), {"default": command}
    return Annotated[kind, tyro.conf.subcommand(name, prefix_name=False, **default)]
