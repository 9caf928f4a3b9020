"""A run's folder, and the folders of its models; nothing heavy is imported to look at them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgen_edge.config import Settings, load_saved, to_flat_dict, translate_setting
from fedgen_edge.errors import CheckpointError, suggest
from fedgen_edge.runs import records

MAX_LISTED = 12
"""Names of clients in a message."""
CHANGEABLE = (
    "engine.", "checkpoints.keep", "evaluation.target", "evaluation.tensorboard",
    "data.path", "backbone.path", "backbone.autoencoder", "adapter.initial",
    "image_metrics.weights", "training.lr", "training.clip", "method.server_lr",
    "personal.lr", "personal.fallback",
)  # fmt: skip
"""Settings that may change before a run is resumed: where it runs, what its files are called (what
these hold is compared by hash, but for the weights that judge), and what a message about infinite
numbers says to change. A name that ends with a dot is of a whole table.
"""


def read_run(run: Path) -> tuple[Settings, Any]:
    """A run's settings, and what it rests on."""
    if not (run / "settings.toml").exists():
        raise CheckpointError(f"{run} holds no run: it has no settings.toml")
    if not (run / "run.json").exists():
        raise CheckpointError(f"{run} was stopped before its first round: delete it and run again")
    settings, facts = load_saved(run / "settings.toml"), records.read_json(run / "run.json")
    facts = _translate_facts(facts)
    _check_settings(run, settings, facts.get("settings", {}))
    return settings, facts


def _translate_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What run.json says, with the names that settings have now."""
    translated = dict(facts)
    if "settings" in facts:
        settings = facts["settings"].items()
        translated["settings"] = dict(translate_setting(*pair) for pair in settings)
    if "changes" in facts:
        translated["changes"] = [
            change | {"name": translate_setting(change["name"], None)[0]}
            for change in facts["changes"]
        ]
    return translated


def _check_settings(run: Path, settings: Settings, before: Mapping[str, Any]) -> None:
    """Refuse settings that are other than the run's own: its adapters and records rest on those.

    Args:
        run: the run's folder.
        settings: as settings.toml says now.
        before: by dotted name, as the run began with; one that a later version added is not there.

    Raises:
        CheckpointError: names the first that differs.
    """
    for name, now in to_flat_dict(settings).items():
        if name in before and before[name] != now and not _may_change(name):
            raise CheckpointError(
                f"{run / 'settings.toml'}: {name} was {before[name]!r} when the run began, and is "
                f"{now!r} now: set it back, or begin another run"
            )


def _may_change(name: str) -> bool:
    return any(name == free or (free[-1] == "." and name.startswith(free)) for free in CHANGEABLE)


def find_model_folders(run: Path, wanted: Sequence[str | None] = ()) -> dict[str | None, Path]:
    """The folders of models by their names: clients' own, and clusters'; the global one by None.

    Args:
        run: the run's folder.
        wanted: whose; none is all clients', with the global one or the clusters' where there are.

    Raises:
        CheckpointError: there is no such client, or its model is not there (yet).
    """
    (settings, facts), root = read_run(run), run / "adapters"
    names = records.folder_names([row["client"] for row in records.read_json(run / "clients.json")])
    client_folders: dict[str | None, Path] = {k: root / "clients" / v for k, v in names.items()}
    all_folders = {
        None: root / "global",
        **{p.name: p for p in sorted(root.glob("cluster-*"))},
        **client_folders,
    }
    has_only_shared = facts.get("finished") and not (root / "clients").exists()
    existing = [
        who
        for who, folder in all_folders.items()
        if folder.exists() or (who and not has_only_shared)
    ]
    requested = wanted or existing
    matches = {who: all_folders.get(who) for who in requested}
    for model, folder in matches.items():
        if folder is None:
            raise CheckpointError(
                f"client {model!r} is not in {run}: {_suggest_models(model, all_folders)}"
            )
        if not folder.exists() and model is None and facts.get("finished"):
            name = settings.method.name
            raise CheckpointError(f"{run}: {name} has no global model: name a client by --client")
        if not folder.exists() and has_only_shared:
            reason = "they are at the sites" if settings.personal.epochs else "personal.epochs is 0"
            raise CheckpointError(
                f"{run} has no models of clients' own, as {reason}: name no client"
            )
        if not folder.exists():
            raise CheckpointError(
                f"{run} has no {folder.name} model yet: go on with `fedgen resume {run}`"
            )
    return {who: folder for who, folder in matches.items() if folder}


def find_model_folder(run: Path, client: str | None) -> Path:
    """The folder of one client's own model, or of the global one."""
    return find_model_folders(run, [client])[client]


def _suggest_models(name: str | None, all_models: Iterable[str | None]) -> str:
    """Models with names like this one, or the first of all."""
    names = [other for other in all_models if other]
    if hint := suggest(name or "", names):
        return hint
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"it has {', '.join(names[:MAX_LISTED])}{more}"


def describe_progress(run: Path) -> Iterator[str]:
    """A few lines on how far a simulation is; it may be running."""
    settings, facts = read_run(run)
    round_records = records.lines(run / "rounds.jsonl")
    state = "running" if records.is_locked(run) else f"stopped: `fedgen resume {run}` goes on"
    if facts.get("finished"):
        state = f"finished: `fedgen report {run}` writes its page"
    yield (
        f"simulation in {run}: round {len(round_records)} of {settings.federation.rounds}, {state}"
    )
    for line in round_records[-1:]:
        loss = "nobody finished" if line["loss"] is None else f"loss {line['loss']:.3f}"
        yield f"last round: {line['seconds']:.0f} s, {loss}"
    num_personal = len(records.lines(run / "personal.jsonl"))
    yield f"{num_personal} clients have a personal adapter"
