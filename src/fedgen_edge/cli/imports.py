"""Import heavy libraries quickly, and name the package to install if one is missing."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "flwr": "flwr==1.41.0"}
"""Packages whose names for pip differ from their modules' names."""


@contextmanager
def speed_up_imports() -> Iterator[None]:
    """Import heavy libraries without garbage collection of their objects, then or later.

    If they are already imported, this does nothing.
    """
    if "torch" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def explain_missing(error: ModuleNotFoundError) -> str:
    """One line for a library that is not installed.

    Raises:
        ModuleNotFoundError: the module is our own.
    """
    module = (error.name or "").partition(".")[0]
    if module in {"", "fedgen_edge"}:
        raise error
    return f"{module} is not installed: pip install {PACKAGES.get(module, module)}"
