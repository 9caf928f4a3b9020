"""A run of settings, gone on with where it stopped, and what is kept of it."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from fedgen_edge.config import Settings, to_toml
from fedgen_edge.report.diagnose import diagnose
from fedgen_edge.report.layers import agreement
from fedgen_edge.report.sample_distances import distances
from fedgen_edge.report.summary import (
    GLOBAL,
    PERSONAL,
    RunFiles,
    by_client,
    by_model,
    read,
    tenth,
    uplink,
)
from fedgen_edge.runs.models import reopen
from fedgen_edge.runs.records import read_json
from fedgen_edge.runs.run import Event, create, proceed
from items import Row

SAMPLED = (
    "kernel", "precision", "recall", "density", "coverage", "diversity", "misplaced", "worst",
    "worst_client",
)  # fmt: skip
"""Numbers of a model's samples that a record keeps, besides its distances."""
LIBRARIES = ("fedgen-edge", "torch", "transformers", "peft")


def folder_of(settings: Settings, folder: Path) -> Path:
    """Where a run of these settings lies: other settings are another run."""
    digest = hashlib.sha256(to_toml(settings).encode()).hexdigest()[:8]
    return folder.with_name(f"{folder.name}-{digest}")


def proceed_run(settings: Settings, folder: Path) -> Iterator[Event]:
    """Do what is left of the run in this folder: all of it, some, or nothing."""
    facts_file = folder / "run.json"
    if facts_file.exists() and read_json(facts_file).get("finished"):
        return
    if not facts_file.exists():  # stopped before it began
        shutil.rmtree(folder, ignore_errors=True)
    experiment = reopen(folder) if facts_file.exists() else create(settings, folder)
    yield from proceed(experiment, folder)


def record(folder: Path) -> Row:
    """What a finished run's files say: on what, at what cost, by what way, to what end.

    `way` has a list for each judged round: its number, bytes up and down and seconds so far, and
    the validation loss. `moves` has one for each round, of effective weights: its number, the
    clients' mean drift, the norm of their mean change, and the mean cosine between two clients'
    changes.
    """
    run = read(folder)
    facts = run.facts
    return {
        **{
            key: facts[key] for key in ("hardware", "precision", "device", "threads", "data_sha256")
        },
        "backbone_sha256": facts["backbone"]["sha256"],
        "versions": {library: version(library) for library in LIBRARIES},
        "measure": facts["measure"],
        "seconds": facts["seconds"],
        "bytes_up": sum(row["bytes_up"] for row in run.rounds),
        "bytes_down": sum(row["bytes_down"] for row in run.rounds),
        "bytes_full": uplink(run).full,
        **{key: run.settings.get(f"federation.{key}") for key in ("clients", "rounds")},
        "cohort": max(len(row["cohort"]) for row in run.rounds),
        "examples": [row["train"] for row in run.clients if not row["newcomer"]],
        "peak_bytes": facts["peak_bytes"],
        "parameters": facts["backbone"]["parameters"],
        "adapter_parameters": facts["adapter_parameters"],
        "training": {key: run.settings.get(f"training.{key}") for key in ("steps", "batch", "lr")},
        "alpha": run.settings.get("partition.alpha"),
        "unseen": run.settings.get("data.unseen"),
        "sample_steps": run.settings.get("evaluation.sample_steps"),
        "validation": average_validation(run),
        "test": evaluate_models(run),
        "tuned": average_tuning(run),
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
    steps, up, down, seconds = [], 0, 0, 0.0
    for row in run.rounds:
        up, down = up + row["bytes_up"], down + row["bytes_down"]
        seconds += row["seconds"]
        if own := row["validation"]:
            loss = own["total"] / own["count"]
            steps.append([row["round"], up, down, round(seconds, 2), loss])
    return steps


def average_tuning(run: RunFiles) -> float | None:
    """Mean over clients of the validation loss of what each keeps; none where nobody tuned."""
    kept = [row["validation"][row["chosen"]] for row in run.personal]
    return fmean(kept) if kept else None


def average_validation(run: RunFiles) -> dict[str, float]:
    """Each trained model's last validation number, mean of clients."""

    def average(losses: Iterable[float]) -> float:
        return fmean(run.measure.compute(loss, 1) for loss in losses)

    methods = {GLOBAL: run.rounds, **run.baselines}
    last = {model: rounds[-1]["validation"] for model, rounds in methods.items() if rounds}
    numbers = {model: average(row["clients"].values()) for model, row in last.items() if row}
    if run.personal:
        numbers[PERSONAL] = average(row["validation"][row["chosen"]] for row in run.personal)
    return numbers


def evaluate_models(run: RunFiles) -> dict[str, Row]:
    """The test of every model over all clients that may train, whether or not they were drawn.

    `each` is in the order of the clients, as `examples` is.
    """
    clients = [row["client"] for row in run.clients if not row["newcomer"]]
    tests = {
        model: _test(run, {client: rows[client] for client in clients})
        for model, rows in by_model(run).items()
    }
    whole = {row["model"]: row for row in run.distances if row["client"] is None}
    for row in distances(run):
        run_row = whole[row.model]
        tests[row.model] |= {
            "distance": row.pooled,
            "distance_of_clients": row.own,
            "seen_by": run_row["distance"],
            **{key: run_row.get(key) for key in ("made", "real", "floor")},
            **{key: value for key, value in asdict(row).items() if key in SAMPLED},
            **average_classes(run, run_row),
            **measure_costs(run, row.model),
        }
    return tests


def average_classes(run: RunFiles, row: Row) -> dict[str, float]:
    """A model's mean distance over classes that its backbone knows, and over the others, if any."""
    unseen = set(run.settings.get("data.unseen", ()))
    distances_by_class = row.get("classes", {})
    groups = {
        "seen_classes": [d for name, d in distances_by_class.items() if name not in unseen],
        "unseen_classes": [d for name, d in distances_by_class.items() if name in unseen],
    }
    return {name: fmean(group) for name, group in groups.items() if group}


def measure_costs(run: RunFiles, model: str) -> Row:
    """The bytes that clients sent, and the seconds of training, for one model."""
    rounds = run.baselines.get(model, run.rounds if model in (GLOBAL, PERSONAL) else [])
    tuning = run.facts["seconds"]["personal"] if model == PERSONAL else 0
    return {
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "seconds": round(sum(row["seconds"] for row in rounds) + tuning, 1),
    }


def _test(run: RunFiles, rows: dict[str, Row]) -> Row:
    measure, per_client = run.measure, by_client(run.measure, rows)
    total, words = (sum(row.get(key, 0) for row in rows.values()) for key in ("total", "words"))
    worst = sorted(per_client.values(), reverse=True)[: tenth(len(per_client))]
    return {
        "pooled": measure.compute(total, sum(row["count"] for row in rows.values())),
        "mean": fmean(per_client.values()),
        "worst_decile": fmean(worst),
        "each": [float(f"{value:.5g}") for value in per_client.values()],
        **({"word": measure.compute(total, words)} if words else {}),
    }
