"""A run of settings, gone on with where it stopped, and what is kept of it."""

import hashlib
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from fedgen_edge.config import Settings, to_toml
from fedgen_edge.report.diagnose import diagnose
from fedgen_edge.report.layers import agreement
from fedgen_edge.report.sample_distances import distances
from fedgen_edge.report.summary import RunFiles, by_client, by_model, read, tenth, uplink
from fedgen_edge.runs.models import reopen
from fedgen_edge.runs.records import read_json
from fedgen_edge.runs.run import Event, create, proceed
from items import Row

LIBRARIES = ("fedgen-edge", "torch", "transformers", "peft")


def folder_of(settings: Settings, folder: Path) -> Path:
    """Where a run of these settings lies: other settings are another run."""
    digest = hashlib.sha256(to_toml(settings).encode()).hexdigest()[:8]
    return folder.with_name(f"{folder.name}-{digest}")


def done(settings: Settings, folder: Path) -> Iterator[Event]:
    """Do what is left of the run in this folder: all of it, some, or nothing."""
    told = folder / "run.json"
    if told.exists() and read_json(told).get("finished"):
        return
    if not told.exists():  # stopped before it began
        shutil.rmtree(folder, ignore_errors=True)
    experiment = reopen(folder) if told.exists() else create(settings, folder)
    yield from proceed(experiment, folder)


def finished(settings: Settings, folder: Path) -> Path:
    """A folder of a finished run of these settings; says how far it is."""
    folder = folder_of(settings, folder)
    for event in done(settings, folder):
        print(f"{folder.name}: {event.stage} {event.completed}/{event.total}", flush=True)
    return folder


def record(folder: Path) -> Row:
    """What a finished run's files say: on what, at what cost, by what way, to what end.

    `way` has a list for each judged round: its number, bytes up and down and seconds so far, and
    the validation loss. `moves` has one for each round, of effective weights: its number, the
    clients' mean drift, the norm of their mean change, and the mean cosine between two clients'
    changes.
    """
    run = read(folder)
    told = run.facts
    return {
        **{key: told[key] for key in ("hardware", "precision", "device", "threads", "data_sha256")},
        "backbone_sha256": told["backbone"]["sha256"],
        "versions": {library: version(library) for library in LIBRARIES},
        "measure": told["measure"],
        "seconds": told["seconds"],
        "bytes_up": sum(row["bytes_up"] for row in run.rounds),
        "bytes_down": sum(row["bytes_down"] for row in run.rounds),
        "bytes_full": uplink(run).full,
        **{key: run.settings.get(f"federation.{key}") for key in ("clients", "rounds")},
        "cohort": max(len(row["cohort"]) for row in run.rounds),
        "examples": [row["train"] for row in run.clients if not row["newcomer"]],
        "test": judged(run),
        "tuned": tuned(run),
        "way": way(run),
        "moves": [_apart(row) for row in run.rounds if row["clients"]],
        "findings": {f.title: f.evidence for f in diagnose(run) if f.severity != "good"},
    }


def _apart(row: Row) -> list[float | None]:
    """How the clients of a round moved, and how far together."""
    own = fmean(c["drift"] for c in row["clients"])
    return [row["round"], own, row["mean_norm"], agreement(row)]


def way(run: RunFiles) -> list[list[float]]:
    """Where a run stood after each judged round."""
    found, up, down, seconds = [], 0, 0, 0.0
    for row in run.rounds:
        up, down = up + row["bytes_up"], down + row["bytes_down"]
        seconds += row["seconds"]
        if own := row["validation"]:
            loss = own["total"] / own["count"]
            found.append([row["round"], up, down, round(seconds, 2), loss])
    return found


def tuned(run: RunFiles) -> float | None:
    """Mean over clients of the validation loss of what each keeps; none where nobody tuned."""
    kept = [row["validation"][row["chosen"]] for row in run.personal]
    return fmean(kept) if kept else None


def judged(run: RunFiles) -> dict[str, Row]:
    """The test of every model over all clients that may train, whether or not they were drawn.

    `each` is in the order of the clients, as `examples` is.
    """
    each = [row["client"] for row in run.clients if not row["newcomer"]]
    found = {
        model: _test(run, {client: rows[client] for client in each})
        for model, rows in by_model(run).items()
    }
    whole = {row["model"]: row for row in run.distances if row["client"] is None}
    for row in distances(run):
        told = whole[row.model]
        found[row.model] |= {
            "distance": row.pooled,
            "distance_of_clients": row.own,
            "seen_by": told["distance"],
            **{key: told.get(key) for key in ("made", "real", "floor")},
        }
    return found


def _test(run: RunFiles, rows: dict[str, Row]) -> Row:
    measure, each = run.measure, by_client(run.measure, rows)
    total, words = (sum(row.get(key, 0) for row in rows.values()) for key in ("total", "words"))
    worst = sorted(each.values(), reverse=True)[: tenth(len(each))]
    return {
        "pooled": measure.compute(total, sum(row["count"] for row in rows.values())),
        "mean": fmean(each.values()),
        "worst_decile": fmean(worst),
        "each": [float(f"{value:.5g}") for value in each.values()],
        **({"word": measure.compute(total, words)} if words else {}),
    }
