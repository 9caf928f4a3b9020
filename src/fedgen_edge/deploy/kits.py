"""A deployment's folders: the server's, and the kit of each site.

Every file is made before the first is written, and what is written only its owner can read.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from fedgen_edge import files
from fedgen_edge.algorithms.clusters import enough
from fedgen_edge.algorithms.methods import check, method
from fedgen_edge.algorithms.share import nothing
from fedgen_edge.config import Settings, flat, load
from fedgen_edge.deploy import contents
from fedgen_edge.deploy.address import reached
from fedgen_edge.deploy.members import members, names, revoked
from fedgen_edge.deploy.settings import Federation, Name, read
from fedgen_edge.deploy.software import pack_software
from fedgen_edge.errors import ConfigError
from fedgen_edge.schedule import cohort_size
from fedgen_edge.uplink.wire import made

TIMED = ("devices.", "federation.over", "federation.deadline")
"""What settings of a simulation's clock begin with."""
MOST = 500
"""Sites of one server: about as many as Flower's can keep in touch with."""

Where = TypeVar("Where", str, Path | None)


def init(
    settings: Settings, names: Sequence[str], address: str, out: Path, port: int = 18443
) -> list[Path]:
    """Make the server's folder, with a kit for each site; it appears whole, or not at all.

    Args:
        settings: of the run.
        names: of the sites.
        address: host and port where sites reach the proxy.
        out: the folder, which must be new.
        port: of Flower's server, on its machine alone.

    Returns:
        The kits' folders.

    Raises:
        ConfigError: the recipe cannot be deployed, or an argument is not what it must be.
    """
    _check_ports(reached(address).port, port)
    for at, name in enumerate(names):
        _check_name(name, names[:at])
    deployable(settings, len(names))
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"out={str(out)!r} is there already: name a new folder by --out, or add a site to it "
            f"by `fedgen deploy add NAME {out}`"
        )
    if any(ord(letter) < 32 for letter in str(out.resolve())):
        raise ConfigError(f"out={str(out)!r} has a line break or the like: services cannot name it")
    federation = Federation(address=address, port=port)
    content = contents.server(shared(settings), names, federation, out.resolve())
    with _private(), files.folder(out) as draft:
        (draft / "revoked").mkdir()
        (draft / "proxy" / "temp").mkdir(parents=True)
        _lay(draft, content)
    return [out / "kits" / name for name in names]


def add(name: str, folder: Path) -> Path:
    """Make a kit for one more site, and let it take part.

    Raises:
        ConfigError: the name is no name, or was given before.
    """
    federation = read(Federation, folder / "federation.toml")
    _check_name(name, members(folder))
    for old in revoked(folder):
        if old.casefold() == name.casefold():
            raise ConfigError(
                f"site={name!r} was revoked as {old!r}, and stays so: add it by another name, "
                f"such as {name}-2"
            )
    ca, recipe = (folder / "ca" / "ca.crt").read_bytes(), load(folder / "recipe.toml")
    content = contents.kit(name, federation.address, recipe, ca, pack_software())
    with _private():
        with files.folder(folder / "kits" / name) as draft:
            _lay(draft, content)
        files.write(folder / "sites" / f"{name}.pub", content["key.pub"])
    return folder / "kits" / name


def revoke(name: str, folder: Path) -> None:
    """Let a site take part no more.

    Raises:
        ConfigError: no such site takes part.
    """
    read(Federation, folder / "federation.toml")
    path = folder / "sites" / f"{name}.pub"
    if name not in names(folder / "sites"):
        gone = "was revoked already" if name in revoked(folder) else "is no site here"
        raise ConfigError(
            f"site={name!r} {gone}: those that take part are {', '.join(members(folder)) or 'none'}"
        )
    with _private():
        files.write(folder / "revoked" / path.name, path.read_bytes())
    path.unlink()


