"""Build a wheel of the running package, so that a kit installs it without an index.

An installed wheel is rebuilt from its files, each checked against the hash that pip recorded. For
an editable install, the wheel is built from the sources it points to and its metadata.
"""

import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path

from fedgen_edge import __version__
from fedgen_edge.errors import ConfigError
from fedgen_edge.files import SHIPPED, find_shipped

PACKAGE = Path(__file__).parents[2]
METADATA = frozenset(("METADATA", "WHEEL", "entry_points.txt"))
"""Metadata files of a wheel; others describe one installation and its paths."""
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""Timestamp of every file, so that equal sources make equal wheels."""


def build_wheel() -> tuple[str, bytes]:
    """Return the name and content of this package's wheel, which pip installs without an index.

    Raises:
        ConfigError: the package is not installed, or was changed since its installation.
    """
    installed = _find_distribution()
    recorded = {str(file): file for file in installed.files or ()}
    code = {
        name: file
        for name, file in recorded.items()
        if file.parts[0] == PACKAGE.name and file.suffix != ".pyc"
    }
    from_wheel = Path(str(installed.locate_file(PACKAGE.name))).resolve() == PACKAGE.resolve()
    contents = _read_recorded(code) if code and from_wheel else _read_sources()
    metadata = {name: file for name, file in recorded.items() if _is_metadata(file)}
    contents |= _read_recorded(metadata)
    stem = f"fedgen_edge-{__version__}"
    return f"{stem}-py3-none-any.whl", _zip(contents, f"{stem}.dist-info/RECORD")


def _find_distribution() -> Distribution:
    try:
        installed = distribution("fedgen-edge")
    except PackageNotFoundError:
        raise ConfigError(
            "fedgen-edge runs from its sources without being installed: pip install -e ."
        ) from None
    if installed.version != __version__:
        raise ConfigError(
            f"fedgen-edge was installed as {installed.version}, and its sources are "
            f"{__version__}: pip install -e . again"
        )
    return installed


def _is_metadata(file: PackagePath) -> bool:
    folder = f"fedgen_edge-{__version__}.dist-info"
    return file.parts[0] == folder and (file.parts[1] == "licenses" or file.name in METADATA)


def _read_recorded(recorded: Mapping[str, PackagePath]) -> dict[str, bytes]:
    """Read the installed files, each of which must be unchanged since its installation."""
    contents = {name: file.read_binary() for name, file in recorded.items()}
    for name, content in contents.items():
        expected = recorded[name].hash
        if expected is None or expected.value != _digest(content):
            path = Path(str(recorded[name].locate())).resolve()
            raise ConfigError(
                f"{path} is not as it was installed: install fedgen-edge again "
                "before a kit is made of it"
            )
    return contents


def _read_sources() -> dict[str, bytes]:
    """Read the package's folder, and the files beside it that a wheel includes."""
    contents = _read_folder(PACKAGE, PACKAGE.name)
    for name in SHIPPED:
        path = find_shipped(name)
        inside = f"{PACKAGE.name}/{name}"
        contents |= _read_folder(path, inside) if path.is_dir() else {inside: path.read_bytes()}
    return contents


def _read_folder(folder: Path, inside: str) -> dict[str, bytes]:
    return {
        f"{inside}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


def _zip(contents: Mapping[str, bytes], record: str) -> bytes:
    """Make an archive of files, with the record of their hashes last."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerows((n, f"sha256={_digest(c)}", len(c)) for n, c in sorted(contents.items()))
    rows.writerow((record, "", ""))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in [*sorted(contents.items()), (record, table.getvalue().encode())]:
            entry = zipfile.ZipInfo(name, ZIP_TIME)
            entry.external_attr = 0o100644 << 16
            target.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return archive.getvalue()


def _digest(content: bytes) -> str:
    """Return a SHA-256 in the format of a wheel's record."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
