"""What a run's folder says, in numbers: read it, add up, compare. Quick: no tensors here."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedgen_edge.errors import CheckpointError
from fedgen_edge.runs import records
from fedgen_edge.tasks.measure import Measure, Number

Row = dict[str, Any]
"""One line of a run's file."""

BACKBONE, GLOBAL, PERSONAL, LOCAL = "backbone", "global", "personal", "local-only"
PIECES = 4
"""Most tokens a word, where tokens are parts of words: of bytes there are about six."""


@dataclass(frozen=True)
class RunFiles:
    """All that a run wrote, adapters and checkpoints aside."""

    folder: Path
    settings: dict[str, Any]
    """By dotted name."""
    facts: Row
    """run.json: what was resolved, and measured once."""
    measure: Measure
    """What its models are judged by."""
    clients: list[Row]
    rounds: list[Row]
    baselines: dict[str, list[Row]]
    """Rounds of each method that was trained beside the run's own."""
    personal: list[Row]
    evaluation: list[Row]
    samples: list[Row]
    distances: list[Row]


@dataclass(frozen=True)
class ModelRow:
    """One model on the test data, by the run's measure; nan where there is nothing to say."""

    model: str
    clients: int
    mean: float
    """Of the clients' numbers."""
    pooled: float
    """All clients' items as one."""
    worst: float
    worst_client: str
    worst_decile: float
    """Mean over the tenth of the clients that fare worst (at least one)."""
    word: float
    """The same over words: compares across tokenizers; nan where tokens are letters or bytes."""
    over_backbone: float
    """Percent by which the mean lies below the backbone's."""
    over_local: float
    """The same against local-only."""


@dataclass(frozen=True)
class UplinkSummary:
    """Measured bytes, and what full-model FedAvg would have sent."""

    up: int
    down: int
    rounds: list[tuple[int, int]]
    """Up and down, a round each."""
    participations: int
    """Uploads: a client counts once for each round it took part in."""
    full: int
    """Bytes of the whole model in float32, times participations."""
    saving: float
    """Percent of `full` that was not sent; nan where nothing was sent."""


def read(folder: Path) -> RunFiles:
    """A run's files; those that it has not written yet are empty.

    Raises:
        CheckpointError: no run is here, or a file is missing, cut short or altered.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no run at {folder}: give a folder that `fedgen run` wrote")
    clients = folder / "clients.json"
    baselines = sorted((folder / "baselines").glob("*/rounds.jsonl"))
    return RunFiles(
        folder=folder,
        settings=dict(flatten_table(records.read_toml(folder / "settings.toml"))),
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
    """What the run's models are judged by."""
    try:
        return TypeAdapter(Measure).validate_python(facts.get("measure"), strict=True)
    except ValidationError:
        raise CheckpointError(
            f"{path} names no measure: it was altered, or another version of fedgen-edge wrote it"
        ) from None


def flatten_table(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested tables with its dotted name."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten_table(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def describe_changes(run: RunFiles) -> dict[str, str]:
    """The values of every setting that was changed before the run was resumed, by its name."""
    values: dict[str, str] = {}
    for change in run.facts.get("changes", ()):
        first = values.get(change["name"], f"{change['before']}")
        values[change["name"]] = f"{first}, then {change['now']} after round {change['round']}"
    return values


def by_model(run: RunFiles) -> dict[str, dict[str, Row]]:
    """Evaluation rows by model and client: the backbone first, the run's own models last."""
    rows: dict[str, dict[str, Row]] = {}
    for row in run.evaluation:
        rows.setdefault(row["model"], {})[row["client"]] = row
    rank = {BACKBONE: 0, GLOBAL: 2, PERSONAL: 3}
    return {model: rows[model] for model in sorted(rows, key=lambda m: rank.get(m, 1))}


def by_client(measure: Measure, rows: Mapping[str, Row]) -> dict[str, float]:
    """Each client's number."""
    return {client: measure.compute(row["total"], row["count"]) for client, row in rows.items()}


def select_common_rows(run: RunFiles, newcomers: bool = False) -> dict[str, dict[str, Row]]:
    """Evaluation rows of the clients that took part (or that never did) and every model has.

    Who never took part has the backbone for its local-only model: in a mean it would count against
    training alone, so newcomers have none.
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
    """The test, a row a model, over the same clients: those of `shared`."""
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
    """How many of so many clients a tenth is, rounded up."""
    return math.ceil(count / 10)


def difference(measure: Measure, rows: Mapping[str, Row], reference: Mapping[str, Row]) -> float:
    """Mean number less the reference's, over the clients that both have; nan if none."""
    values, reference_values = by_client(measure, rows), by_client(measure, reference)
    common = [client for client in values if client in reference_values]
    return fmean(values[c] - reference_values[c] for c in common) if common else math.nan


def gain(measure: Measure, rows: Mapping[str, Row], reference: Mapping[str, Row]) -> float:
    """Percent by which the mean number falls below the reference's; nan without one."""
    reference_values = [v for client, v in by_client(measure, reference).items() if client in rows]
    if rows is reference or not reference_values:
        return math.nan
    return -100 * difference(measure, rows, reference) / fmean(reference_values)


def uplink(run: RunFiles) -> UplinkSummary:
    """What travelled, and what the whole model would have cost on the same way."""
    rounds = [(row["bytes_up"], row["bytes_down"]) for row in run.rounds]
    up, participations = sum(r[0] for r in rounds), sum(len(row["clients"]) for row in run.rounds)
    full = run.facts.get("full_bytes", 0) * participations
    saving = 100 * (1 - up / full) if up and full else math.nan
    return UplinkSummary(up, sum(r[1] for r in rounds), rounds, participations, full, saving)


def validation(rounds: Sequence[Row]) -> list[tuple[int, Number]]:
    """Round and mean validation loss, where a round was validated."""
    per_round = [(row["round"], row.get("validation")) for row in rounds]
    return [(number, v["total"] / v["count"]) for number, v in per_round if v and v["count"]]


def paired_interval(differences: Sequence[Number]) -> tuple[float, float, float]:
    """Mean, and the 95 % t-interval around it; boundless for a single difference.

    Source: Student 1908.
    """
    mean, freedom = fmean(differences), len(differences) - 1
    if not freedom:
        return mean, -math.inf, math.inf
    # imported here: most commands that read a run's files need no interval
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 0.975)) * stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half
