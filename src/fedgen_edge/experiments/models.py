"""A run's folder, opened again: its experiment, its models, and copies of them to take away."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedgen_edge import files, machine
from fedgen_edge.config import plain
from fedgen_edge.errors import CheckpointError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment, build, task_of
from fedgen_edge.experiments.checkpoint import latest
from fedgen_edge.experiments.folders import began, folder_of, folders
from fedgen_edge.experiments.provenance import Made, data_digest, initial_digest, origin
from fedgen_edge.tasks.task import Learnt
from fedgen_edge.types import Leaves, ServerState


def reopen(run: Path) -> Experiment:
    """The experiment of a run's folder, on the same backbone, initial adapter and data.

    Raises:
        CheckpointError: there is no run, or one of these has changed since.
    """
    settings, told = began(run)
    experiment = build(settings)
    _unchanged(run, told, "backbone.sha256", experiment.task.model.sha256)
    _unchanged(run, told, "adapter.initial_sha256", initial_digest(experiment.task))
    _unchanged(run, told, "data_sha256", data_digest(experiment))
    return experiment


def record_changes(run: Path) -> None:
    """Write into run.json which settings have changed since the run last went on, and when."""
    settings, facts = began(run)
    changes = facts.get("changes", [])
    before = facts.get("settings", {}) | {change["name"]: change["now"] for change in changes}
    now = {name: value for name, value in plain(settings).items() if name in before}
    changed = [name for name in now if now[name] != before[name]]
    if not changed:
        return
    state, _, _ = latest(run)
    done = state.round if state else 0
    changes = changes + [
        {"round": done, "name": name, "before": before[name], "now": now[name]} for name in changed
    ]
    records.write_json(run / "run.json", {**facts, "changes": changes})


def serve(run: Path, precision: Literal["float32"] | None = None) -> Learnt:
    """A run's task on the same backbone: all that its models need, wherever its data are.

    Args:
        run: the run's folder.
        precision: of the backbone; none is the run's.

    Raises:
        CheckpointError: there is no run, or its backbone has changed since.
    """
    settings, told = began(run)
    backbone = replace(settings.backbone, precision=precision or settings.backbone.precision)
    adapter = replace(settings.adapter, initial=None)
    engine = replace(settings.engine, compile=False)  # nothing trains
    fresh = replace(settings, backbone=backbone, adapter=adapter, engine=engine)
    task = task_of(fresh, machine.device("auto"))
    _unchanged(run, told, "backbone.sha256", task.model.sha256)
    return task


def _unchanged(run: Path, told: Any, key: str, now: str | None) -> None:
    """Refuse to go on where a run rests on something else than it began with."""
    for part in key.split("."):
        told = told.get(part) if isinstance(told, dict) else None
    if told != now:
        raise CheckpointError(
            f"{run / 'run.json'}: {key} was {str(told)[:16]}..., and is {str(now)[:16]}... now: "
            "restore what the run began with, or begin another"
        )


def save(made: Made, target: Path, state: ServerState, adapter: Leaves, client: str) -> None:
    """Write one adapter, with where it came from beside it."""
    made.task.model.save(target, adapter, made.settings, origin(made, state, client))


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
    began(run)
    if merge:
        found, task = folder_of(run, client), serve(run, "float32")
        adapter = task.model.load(found)
        records.claim(out)
        task.model.merged(out, adapter)
        return [out]
    sources = folders(run, [client] if client else ()).values()
    records.claim(out)
    targets = [out / source.relative_to(run / "adapters") for source in sources]
    for target, source in zip(targets, sources, strict=True):
        with files.folder(target) as draft:
            shutil.copytree(source, draft, dirs_exist_ok=True)
    return targets
