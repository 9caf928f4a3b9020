"""A run's folder, opened again: its experiment, its models, and copies of them to take away."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedgen_edge import files, hardware
from fedgen_edge.config import to_flat_dict
from fedgen_edge.errors import CheckpointError
from fedgen_edge.runs import records
from fedgen_edge.runs.build import Experiment, build, make_task
from fedgen_edge.runs.checkpoint import find_latest
from fedgen_edge.runs.folders import find_model_folder, find_model_folders, read_run
from fedgen_edge.runs.provenance import RunContext, data_digest, initial_digest, origin
from fedgen_edge.tasks.task import TrainableTask
from fedgen_edge.types import Leaves, ServerState


def reopen(run: Path) -> Experiment:
    """The experiment of a run's folder, on the same backbone, initial adapter and data.

    Raises:
        CheckpointError: there is no run, or one of these has changed since.
    """
    settings, facts = read_run(run)
    experiment = build(settings)
    _check_unchanged(run, facts, "backbone.sha256", experiment.task.model.sha256)
    _check_unchanged(run, facts, "adapter.initial_sha256", initial_digest(experiment.task))
    _check_unchanged(run, facts, "data_sha256", data_digest(experiment))
    return experiment


def record_changes(run: Path) -> None:
    """Write into run.json which settings have changed since the run last went on, and when."""
    settings, facts = read_run(run)
    changes = facts.get("changes", [])
    before = facts.get("settings", {}) | {change["name"]: change["now"] for change in changes}
    now = {name: value for name, value in to_flat_dict(settings).items() if name in before}
    changed = [name for name in now if now[name] != before[name]]
    if not changed:
        return
    state, _, _ = find_latest(run)
    last_round = state.round if state else 0
    changes = changes + [
        {"round": last_round, "name": name, "before": before[name], "now": now[name]}
        for name in changed
    ]
    records.write_json(run / "run.json", {**facts, "changes": changes})


def load_task(run: Path, precision: Literal["float32"] | None = None) -> TrainableTask:
    """A run's task on the same backbone: all that its models need, wherever its data are.

    Args:
        run: the run's folder.
        precision: of the backbone; none is the run's.

    Raises:
        CheckpointError: there is no run, or its backbone has changed since.
    """
    settings, facts = read_run(run)
    backbone = replace(settings.backbone, precision=precision or settings.backbone.precision)
    adapter = replace(settings.adapter, initial=None)
    engine = replace(settings.engine, compile=False)  # nothing trains
    fresh = replace(settings, backbone=backbone, adapter=adapter, engine=engine)
    task = make_task(fresh, hardware.device("auto"))
    _check_unchanged(run, facts, "backbone.sha256", task.model.sha256)
    return task


def _check_unchanged(run: Path, recorded: Any, key: str, now: str | None) -> None:
    """Refuse to go on where a run rests on something else than it began with."""
    for part in key.split("."):
        recorded = recorded.get(part) if isinstance(recorded, dict) else None
    if recorded != now:
        raise CheckpointError(
            f"{run / 'run.json'}: {key} was {str(recorded)[:16]}..., and is "
            f"{str(now)[:16]}... now: "
            "restore what the run began with, or begin another"
        )


def save(
    context: RunContext, target: Path, state: ServerState, adapter: Leaves, client: str
) -> None:
    """Write one adapter, with where it came from beside it."""
    context.task.model.save(target, adapter, context.settings, origin(context, state, client))


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
    read_run(run)
    if merge:
        folder, task = find_model_folder(run, client), load_task(run, "float32")
        adapter = task.model.load(folder)
        records.claim(out)
        task.model.save_merged(out, adapter)
        return [out]
    sources = find_model_folders(run, [client] if client else ()).values()
    records.claim(out)
    targets = [out / source.relative_to(run / "adapters") for source in sources]
    for target, source in zip(targets, sources, strict=True):
        with files.replace_folder(target) as draft:
            shutil.copytree(source, draft, dirs_exist_ok=True)
    return targets
