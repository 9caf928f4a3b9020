"""The command: parse, call, print. A user's mistake is one line, and exits with 2.

Heavy imports wait until a command needs them, so that `fedgen --help` answers at once.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from fedgen_edge.cli.arguments import parse, pop_recipe
from fedgen_edge.cli.completion import FLAG, print_completion
from fedgen_edge.cli.deploy import (
    Add,
    Client,
    Init,
    Revoke,
    Server,
    Status,
    client,
    deploy,
    server,
    status,
)
from fedgen_edge.cli.imports import explain_missing, speed_up_imports
from fedgen_edge.cli.models import Export, Generate, export, generate
from fedgen_edge.cli.plan import Plan, plan
from fedgen_edge.config import Settings
from fedgen_edge.errors import ConfigError, FedGenError, is_out_of_memory

COMMANDS = {
    "run": "train a federation, personalise it, and report",
    "resume": "go on with a run that was stopped",
    "report": "write a page for one run, or compare several",
    "plan": "say beforehand what a run will take: bytes, memory, time",
    "generate": "continue a prompt, or draw pictures, with a run's model",
    "pretrain": "train a backbone on the public part of the data",
    "export": "copy out a run's adapters, or merge one into the backbone",
    "methods": "list the methods",
    "deploy": "set up a federation on many machines: its server, and a kit for each site",
    "server": "run such a federation",
    "client": "take part in one, with a site's kit",
    "status": "say how far one is, and how its sites fare",
}


OUT_OF_MEMORY = (
    "out of memory: set engine.stack (clients at once), lower training.batch or data.length, or "
    "take a machine with more; a run's last commit stands, and `fedgen resume` goes on from it"
)


@dataclass(frozen=True)
class Run:
    """Train a federation, personalise it, judge it and report.

    `fedgen run RECIPE.toml` takes its settings from a file; every one can be overridden here.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run, which must be new; none is runs/RECIPE-NUMBER."""


@dataclass(frozen=True)
class Pretrain:
    """Train the backbone of a recipe on the public part of its data; go on if it was stopped.

    Of pictures it is made; of text, backbone.path is trained on, whole, into another folder, or a
    new one is, of the shape in pretrain.config.

    `fedgen pretrain RECIPE.toml` takes its settings from a file; every one can be overridden here.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the backbone; none is the recipe's backbone.path (pictures)."""


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped, exactly where its last commit left it."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page for a run, or for a comparison of several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """The page; none is RUN/report.html, or comparison.html here for several runs."""


@dataclass(frozen=True)
class Methods:
    """List the methods, and what each works with; why not, with a method's name."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Tell of this one alone."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    atexit.register(gc.freeze)  # skips a garbage collection at exit: most of a second
    try:
        _check_text(args)
        _dispatch(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FedGenError, OSError) as error:
        print(f"fedgen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"fedgen: {explain_missing(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"fedgen: {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fedgen: stopped", file=sys.stderr)
        sys.exit(130)


def _check_text(args: list[str]) -> None:
    """Refuse bytes that are not text, since a run's files could not hold them."""
    for at, arg in enumerate(args, 1):
        if any("\ud800" <= letter <= "\udfff" for letter in arg):
            raise ConfigError(f"argument {at}, {arg!a}, is not UTF-8: write it in that encoding")


def _dispatch(args: list[str]) -> None:
    name = args[0] if args else "--help"
    if name in {"-h", "--help", "--version"}:
        print(_version() if name == "--version" else _usage())
        return
    if FLAG in args:
        print_completion(_list_completions(), "".join(args[args.index(FLAG) + 1 :][:1]))
        return
    table: dict[str, Callable[[list[str]], None]] = {
        "run": run,
        "pretrain": pretrain,
        "resume": lambda rest: resume(parse(Resume, rest, "resume")),
        "report": lambda rest: report(parse(Report, rest, "report")),
        "plan": plan,
        "generate": lambda rest: generate(parse(Generate, rest, "generate")),
        "export": lambda rest: export(parse(Export, rest, "export")),
        "methods": lambda rest: methods(parse(Methods, rest, "methods")),
        "deploy": deploy,
        "server": lambda rest: server(parse(Server, rest, "server")),
        "client": lambda rest: client(parse(Client, rest, "client")),
        "status": lambda rest: status(parse(Status, rest, "status")),
    }
    if name not in table:
        raise ConfigError(f"unknown command {name!r}: there are {', '.join(table)}")
    table[name](args[1:])


def _list_completions() -> dict[str, object]:
    """Return the commands for shell completion, with default settings."""
    settings = Settings()
    return {
        "run": Run(settings),
        "pretrain": Pretrain(settings),
        "resume": Resume,
        "report": Report,
        "plan": Plan(settings),
        "generate": Generate,
        "export": Export,
        "methods": Methods,
        "deploy": {"init": Init(settings), "add": Add, "revoke": Revoke},
        "server": Server,
        "client": Client,
        "status": Status,
    }


def _version() -> str:
    from fedgen_edge import __version__

    return f"fedgen {__version__}"


def _usage() -> str:
    rows = "\n".join(f"  fedgen {name:<9} {about}" for name, about in COMMANDS.items())
    return (
        "usage: fedgen COMMAND ...\n\n"
        "Train generative models where the data is: federated LoRA adapters, one for every client."
        f"\n\n{rows}\n\n`fedgen COMMAND --help` explains a command and every setting."
    )


def run(args: list[str]) -> None:
    """`fedgen run [RECIPE] [--out FOLDER] [--part.setting value ...]`."""
    name, settings = pop_recipe(args)
    options = parse(Run, args, "run", Run(settings))
    out = options.out or Path("runs") / _make_run_name(name)
    with speed_up_imports():
        from fedgen_edge.runs.run import create

    experiment = create(options.settings, out)
    _finish(experiment, out)


def pretrain(args: list[str]) -> None:
    """`fedgen pretrain RECIPE [--out FOLDER] [--part.setting value ...]`."""
    _, settings = pop_recipe(args)
    options = parse(Pretrain, args, "pretrain", Pretrain(settings))
    if options.out is None and options.settings.task == "language":
        raise ConfigError(
            f"--out is missing: of text, backbone.path={options.settings.backbone.path!r} "
            "stays as it "
            "is: name another folder"
        )
    out = options.out or Path(options.settings.backbone.path)
    with speed_up_imports():
        from fedgen_edge.runs.pretrain import STAGE, begin, describe_pretraining, train
    from fedgen_edge.hardware import steady_allocations
    from fedgen_edge.runs.progress import follow

    experiment = begin(options.settings, out)
    steady_allocations()
    try:
        follow(train(experiment, out), experiment, describe_pretraining(experiment), STAGE)
    except KeyboardInterrupt:
        print("fedgen: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(f"backbone  {out}")


def _make_run_name(recipe: str | None) -> str:
    stem = Path(recipe).stem if recipe else "run"
    number = 1
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def resume(options: Resume) -> None:
    """`fedgen resume RUN`, or a server's folder."""
    if (options.run / "federation.toml").exists():
        server(Server(options.run))
        return
    from fedgen_edge.runs.folders import read_run

    read_run(options.run)
    with speed_up_imports():
        from fedgen_edge.runs.models import reopen

    _finish(reopen(options.run), options.run)


def _finish(experiment, out: Path) -> None:
    from fedgen_edge.hardware import steady_allocations
    from fedgen_edge.report.page import write
    from fedgen_edge.report.summary import read
    from fedgen_edge.report.terminal import show
    from fedgen_edge.runs.pace import tuning_steps
    from fedgen_edge.runs.progress import describe_run, follow
    from fedgen_edge.runs.run import proceed

    steady_allocations()
    work = partial(tuning_steps, experiment)
    try:
        follow(proceed(experiment, out), experiment, describe_run(experiment), count_work=work)
    except KeyboardInterrupt:
        print(f"fedgen: stopped; `fedgen resume {out}` goes on", file=sys.stderr)
        sys.exit(130)
    show(read(out), write([out], out / "report.html"))


def report(options: Report) -> None:
    """`fedgen report RUN...`."""
    from fedgen_edge.report.page import write

    if not options.runs:
        raise ConfigError("fedgen report needs the folder of at least one run")
    is_single = len(options.runs) == 1
    print(
        write(
            options.runs,
            options.out
            or (options.runs[0] / "report.html" if is_single else Path("comparison.html")),
        )
    )


def methods(options: Methods) -> None:
    """`fedgen methods`."""
    from fedgen_edge.algorithms.methods import METHODS, make_algorithm
    from fedgen_edge.cli import compatibility
    from fedgen_edge.config import Method

    if options.name is not None:
        make_algorithm(Method(name=options.name), "NAME")
        print(f"{options.name}: {METHODS[options.name].summary}")
        for feature, why in compatibility.make_row(options.name).items():
            mark = compatibility.format_mark(feature, why)
            print(f"  {mark:<3} {feature}: {why or compatibility.make_legend()[feature]}")
        return
    for name, entry in METHODS.items():
        print(f"{name:<12} {entry.summary}")
    columns = compatibility.make_legend()
    print(f"\n{'works with':<12} {'  '.join(f'{k:^3}' for k in columns)}")
    for name, objections in compatibility.make_rows().items():
        marks = "  ".join(
            f"{compatibility.format_mark(k, objections[k]):^{max(3, len(k))}}" for k in columns
        )
        print(f"{name:<12} {marks}".rstrip())
    print()
    for feature, about in columns.items():
        print(f"{feature:<12} {about}")
    print("\nyes: works; no: `fedgen methods NAME` says why, and what would; -: not built yet")
