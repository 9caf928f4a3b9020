"""A run's folder, opened again: its experiment, its models, and copies of them to take away."""

from pathlib import Path
from typing import Any

from fedgen_edge.config import load
from fedgen_edge.errors import CheckpointError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment, build
from fedgen_edge.experiments.checkpoint import last
from fedgen_edge.experiments.provenance import data_digest, origin
from fedgen_edge.types import Leaves, ServerState


def reopen(run: Path) -> Experiment:
    """The experiment of a run's folder, on the same backbone and data.

    Raises:
        CheckpointError: there is no run, or its backbone or data have changed since.
    """
    if not (run / "settings.toml").exists() or not (run / "run.json").exists():
        raise CheckpointError(f"{run} holds no run: it has no settings.toml and run.json")
    experiment = build(load(run / "settings.toml"))
    told = records.read_json(run / "run.json")
    _unchanged(run, told, "backbone.sha256", experiment.task.loaded.sha256)
    _unchanged(run, told, "data_sha256", data_digest(experiment))
    return experiment


def _unchanged(run: Path, told: Any, key: str, now: str) -> None:
    """Refuse to go on where a run rests on something else than it began with."""
    for part in key.split("."):
        told = told.get(part) if isinstance(told, dict) else None
    if told != now:
        raise CheckpointError(
            f"{run / 'run.json'}: {key} was {str(told)[:16]}..., and is {now[:16]}... now: "
            "restore what the run began with, or begin another"
        )


def model_of(experiment: Experiment, run: Path, model: str, client: str | None) -> Leaves:
    """The leaves of the backbone, the global adapter, or one client's own.

    Raises:
        CheckpointError: the run has no such model (yet).
    """
    if model == "backbone":
        return experiment.task.backbone()
    if client is None and not experiment.has_global:
        name = experiment.settings.method.name
        raise CheckpointError(f"{run}: {name} has no global model: name a client by --client")
    if client is None:
        return last(run)[0].adapter
    names = records.folder_names(experiment.names)
    if client not in names:
        raise CheckpointError(f"client {client!r} is not in {run}: {', '.join(names)} are")
    return experiment.task.load(run / "adapters" / "clients" / names[client])


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
    experiment = reopen(run)
    shared = [None] if experiment.has_global else []
    wanted = [client] if client or merge else [*shared, *experiment.names]
    models = {who: model_of(experiment, run, "global", who) for who in wanted}
    records.claim(out)
    if merge:
        experiment.task.merged(out, models[client])
        return [out]
    names = records.folder_names(experiment.names)
    state, _ = last(run)
    targets = {who: out / (f"clients/{names[who]}" if who else "global") for who in models}
    for who, adapter in models.items():
        save(experiment, targets[who], state, adapter, who or "global")
    return list(targets.values())
