"""Read arrays from .npz files and pickles, after checking the sizes they claim.

Nothing in a pickle is called: its arrays become `PickledArray`, which holds bytes of the file.
"""

import math
import pickle
import pickletools
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

MAX_EXPANSION = 1032
"""Maximum bytes that one byte of a zip file can expand to, given its method."""
INTEGER_DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}


def check_npz(path: Path) -> None:
    """Check that each array of an .npz file claims no more bytes than the file can hold.

    Raises:
        ValueError: an array claims more; zipfile raises its own errors if the file is not a zip.
    """
    max_bytes = path.stat().st_size * MAX_EXPANSION
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = npy.read_magic(file)
                read_header = (
                    npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                )
                shape, _, dtype = read_header(file)
            claim = math.prod(shape) * dtype.itemsize
            if claim > min(member.file_size, max_bytes):
                raise ValueError(f"{member.filename} claims {claim} bytes, more than it can hold")


class PickledArray:
    """An array as a pickle describes it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, by_column, self.raw = state
        self.order: Any = "F" if by_column else "C"

    def read(self) -> np.ndarray:
        """Return the array, made of exactly the bytes that the pickle has for it."""
        return np.frombuffer(self.raw, self.kind.name).reshape(self.shape, order=self.order).copy()


class _PickledDtype:
    """An array's type as a pickle describes it."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name
        if self.name not in INTEGER_DTYPES:
            raise pickle.UnpicklingError(f"it has an array of {str(self.name)[:20]!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.name = f">{self.name}"


def _begin_array(*_: Any) -> PickledArray:
    return PickledArray()


def _encode(text: str, encoding: Any) -> bytes:
    if encoding not in {"latin1", b"latin1"}:
        raise pickle.UnpicklingError(f"it asks for the encoding {str(encoding)[:20]!r}")
    return text.encode("latin1")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _begin_array,
    ("numpy._core.multiarray", "_reconstruct"): _begin_array,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode,
}
"""Substitutes for everything that a pickle of arrays calls."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists and numbers; whatever else a pickle would call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return STAND_INS[module, name]


def read_pickle(path: Path) -> Any:
    """Read the lists, numbers and arrays of a pickle, after checking its claims against the file.

    Raises:
        UnpicklingError: the pickle asks for anything else, or claims more than the file has.
    """
    raw = path.read_bytes()
    for code, claim, _ in pickletools.genops(raw):
        if code.name in {"FRAME", "LONG_BINPUT", "PUT"} and int(claim or 0) > len(raw):
            raise pickle.UnpicklingError(f"it claims {claim} bytes, and has {len(raw)}")
    return _ArrayUnpickler(BytesIO(raw), encoding="bytes").load()
