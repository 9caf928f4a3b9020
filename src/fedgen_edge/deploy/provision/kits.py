"""Write a deployment's folders: the server's, and the kit of each site.

Every file is made before the first is written, and only the owner can read them.
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
from fedgen_edge.algorithms.ifca import check_cohort_size
from fedgen_edge.algorithms.methods import check, make_algorithm
from fedgen_edge.algorithms.share import share_nothing
from fedgen_edge.compression.wire import make_wire
from fedgen_edge.config import Settings, iter_settings, load
from fedgen_edge.deploy.members import list_key_names, list_revoked, read_member_keys
from fedgen_edge.deploy.provision import contents
from fedgen_edge.deploy.provision.address import parse_address
from fedgen_edge.deploy.provision.software import pack_software
from fedgen_edge.deploy.settings import DeploymentSettings, Name, read
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.schedule import cohort_size

CLOCK_SETTINGS = ("devices.", "federation.over_selection", "federation.deadline")
"""Prefixes of the settings of a simulation's clock."""
MAX_SITES = 500
"""Maximum sites of one server: about as many as Flower's server can handle."""

PathT = TypeVar("PathT", str, Path | None)


def init(
    settings: Settings, names: Sequence[str], address: str, out: Path, port: int = 18443
) -> list[Path]:
    """Make the server's folder, with a kit for each site; it appears complete or not at all.

    Args:
        settings: settings of the run.
        names: names of the sites.
        address: host and port at which sites reach the proxy.
        out: the folder, which must be new.
        port: port of Flower's server, reachable only on its machine.

    Returns:
        The kits' folders.

    Raises:
        ConfigError: the recipe cannot be deployed, or an argument is invalid.
    """
    _check_ports(parse_address(address).port, port)
    for index, name in enumerate(names):
        _check_name(name, names[:index])
    check_deployable(settings, len(names))
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"out={str(out)!r} is there already: name a new folder by --out, or add a site to it "
            f"by `fedgen deploy add NAME {out}`"
        )
    if any(ord(letter) < 32 for letter in str(out.resolve())):
        raise ConfigError(f"out={str(out)!r} has a line break or the like: services cannot name it")
    federation = DeploymentSettings(address=address, port=port)
    content = contents.make_server_files(
        make_shared_settings(settings), names, federation, out.resolve()
    )
    with _restrict_permissions(), files.replace_folder(out) as draft:
        (draft / "revoked").mkdir()
        (draft / "proxy" / "temp").mkdir(parents=True)
        _write_files(draft, content)
    return [out / "kits" / name for name in names]


def add(name: str, folder: Path) -> Path:
    """Make a kit for one more site, and let it take part.

    Raises:
        ConfigError: the name is invalid, or already in use.
    """
    federation = read(DeploymentSettings, folder / "federation.toml")
    _check_name(name, read_member_keys(folder))
    for revoked_name in list_revoked(folder):
        if revoked_name.casefold() == name.casefold():
            raise ConfigError(
                f"site={name!r} was revoked as {revoked_name!r}, and stays so: add it by "
                "another name, "
                f"such as {name}-2"
            )
    ca, recipe = (folder / "ca" / "ca.crt").read_bytes(), load(folder / "recipe.toml")
    content = contents.make_kit_files(name, federation.address, recipe, ca, pack_software())
    with _restrict_permissions():
        with files.replace_folder(folder / "kits" / name) as draft:
            _write_files(draft, content)
        files.write(folder / "sites" / f"{name}.pub", content["key.pub"])
    return folder / "kits" / name


def revoke(name: str, folder: Path) -> None:
    """Exclude a site from the federation.

    Raises:
        ConfigError: no such site takes part.
    """
    read(DeploymentSettings, folder / "federation.toml")
    path = folder / "sites" / f"{name}.pub"
    if name not in list_key_names(folder / "sites"):
        reason = "was revoked already" if name in list_revoked(folder) else "is no site here"
        raise ConfigError(
            f"site={name!r} {reason}: those that take part are "
            f"{', '.join(read_member_keys(folder)) or 'none'}"
        )
    with _restrict_permissions():
        files.write(folder / "revoked" / path.name, path.read_bytes())
    path.unlink()


