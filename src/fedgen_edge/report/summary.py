"""Read a run's folder, and summarize and compare its numbers. Quick: it uses no tensors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedgen_edge.config import translate_table
from fedgen_edge.errors import CheckpointError
from fedgen_edge.runs import records
from fedgen_edge.tasks.measure import Measure, Number

Row = dict[str, Any]
"""One line of a run's record file."""

BACKBONE, GLOBAL, PERSONAL, LOCAL = "backbone", "global", "personal", "local-only"
PIECES = 4
"""Maximum tokens per word if tokens are subwords; of bytes there are about six."""


@dataclass(frozen=True)
class RunFiles:
    """Everything that a run wrote, except adapters and checkpoints."""

    folder: Path
    settings: dict[str, Any]
    """Settings by dotted name."""
    facts: Row
    """run.json: what was resolved, and what was measured once."""
    measure: Measure
    """The metric of its models."""
    clients: list[Row]
    rounds: list[Row]
    baselines: dict[str, list[Row]]
    """Rounds of each method that was trained besides the run's own."""
    personal: list[Row]
    evaluation: list[Row]
    samples: list[Row]
    distances: list[Row]


@dataclass(frozen=True)
class ModelRow:
    """One model's metric on the test data; nan if unknown."""

    model: str
    clients: int
    mean: float
    """Mean of the clients' metrics."""
    pooled: float
    """The metric over all clients' items together."""
    worst: float
    worst_client: str
    worst_decile: float
    """Mean over the worst tenth of the clients (at least one)."""
    word: float
    """The pooled metric per word, comparable across tokenizers; nan for letters or bytes."""
    over_backbone: float
    """Percent by which the mean lies below the backbone's."""
    over_local: float
    """The same against local-only."""


@dataclass(frozen=True)
class UplinkSummary:
    """Measured bytes, and the bytes that full-model FedAvg would have sent."""

    up: int
    down: int
    rounds: list[tuple[int, int]]
    """Bytes up and down in each round."""
    participations: int
    """Uploads: a client counts once for each round it took part in."""
    full: int
    """Bytes of the whole model in float32, times participations."""
    saving: float
    """Percent of `full` that was not sent; nan if nothing was sent."""


def read(folder: Path) -> RunFiles:
    """Read a run's files; those that it has not written yet are empty.

    Raises:
        CheckpointError: there is no run, or a file is missing, truncated or altered.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no run at {folder}: give a folder that `fedgen run` wrote")
    clients = folder / "clients.json"
    baselines = sorted((folder / "baselines").glob("*/rounds.jsonl"))
    return RunFiles(
        folder=folder,
        settings=dict(flatten_table(translate_table(records.read_toml(folder / "settings.toml")))),
        facts=(facts := records.read_json(folder / "run.json")),
        measure=_measure(facts, folder / "run.json"),
        clients=records.read_json(clients) if clients.exists() else [],
        rounds=records.lines(folder / "rounds.jsonl"),
        baselines={path.parent.name: records.lines(path) for path in baselines},
        personal=records.lines(folder / "personal.jsonl"),
        evaluation=records.lines(folder / "evaluation.jsonl"),
        samples=records.lines(folder / "samples.jsonl"),
        distances=records.lines(folder / "distances.jsonl"),
    )


def _measure(facts: Row, path: Path) -> Measure:
    """Return the metric of the run's models."""
    try:
        return TypeAdapter(Measure).validate_python(facts.get("measure"), strict=True)
    except ValidationError:
        raise CheckpointError(
            f"{path} names no measure: it was altered, or another version of fedgen-edge wrote it"
        ) from None


