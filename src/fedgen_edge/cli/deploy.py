"""The commands of a federation on many machines: parse, call, print, as `cli` does."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fedgen_edge.cli.arguments import parse, pop_recipe
from fedgen_edge.config import Settings
from fedgen_edge.errors import ConfigError

DEPLOY = {
    "init": "make the server's folder, with a kit for each site",
    "add": "make a kit for one more site",
    "revoke": "let a site take part no more",
}


@dataclass(frozen=True)
class Init:
    """Make the server's folder, with keys, certificates, the proxy's settings and sites' kits.

    `fedgen deploy init RECIPE.toml` takes its settings from a file; every one can be overridden
    here.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    sites: str = ""
    """Names with commas between them, or how many: 3 is site-1, site-2 and site-3."""
    address: str = ""
    """HOST:PORT by which sites reach this server's proxy."""
    out: Path = Path("federation")
    """Folder to make."""
    port: int = 18443
    """Of Flower's server, on its machine alone."""


@dataclass(frozen=True)
class Add:
    """Make a kit for one more site; a running server knows it within seconds."""

    site: tyro.conf.Positional[str]
    """Its name."""
    folder: tyro.conf.Positional[Path]
    """The server's."""


@dataclass(frozen=True)
class Revoke:
    """Let a site take part no more."""

    site: tyro.conf.Positional[str]
    """Its name."""
    folder: tyro.conf.Positional[Path]
    """The server's."""


@dataclass(frozen=True)
class Server:
    """Run the federation of a server's folder; the same command goes on with one that stopped."""

    folder: tyro.conf.Positional[Path]
    """What `fedgen deploy init` made."""


@dataclass(frozen=True)
class Client:
    """Take part with a site's kit, until it is stopped."""

    kit: tyro.conf.Positional[Path]
    """The folder that the server's operator gave this site."""


@dataclass(frozen=True)
class Status:
    """Say how far a federation is, and how its sites fare; it may be running."""

    folder: tyro.conf.Positional[Path]
    """The server's, or a simulation's run."""


def deploy(args: list[str]) -> None:
    """`fedgen deploy init|add|revoke ...`."""
    name = args[0] if args else "--help"
    if name in {"-h", "--help"}:
        rows = "\n".join(f"  fedgen deploy {name:<7} {about}" for name, about in DEPLOY.items())
        print(
            f"usage: fedgen deploy COMMAND ...\n\n{rows}\n\n"
            "`fedgen deploy COMMAND --help` explains one, and docs/guides/many-machines.md all."
        )
        sys.exit()
    table: dict[str, Callable[[list[str]], None]] = {
        "init": init,
        "add": lambda rest: add(parse(Add, rest, "deploy add")),
        "revoke": lambda rest: revoke(parse(Revoke, rest, "deploy revoke")),
    }
    if name not in table:
        raise ConfigError(f"unknown command 'deploy {name}': there are {', '.join(table)}")
    table[name](args[1:])


def init(args: list[str]) -> None:
    """`fedgen deploy init RECIPE --sites 3 --address HOST:PORT [--out FOLDER]`."""
    name, settings = pop_recipe(args)
    options = parse(Init, args, "deploy init", Init(settings))
    if name is None:
        raise ConfigError("fedgen deploy init needs a recipe first, such as recipes/folder.toml")
    for flag, example in (("sites", "3, or --sites north,south"), ("address", "HOST:PORT")):
        if not getattr(options, flag):
            raise ConfigError(f"--{flag} is missing: say --{flag} {example}")
    from fedgen_edge.deploy.provision import kits

    kit_folders = kits.init(
        options.settings,
        kits.parse_sites(options.sites),
        options.address,
        options.out,
        options.port,
    )
    print(f"server    {options.out}")
    for kit in kit_folders:
        print(f"kit       {kit}")
    print(f"next      {options.out / 'README.md'}")


def add(options: Add) -> None:
    """`fedgen deploy add SITE FOLDER`."""
    from fedgen_edge.deploy.provision import kits

    print(f"kit       {kits.add(options.site, options.folder)}")


def revoke(options: Revoke) -> None:
    """`fedgen deploy revoke SITE FOLDER`."""
    from fedgen_edge.deploy.provision import kits

    kits.revoke(options.site, options.folder)
    print(f"revoked   {options.site}: a running server lets go of it within a few seconds")


def server(options: Server) -> None:
    """`fedgen server FOLDER`."""
    from fedgen_edge.deploy.settings import DeploymentSettings, read

    read(DeploymentSettings, options.folder / "federation.toml")
    from fedgen_edge.deploy.server.main import describe_federation, prepare_server, run_server
    from fedgen_edge.report.page import headline, write
    from fedgen_edge.report.summary import read
    from fedgen_edge.runs.progress import follow

    home = prepare_server(options.folder)
    # Stop what it started along with it, as ctrl-c does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        follow(run_server(home), home, describe_federation(home))
    except KeyboardInterrupt:
        print(f"fedgen: stopped; `fedgen resume {options.folder}` goes on", file=sys.stderr)
        sys.exit(130)
    print(headline(read(home.run)))
    print(f"report    {write([home.run], home.run / 'report.html')}")
    for folder in sorted((home.run / "adapters").iterdir()):
        print(f"adapter   {folder}")
    print("          sites keep their own, in KIT/state/runs")


def client(options: Client) -> None:
    """`fedgen client KIT`."""
    from fedgen_edge.deploy.site.main import join, read_kit
    from fedgen_edge.network.flower.environment import environment

    read_kit(options.kit)
    os.environ.update(environment(options.kit / "state" / "flower"))
    from fedgen_edge.network.flower import runtime

    join(options.kit, runtime)


def status(options: Status) -> None:
    """`fedgen status FOLDER`."""
    from rich.console import Console

    from fedgen_edge.deploy.server.status import make_table, summarize_status
    from fedgen_edge.runs.folders import describe_progress

    console = Console()
    if (options.folder / "settings.toml").exists():
        for line in describe_progress(options.folder):
            console.print(line, markup=False, soft_wrap=True)
        return
    for line in summarize_status(options.folder):
        console.print(line, markup=False, soft_wrap=True)
    console.print(make_table(options.folder))
