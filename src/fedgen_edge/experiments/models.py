"""A run's folder, opened again: its experiment, its models, and copies of them to take away."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedgen_edge import files
from fedgen_edge.algorithms.methods import method
from fedgen_edge.config import Settings, load
from fedgen_edge.errors import CheckpointError
from fedgen_edge.experiments import machine, records, summary
from fedgen_edge.experiments.build import TASKS, Experiment, build
from fedgen_edge.experiments.provenance import data_digest, origin
from fedgen_edge.tasks.language import Language
from fedgen_edge.types import Leaves, ServerState


def reopen(run: Path) -> Experiment:
    """The experiment of a run's folder, on the same backbone and data.

    Raises:
        CheckpointError: there is no run, or its backbone or data have changed since.
    """
    settings, told = _began(run)
    experiment = build(settings)
    _unchanged(run, told, "backbone.sha256", experiment.task.loaded.sha256)
    _unchanged(run, told, "data_sha256", data_digest(experiment))
    return experiment


def serve(run: Path, precision: Literal["float32"] | None = None) -> Language:
    """A run's task on the same backbone: all that its models need, wherever its data are.

    Args:
        run: the run's folder.
        precision: of the backbone; none is the run's.

    Raises:
        CheckpointError: there is no run, or its backbone has changed since.
    """
    settings, told = _began(run)
    backbone = replace(settings.backbone, precision=precision or settings.backbone.precision)
    fresh = replace(settings, backbone=backbone, adapter=replace(settings.adapter, initial=None))
    full = method(settings.method).adapts == "full"
    task = TASKS[settings.task](fresh, full=full, device=machine.device("auto"))
    _unchanged(run, told, "backbone.sha256", task.loaded.sha256)
    return task


def _began(run: Path) -> tuple[Settings, Any]:
    """A run's settings, and what it rests on."""
    if not (run / "settings.toml").exists():
        raise CheckpointError(f"{run} holds no run: it has no settings.toml")
    if not (run / "run.json").exists():
        raise CheckpointError(f"{run} was stopped before its first round: delete it and run again")
    return load(run / "settings.toml"), records.read_json(run / "run.json")


def _unchanged(run: Path, told: Any, key: str, now: str) -> None:
    """Refuse to go on where a run rests on something else than it began with."""
    for part in key.split("."):
        told = told.get(part) if isinstance(told, dict) else None
    if told != now:
        raise CheckpointError(
            f"{run / 'run.json'}: {key} was {str(told)[:16]}..., and is {now[:16]}... now: "
            "restore what the run began with, or begin another"
        )


def folders(run: Path) -> dict[str | None, Path]:
    """Where each client's own model lies, by its name, and the global one's, by None."""
    names = records.folder_names([row["client"] for row in summary.read(run).clients])
    own: dict[str | None, Path] = {k: Path("clients", v) for k, v in names.items()}
    return {None: Path("global"), **own}


def folder_of(run: Path, client: str | None) -> Path:
    """The folder of one client's own model, or of the global one.

    Raises:
        CheckpointError: there is no such client, or its model is not there (yet).
    """
    known = folders(run)
    if client not in known:
        named = ", ".join(name for name in known if name)
        raise CheckpointError(f"client {client!r} is not in {run}: {named} are")
    found = run / "adapters" / known[client]
    if found.exists():
        return found
    told = summary.read(run)
    if client is None and told.facts.get("finished"):
        name = told.settings["method.name"]
        raise CheckpointError(f"{run}: {name} has no global model: name a client by --client")
    raise CheckpointError(f"{run} has no {found.name} model yet: go on with `fedgen resume {run}`")


def save(
    experiment: Experiment, target: Path, state: ServerState, adapter: Leaves, client: str
) -> None:
    """Write one adapter, with where it came from beside it."""
    beside_it = origin(experiment, state, client)
    experiment.task.save(target, adapter, experiment.settings, beside_it)


def export(run: Path, out: Path, client: str | None, *, merge: bool) -> list[Path]:
    """Copy adapters out as PEFT folders, or merge one into the backbone.

    Args:
        run: the run's folder.
        out: made here; must not exist yet.
        client: whose; none is the global one, with every client's where nothing is merged.
        merge: write a whole model.

    Returns:
        The folders that were made.
    """
    _began(run)
    if merge:
        found, task = folder_of(run, client), serve(run, "float32")
        adapter = task.load(found)
        records.claim(out)
        task.merged(out, adapter)
        return [out]
    known = folders(run)
    there = [who for who in known if who or (run / "adapters" / "global").exists()]
    sources = {who: folder_of(run, who) for who in ([client] if client else there)}
    records.claim(out)
    for who, source in sources.items():
        with files.folder(out / known[who]) as draft:
            shutil.copytree(source, draft, dirs_exist_ok=True)
    return [out / known[who] for who in sources]