def flatten_table(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested tables with its dotted name."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten_table(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def describe_changes(run: RunFiles) -> dict[str, str]:
    """Describe the settings that were changed before the run was resumed, by name."""
    values: dict[str, str] = {}
    for change in run.facts.get("changes", ()):
        first = values.get(change["name"], f"{change['before']}")
        values[change["name"]] = f"{first}, then {change['now']} after round {change['round']}"
    return values


def by_model(run: RunFiles) -> dict[str, dict[str, Row]]:
    """Return evaluation rows by model and client: the backbone first, the run's models last."""
    rows: dict[str, dict[str, Row]] = {}
    for row in run.evaluation:
        rows.setdefault(row["model"], {})[row["client"]] = row
    rank = {BACKBONE: 0, GLOBAL: 2, PERSONAL: 3}
    return {model: rows[model] for model in sorted(rows, key=lambda m: rank.get(m, 1))}


def by_client(measure: Measure, rows: Mapping[str, Row]) -> dict[str, float]:
    """Return each client's metric."""
    return {client: measure.compute(row["total"], row["count"]) for client, row in rows.items()}


def select_common_rows(run: RunFiles, newcomers: bool = False) -> dict[str, dict[str, Row]]:
    """Return evaluation rows of the participants (or held-out clients) that every model has.

    A held-out client's local-only model would be the backbone, which would count against local
    training in a mean, so held-out clients have none.
    """
    models = by_model(run)
    if newcomers:
        models.pop(LOCAL, None)
    new = {row["client"] for row in run.clients if row.get("newcomer", False)}
    new |= {row["client"] for row in run.evaluation if not row.get("participated", True)}
    eligible = [c for c in next(iter(models.values()), {}) if (c in new) == newcomers]
    clients = [c for c in eligible if all(c in rows for rows in models.values())]
    return (
        {model: {c: rows[c] for c in clients} for model, rows in models.items()} if clients else {}
    )


def summarize_models(run: RunFiles, newcomers: bool = False) -> list[ModelRow]:
    """Return a test row per model, over the same clients: those of `select_common_rows`."""
    common_rows = select_common_rows(run, newcomers)
    return [_model_row(run.measure, model, common_rows) for model in common_rows]


def _model_row(
    measure: Measure, model: str, common_rows: Mapping[str, Mapping[str, Row]]
) -> ModelRow:
    rows = common_rows[model]
    per_client = by_client(measure, rows)
    worst = sorted(
        per_client,
        key=lambda c: math.inf if math.isnan(per_client[c]) else per_client[c],
        reverse=True,
    )
    total, words = (sum(row.get(k, 0) for row in rows.values()) for k in ("total", "words"))
    count = sum(row["count"] for row in rows.values())
    return ModelRow(
        model=model,
        clients=len(per_client),
        mean=fmean(per_client.values()),
        pooled=measure.compute(total, count),
        worst=per_client[worst[0]],
        worst_client=worst[0],
        worst_decile=fmean(per_client[client] for client in worst[: tenth(len(worst))]),
        word=measure.compute(total, words if count <= PIECES * words else 0),
        over_backbone=gain(measure, rows, common_rows.get(BACKBONE, {})),
        over_local=gain(measure, rows, common_rows.get(LOCAL, {})),
    )


def tenth(count: int) -> int:
    """Return a tenth of the count, rounded up."""
    return math.ceil(count / 10)


def difference(measure: Measure, rows: Mapping[str, Row], reference: Mapping[str, Row]) -> float:
    """Return the mean metric minus the reference's, over their common clients; nan if none."""
    values, reference_values = by_client(measure, rows), by_client(measure, reference)
    common = [client for client in values if client in reference_values]
    return fmean(values[c] - reference_values[c] for c in common) if common else math.nan


def gain(measure: Measure, rows: Mapping[str, Row], reference: Mapping[str, Row]) -> float:
    """Return the percent by which the mean metric lies below the reference's; nan without one."""
    reference_values = [v for client, v in by_client(measure, reference).items() if client in rows]
    if rows is reference or not reference_values:
        return math.nan
    return -100 * difference(measure, rows, reference) / fmean(reference_values)


def uplink(run: RunFiles) -> UplinkSummary:
    """Return the bytes sent, and the bytes that sending the whole model would have taken."""
    rounds = [(row["bytes_up"], row["bytes_down"]) for row in run.rounds]
    up, participations = sum(r[0] for r in rounds), sum(len(row["clients"]) for row in run.rounds)
    full = run.facts.get("full_bytes", 0) * participations
    saving = 100 * (1 - up / full) if up and full else math.nan
    return UplinkSummary(up, sum(r[1] for r in rounds), rounds, participations, full, saving)


def validation(rounds: Sequence[Row]) -> list[tuple[int, Number]]:
    """Return the round and mean validation loss of each validated round."""
    per_round = [(row["round"], row.get("validation")) for row in rounds]
    return [(number, v["total"] / v["count"]) for number, v in per_round if v and v["count"]]


def paired_interval(differences: Sequence[Number]) -> tuple[float, float, float]:
    """Return the mean and its 95 % t-interval, which is unbounded for a single difference.

    Source: Student 1908.
    """
    mean, freedom = fmean(differences), len(differences) - 1
    if not freedom:
        return mean, -math.inf, math.inf
    # imported here: most commands that read a run's files need no interval
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 0.975)) * stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half
