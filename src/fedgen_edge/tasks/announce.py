"""One line of ours where a library would show a bar of its own."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

SPEED = 5e6
"""Bytes of a GGUF file that one core of a busy machine converts in a second."""


def announce_conversion(file: Path, convert: Callable[[Path], None], folder: Path) -> None:
    """Convert a GGUF file into a folder, and say beforehand that it takes a while.

    The bar over its tensors is tqdm's own: transformers shows it with all its bars disabled.
    """
    seconds = max(1, round(file.stat().st_size / SPEED))
    print(
        f"converting {file.name} to safetensors, once on this machine: about {seconds} s",
        file=sys.stderr,
        flush=True,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        convert(folder)
