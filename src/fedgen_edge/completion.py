"""A shell's completion of `fedgen`, by tyro."""

from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from fedgen_edge.errors import ConfigError

FLAG = "--tyro-print-completion"
SHELLS = ("bash", "zsh", "fish")


def print_completion(commands: Mapping[str, Any], shell: str) -> None:
    """Print the script that completes these commands' names and options.

    Args:
        commands: a class for each, or an instance that has its defaults.
        shell: bash, zsh or fish.

    Raises:
        ConfigError: it is another.
    """
    if shell not in SHELLS:
        raise ConfigError(f"{FLAG}={shell!r} is none of {', '.join(SHELLS)}: name one of them")
    kinds = []
    for name, command in commands.items():
        kind, default = (
            (command, {})
            if isinstance(command, type)
            else (
                type(command),
                {"default": command},
            )
        )
        kinds.append(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False, **default)])
    union: Any = Union[tuple(kinds)]  # noqa: UP007
    tyro.cli(union, prog="fedgen", args=[FLAG, shell])
