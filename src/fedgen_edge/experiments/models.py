"""A run's folder, opened again: its experiment, its models, and copies of them to take away."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedgen_edge import files, machine
from fedgen_edge.config import Settings, load
from fedgen_edge.errors import CheckpointError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment, build, task_of
from fedgen_edge.experiments.provenance import Made, data_digest, origin, plain
from fedgen_edge.tasks.task import Learnt
from fedgen_edge.types import Leaves, ServerState

FREE = (
    "engine.", "evaluation.keep", "evaluation.target", "evaluation.tensorboard",
    "data.path", "backbone.path", "backbone.autoencoder", "judging.weights",
    "training.lr", "training.clip", "method.server_lr", "personal.lr", "personal.fallback",
)  # fmt: skip
"""Settings that may change before a run is resumed: where it runs, what its files are called (what
these hold is compared by hash), and what a message about infinite numbers says to change.
"""


def reopen(run: Path) -> Experiment:
    """The experiment of a run's folder, on the same backbone and data.

    Raises:
        CheckpointError: there is no run, or its backbone or data have changed since.
    """
    settings, told = _began(run)
    experiment = build(settings)
    _unchanged(run, told, "backbone.sha256", experiment.task.model.sha256)
    _unchanged(run, told, "data_sha256", data_digest(experiment))
    return experiment


def serve(run: Path, precision: Literal["float32"] | None = None) -> Learnt:
    """A run's task on the same backbone: all that its models need, wherever its data are.

    Args:
        run: the run's folder.
        precision: of the backbone; none is the run's.

    Raises:
        CheckpointError: there is no run, or its backbone has changed since.
    """
    settings, told = _began(run)
    backbone = replace(settings.backbone, precision=precision or settings.backbone.precision)
    adapter = replace(settings.adapter, initial=None)
    engine = replace(settings.engine, compile=False)  # nothing trains
    fresh = replace(settings, backbone=backbone, adapter=adapter, engine=engine)
    task = task_of(fresh, machine.device("auto"))
    _unchanged(run, told, "backbone.sha256", task.model.sha256)
    return task


def _began(run: Path) -> tuple[Settings, Any]:
    """A run's settings, and what it rests on."""
    if not (run / "settings.toml").exists():
        raise CheckpointError(f"{run} holds no run: it has no settings.toml")
    if not (run / "run.json").exists():
        raise CheckpointError(f"{run} was stopped before its first round: delete it and run again")
    settings, told = load(run / "settings.toml"), records.read_json(run / "run.json")
    _check_settings(run, settings, told.get("settings", {}))
    return settings, told


def _check_settings(run: Path, settings: Settings, before: Mapping[str, Any]) -> None:
    """Refuse settings that are other than the run's own: its adapters and records rest on those.

    Args:
        run: the run's folder.
        settings: as settings.toml says now.
        before: by dotted name, as the run began with; one that a later version added is not there.

    Raises:
        CheckpointError: names the first that differs.
    """
    for name, now in plain(settings).items():
        fixed = name in before and not name.startswith(FREE)
        if fixed and before[name] != now:
            raise CheckpointError(
                f"{run / 'settings.toml'}: {name} was {before[name]!r} when the run began, and is "
                f"{now!r} now: set it back, or begin another run"
            )


def _unchanged(run: Path, told: Any, key: str, now: str) -> None:
    """Refuse to go on where a run rests on something else than it began with."""
    for part in key.split("."):
        told = told.get(part) if isinstance(told, dict) else None
    if told != now:
        raise CheckpointError(
            f"{run / 'run.json'}: {key} was {str(told)[:16]}..., and is {now[:16]}... now: "
            "restore what the run began with, or begin another"
        )


def folders(run: Path, wanted: Sequence[str | None] = ()) -> dict[str | None, Path]:
    """The folders of models by their names: clients' own, and clusters'; the global one by None.

    Args:
        run: the run's folder.
        wanted: whose; none is all clients', with the global one or the clusters' where there are.

    Raises:
        CheckpointError: there is no such client, or its model is not there (yet).
    """
    (settings, facts), root = _began(run), run / "adapters"
    names = records.folder_names([row["client"] for row in records.read_json(run / "clients.json")])
    own: dict[str | None, Path] = {k: root / "clients" / v for k, v in names.items()}
    known = {None: root / "global", **{p.name: p for p in sorted(root.glob("cluster-*"))}, **own}
    alike = facts.get("finished") and not (root / "clients").exists()
    there = [who for who, folder in known.items() if folder.exists() or (who and not alike)]
    asked = wanted or there
    found = {who: known.get(who) for who in asked}
    for who, folder in found.items():
        if folder is None:
            raise CheckpointError(f"client {who!r} is not in {run}: {', '.join(names)} are")
        if not folder.exists() and who is None and facts.get("finished"):
            name = settings.method.name
            raise CheckpointError(f"{run}: {name} has no global model: name a client by --client")
        if not folder.exists() and alike:
            why = "they are at the sites" if settings.personal.epochs else "personal.epochs is 0"
            raise CheckpointError(f"{run} has no models of clients' own, as {why}: name no client")
        if not folder.exists():
            raise CheckpointError(
                f"{run} has no {folder.name} model yet: go on with `fedgen resume {run}`"
            )
    return {who: folder for who, folder in found.items() if folder}


def folder_of(run: Path, client: str | None) -> Path:
    """The folder of one client's own model, or of the global one."""
    return folders(run, [client])[client]


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
    _began(run)
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