def parse_sites(spec: str) -> list[str]:
    """Parse names of sites, from `north,south` or a number: `3` is site-1, site-2 and site-3.

    Raises:
        ConfigError: there are no names, or too many.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", spec):
        return spec.split(",")
    # count the digits first: Python parses at most 4,300
    if len(spec) > 9 or not 1 <= int(spec) <= MAX_SITES:
        raise ConfigError(f"sites={spec[:20]} must be from 1 to {MAX_SITES}, or names with commas")
    return [f"site-{number + 1}" for number in range(int(spec))]


def check_deployable(settings: Settings, sites: int) -> None:
    """Refuse settings that a federation of many machines cannot carry out.

    `partition` is for one machine that divides data; here each site has its own data, and the
    setting is ignored.

    Args:
        settings: settings of the run.
        sites: number of sites, revoked ones too, so that a deployable run stays deployable.

    Raises:
        ConfigError: a setting cannot be deployed; names it, and the way out.
    """
    check(settings)
    make_wire(settings.uplink, settings.downlink, 0, {})
    algorithm, federation, evaluation = (
        make_algorithm(settings.method, adapter=settings.adapter),
        settings.federation,
        settings.evaluation,
    )
    is_image_task = settings.task != "language"
    defaults = dict(iter_settings(Settings()))
    clock_settings = [
        f"{name}={value!r}"
        for name, value in iter_settings(settings)
        if name.startswith(CLOCK_SETTINGS) and value != defaults[name]
    ]
    unknown_prompts = [name for name in evaluation.prompts if name not in settings.data.names]
    is_local = algorithm.sends is share_nothing or algorithm.pools_data
    objections = {
        f"method.name={settings.method.name!r} is no federation, but what one is compared with: "
        "use `fedgen run`, or another method": is_local,
        f"evaluation.baselines={evaluation.baselines!r} are a comparison on one machine, for "
        "`fedgen run`: take them out, or say --evaluation.baselines with nothing after it": (
            bool(evaluation.baselines)
        ),
        f"federation.power_of_choice={federation.power_of_choice} needs the last loss of every "
        "site, and some may be away: leave it out": federation.power_of_choice is not None,
        f"method.name={settings.method.name!r} commits by a virtual clock, and sites have none: "
        "use `fedgen run`, or another method": bool(algorithm.buffer),
        f"{', '.join(clock_settings)}: a simulation's devices and rounds by its clock, "
        f"which sites do not "
        "have: leave it out; federation.toml has over_selection and deadline": bool(clock_settings),
        f"federation.unseen_clients={federation.unseen_clients} are for `fedgen run`: leave it "
        "out, and add sites at any time by `fedgen deploy add`": bool(federation.unseen_clients),
        f"federation.clients={federation.clients} is not the number of sites, {sites}: leave it "
        "out, since sites are the clients": federation.clients not in {None, sites},
        f"image_metrics.features={settings.image_metrics.features!r} sees all sites' pictures in "
        "one place: leave it out": settings.image_metrics.features is not None,
        "data.names=() would let each site number its classes its own way: name all classes, in "
        "the order that the backbone knows": is_image_task and not settings.data.names,
        f"evaluation.prompts={evaluation.prompts!r} are no classes of data.names: "
        f"{', '.join(settings.data.names)} are": is_image_task and bool(unknown_prompts),
    }
    for objection, holds in objections.items():
        if holds:
            raise ConfigError(objection)
    check_cohort_size(algorithm.clusters, cohort_size(federation, sites))


def make_shared_settings(settings: Settings) -> Settings:
    """Return the settings that the server and every kit start with.

    Sites are the clients, and set the paths of their data themselves; none of it is public. Paths
    on this machine become absolute, so that the server finds them wherever it is started.
    """
    path = settings.data.path if settings.data.source == "hub" else None
    data = replace(settings.data, path=path, public=0.0, unseen=(), part="private")
    return replace(
        settings,
        data=data,
        federation=replace(settings.federation, clients=None),
        backbone=replace(
            settings.backbone,
            path=_make_absolute(settings.backbone.path),
            autoencoder=_make_absolute(settings.backbone.autoencoder),
        ),
        adapter=replace(settings.adapter, initial=_make_absolute(settings.adapter.initial)),
    )


def _make_absolute(path: PathT) -> PathT:
    """Make an existing path absolute; leave a name unchanged."""
    if path is None or str(path) == "tiny" or not Path(path).exists():
        return path
    return type(path)(Path(path).resolve())


def _check_ports(public: int, port: int) -> None:
    if not 1 <= port <= 65535 or port == public:
        raise ConfigError(
            f"port={port} is Flower's server's on this machine, and must be from 1 to 65535 and "
            "not the address's: the proxy has that"
        )


def _check_name(name: str, existing_names: Collection[str]) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"site={name[:80]!r} must be letters, digits, - and _, begin with a letter or digit, "
            "and have at most 63 of them"
        ) from None
    for existing in existing_names:
        if existing.casefold() == name.casefold():
            raise ConfigError(f"site={name!r} is there already, as {existing!r}: give another name")


def _write_files(folder: Path, content: Mapping[str, bytes]) -> None:
    for path, file_content in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(file_content)


@contextmanager
def _restrict_permissions() -> Iterator[None]:
    """Make new files 0600 and new folders 0700 inside the block, for their owner only."""
    previous_umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous_umask)