def sites(asked: str) -> list[str]:
    """Names of sites, from `north,south` or a number, of which `3` is site-1, site-2 and site-3.

    Raises:
        ConfigError: none, or too many.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", asked):
        return asked.split(",")
    # a number of any length is compared by its digits first: Python reads 4,300 at most
    if len(asked) > 9 or not 1 <= int(asked) <= MOST:
        raise ConfigError(f"sites={asked[:20]} must be from 1 to {MOST}, or names with commas")
    return [f"site-{number + 1}" for number in range(int(asked))]


def deployable(settings: Settings, sites: int) -> None:
    """Refuse what a federation of many machines cannot carry out, as far as settings tell.

    `partition` is for one machine that divides data; here each site's data are its own, and it
    says nothing.

    Args:
        settings: of the run.
        sites: how many there are, revoked ones too: nothing that was deployable stops being so.

    Raises:
        ConfigError: names the setting, and the way out.
    """
    check(settings)
    made(settings.uplink, settings.downlink, 0, {})
    algorithm, federation, evaluation = (
        method(settings.method, adapter=settings.adapter),
        settings.federation,
        settings.evaluation,
    )
    pictures = settings.task != "language"
    timed = [f"{k}={v!r}" for k, v in flat(settings) if k.startswith(TIMED) and v]
    strange = [name for name in evaluation.prompts if name not in settings.data.names]
    alone = algorithm.sends is nothing or algorithm.pools
    objections = {
        f"method.name={settings.method.name!r} is no federation, but what one is compared with: "
        "use `fedgen run`, or another method": alone,
        f"evaluation.baselines={evaluation.baselines!r} are a comparison on one machine, for "
        "`fedgen run`: take them out, or say --evaluation.baselines with nothing after it": (
            bool(evaluation.baselines)
        ),
        f"federation.candidates={federation.candidates} needs the last loss of every site, and "
        "some may be away: leave it out": federation.candidates is not None,
        f"method.name={settings.method.name!r} commits by a virtual clock, and sites have none: "
        "use `fedgen run`, or another method": bool(algorithm.buffer),
        f"{', '.join(timed)}: a simulation's devices and rounds by its clock, which sites do not "
        "have: leave it out; federation.toml has over_selection and deadline": bool(timed),
        f"federation.newcomers={federation.newcomers} are for `fedgen run`: leave it out, and add "
        "sites at any time by `fedgen deploy add`": bool(federation.newcomers),
        f"federation.clients={federation.clients} is not the number of sites, {sites}: leave it "
        "out, since sites are the clients": federation.clients not in {None, sites},
        f"judging.features={settings.judging.features!r} sees all sites' pictures in one place: "
        "leave it out": settings.judging.features is not None,
        "data.names=() would let each site number its classes its own way: name all classes, in "
        "the order that the backbone knows": pictures and not settings.data.names,
        f"evaluation.prompts={evaluation.prompts!r} are no classes of data.names: "
        f"{', '.join(settings.data.names)} are": pictures and bool(strange),
    }
    for objection, holds in objections.items():
        if holds:
            raise ConfigError(objection)
    enough(algorithm.clusters, cohort_size(federation, sites))


def shared(settings: Settings) -> Settings:
    """The settings that the server and every kit begin with.

    Sites are the clients, and say themselves where their data are, of which nothing is public.
    Paths on this machine are written from the root, so that the server finds them wherever it is
    started.
    """
    path = settings.data.path if settings.data.source == "hub" else None
    data = replace(settings.data, path=path, public=0.0, unseen=(), part="private")
    return replace(
        settings,
        data=data,
        federation=replace(settings.federation, clients=None),
        backbone=replace(
            settings.backbone,
            path=_absolute(settings.backbone.path),
            autoencoder=_absolute(settings.backbone.autoencoder),
        ),
        adapter=replace(settings.adapter, initial=_absolute(settings.adapter.initial)),
    )


def _absolute(path: Where) -> Where:
    """A path that is there, from the root; a name as it is."""
    if path is None or str(path) == "tiny" or not Path(path).exists():
        return path
    return type(path)(Path(path).resolve())


def _check_ports(public: int, port: int) -> None:
    if not 1 <= port <= 65535 or port == public:
        raise ConfigError(
            f"port={port} is Flower's server's on this machine, and must be from 1 to 65535 and "
            "not the address's: the proxy has that"
        )


def _check_name(name: str, others: Collection[str]) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"site={name[:80]!r} must be letters, digits, - and _, begin with a letter or digit, "
            "and have at most 63 of them"
        ) from None
    for other in others:
        if other.casefold() == name.casefold():
            raise ConfigError(f"site={name!r} is there already, as {other!r}: give another name")


def _lay(folder: Path, content: Mapping[str, bytes]) -> None:
    for path, said in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(said)


@contextmanager
def _private() -> Iterator[None]:
    """What is made meanwhile is its owner's alone: files 0600, folders 0700."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
