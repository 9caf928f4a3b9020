"""What a kit installs: our wheel as pip takes it, and pinned libraries, from no index of ours."""

import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedgen_edge.config import from_table
from fedgen_edge.deploy.provision import kits
from fedgen_edge.deploy.provision.software import pack_software
from fedgen_edge.deploy.provision.wheel import build_wheel

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements-kit.lock"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of these sources, as a file."""
    name, content = build_wheel()
    path = tmp_path_factory.mktemp("wheel") / name
    path.write_bytes(content)
    return path


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    """A folder where pip has installed it, without an index."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    folder = tmp_path / "site"
    subprocess.run([*pip, "--no-compile", "--target", folder, wheel], check=True, timeout=120)
    return folder


def run_installed(site: Path, program: str) -> str:
    """What a program prints that finds the installed package, and these sources not."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(site)}, cwd=site,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_pip_installs_the_wheel_without_an_index_and_python_finds_the_package(site: Path) -> None:
    where = run_installed(site, "import fedgen_edge; print(fedgen_edge.__file__)")
    assert where.strip() == str(site / "fedgen_edge" / "__init__.py")


def test_its_record_has_the_size_and_sha256_of_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = archive.read(names[-1]).decode()
        sizes = {row[0]: row[1:] for row in csv.reader(io.StringIO(record))}
        assert list(sizes) == names
        assert sizes.pop(names[-1]) == ["", ""]
        for name, (written, size) in sizes.items():
            content = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            assert (written, int(size)) == (f"sha256={digest.rstrip('=')}", len(content))


def test_a_wheel_made_of_an_installed_wheel_is_the_same_to_the_byte(
    wheel: Path, site: Path
) -> None:
    program = (
        "import hashlib; from fedgen_edge.deploy.provision.wheel import build_wheel; "
        "name, content = build_wheel(); print(name, hashlib.sha256(content).hexdigest())"
    )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert run_installed(site, program).split() == [wheel.name, digest]


def test_a_package_that_was_changed_after_its_installation_goes_into_no_kit(site: Path) -> None:
    changed = site / "fedgen_edge" / "seeds.py"
    changed.write_text(changed.read_text() + "\n")
    said = run_installed(
        site, "from fedgen_edge.deploy.provision.wheel import build_wheel; build_wheel()"
    )
    assert said.splitlines()[-1].endswith(
        f"ConfigError: {changed} is not as it was installed: install fedgen-edge again before a "
        "kit is made of it"
    )


def test_the_wheel_has_recipes_types_and_the_lock_and_no_trace_of_this_machine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for path in (ROOT / "recipes").iterdir():
        assert files[f"fedgen_edge/recipes/{path.name}"] == path.read_bytes()
    assert files["fedgen_edge/requirements-kit.lock"] == LOCK.read_bytes()
    assert {"fedgen_edge/py.typed", "fedgen_edge/deploy/templates/kit.md.jinja"} <= set(files)
    assert not [name for name in files if name.endswith(".pyc") or "/." in name]
    assert not [name for name, content in files.items() if str(ROOT).encode() in content]


# ---- what is pinned


def test_the_kit_of_an_installed_server_has_the_whole_lock(site: Path) -> None:
    program = (
        "from fedgen_edge.deploy.provision.software import *; print(find_shipped(LOCK)); "
        "print(pack_software()['requirements.txt'].decode(), end='')"
    )
    where, _, requirements = run_installed(site, program).partition("\n")
    assert where == str(site / "fedgen_edge" / LOCK.name)
    assert requirements == LOCK.read_text()


def test_all_that_a_pinned_library_needs_is_pinned_too_but_torch() -> None:
    text = pack_software()["requirements.txt"].decode()
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    pinned = {canonicalize_name(name): release for name, release in found}
    assert {"flwr", "cryptography", "diffusers", "datasets", "pandas", "zstandard"} <= {*pinned}
    assert not {"torch", "pytest", "ruff", "ray", "sympy", "fedgen-edge"} & {*pinned}
    for name, release in pinned.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if installed.version != release:  # beside the oldest libraries: it may need others
            continue
        for other in map(Requirement, installed.requires or ()):
            if other.marker is None or other.marker.evaluate({"extra": ""}):
                assert canonicalize_name(other.name) in {*pinned, "torch"}, (name, other)


# ---- where it goes, and what the pages say


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder with two kits."""
    folder = tmp_path_factory.mktemp("deployed") / "fed"
    settings = from_table({"backbone": {"path": "tiny"}, "evaluation": {"baselines": []}})
    kits.init(settings, ["north", "south"], "fed.example.org:8443", folder)
    return folder


def test_server_and_sites_carry_the_same_software(federation: Path, wheel: Path) -> None:
    requirements = (federation / "software" / "requirements.txt").read_bytes()
    for folder in (federation, federation / "kits" / "north", federation / "kits" / "south"):
        assert (folder / "software" / wheel.name).read_bytes() == wheel.read_bytes()
        assert (folder / "software" / "requirements.txt").read_bytes() == requirements


def test_every_page_installs_by_hash_and_the_wheel_that_lies_beside_it(federation: Path) -> None:
    pages = ["README.md", "software/Dockerfile", "kits/north/README.md"]
    for page in pages:
        text = (federation / page).read_text()
        assert "--require-hashes -r " in text
        assert re.search(r"--no-index --no-deps \S*software/fedgen_edge-\S+\.whl", text)
    copied = re.search(r"^COPY (.+) /software/$", (federation / pages[1]).read_text(), re.M)
    assert copied
    assert all((federation / "software" / name).is_file() for name in copied[1].split())


def test_nothing_installs_our_name_from_an_index(federation: Path) -> None:
    folders = [federation, ROOT / "src", ROOT / "docs", ROOT / "recipes", ROOT / "examples"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [*ROOT.glob("*.md"), ROOT / "Makefile"]
    written = [path for path in files if path.suffix not in {".whl", ".pyc", ".svg", ".png"}]
    lines = [(path, line) for path in written for line in path.read_text().splitlines()]
    bad = re.compile(r"pip\d? install.*fedgen[-_]edge(?!\S*\.whl)")
    assert [(path, line) for path, line in lines if bad.search(line)] == []
