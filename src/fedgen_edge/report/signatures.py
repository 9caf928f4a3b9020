"""Signatures of a failing federation: each inspects a run, and returns its evidence or None."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median

from fedgen_edge.report.layers import agreement, by_layer
from fedgen_edge.report.sample_distances import DistanceRow, distances
from fedgen_edge.report.summary import (
    BACKBONE,
    GLOBAL,
    PERSONAL,
    Number,
    Row,
    RunFiles,
    by_client,
    by_model,
    summarize_models,
    validation,
)
from fedgen_edge.runs.formatting import number

MIN_DIFFERENCE = (
    1.0  # percent: both models were tested on the same data, so it is hardly an accident
)
FLAT = 0.01  # in the metric's logarithm, 1 %: a run that learns exceeds it in a round or two
RELAPSE = 0.05  # above the best round, likewise, 5 %: more than the noise between rounds
SWING = 0.5  # rises over falls: a falling curve gives back far less than half of its gains
AGREEMENT = 0.0  # mean cosine of two updates: below it, they cancel more than by chance
FEW_STEPS = 2  # AdamW's first step is the gradient's sign alone; direction begins with the second
MIN_BEST_RANK = 2.0  # effective rank: a product that never had two directions cannot lose one
COLLAPSED_RANK = (
    1.25  # effective rank: one direction has all but a twentieth; healthy medians exceed 1.5
)
DOMINANT_SHARE = 0.5  # share of the training data: above it, one client outweighs all the others
MIN_DIVERSITY = 0.5  # diversity: half as far apart as real images, more than blur alone would cause
MIN_RECALL = 0.1  # recall: samples that look real, and miss nine in ten real ones
MAX_MISPLACED = 0.3  # fraction of samples in the wrong class, by the nearest class mean
MAX_RELATIVE_ERROR = (
    0.067  # standard error over the value: above it, rounds cannot be distinguished
)


def not_finite(run: RunFiles) -> str | None:
    """A loss is NaN or infinite."""
    losses = [(f"round {row['round']}", row["loss"]) for row in run.rounds if row["clients"]]
    validation_losses = [
        (f"the validation of round {n}", loss) for n, loss in validation(run.rounds)
    ]
    test_losses = [
        (f"the test of {r['model']} for {r['client']}", r["total"]) for r in run.evaluation
    ]
    non_finite = [
        where
        for where, loss in (*losses, *validation_losses, *test_losses)
        if not math.isfinite(loss)
    ]
    return f"First in {non_finite[0]}; {len(non_finite)} numbers in all." if non_finite else None


def diverges(run: RunFiles) -> str | None:
    """Validation ends above its start."""
    first, _, last = _landmarks(run)
    return _describe_change(run, first, last) if last[1] - first[1] > RELAPSE else None


def relapses(run: RunFiles) -> str | None:
    """Validation ends above its best round."""
    first, best, last = _landmarks(run)
    has_relapsed = last[1] - best[1] > RELAPSE >= last[1] - first[1]
    return _describe_change(run, best, last) if has_relapsed else None


def swings(run: RunFiles) -> str | None:
    """Validation goes up and down instead of down."""
    changes = [b[1] - a[1] for a, b in pairwise(_curve(run))]
    rises = [move for move in changes if move > 0]
    turns = sum(a * b < 0 for a, b in pairwise(changes))
    if turns < 2 or max(rises) < FLAT or sum(rises) <= SWING * (sum(rises) - sum(changes)):
        return None
    cohort = median(len(row["cohort"]) for row in run.rounds)
    return (
        f"{_capitalize_measure(run)} rose in {len(rises)} of {len(changes)} steps, by up to "
        f"{100 * math.expm1(max(rises)):.1f} %; a cohort is {cohort:g} of "
        f"{len(run.clients)} clients."
    )


def stalls(run: RunFiles) -> str | None:
    """The loss hardly moves, and the test agrees."""
    losses = [row["loss"] for row in run.rounds if row["clients"]]
    levels = [run.measure.log_level(loss) for loss in losses]
    beats_backbone = any(
        row.model == GLOBAL and row.over_backbone > 0 for row in summarize_models(run)
    )
    if (
        len(losses) < 3
        or beats_backbone
        or run.measure.training_loss
        or not levels[0] - min(levels) < FLAT
    ):
        return None
    unit = run.measure.unit
    return f"Training loss is {losses[0]:.3f} {unit} at first, {min(losses):.3f} at its best."


def find_worse_clients(run: RunFiles, model: str, reference: str) -> str | None:
    """One model is worse than another, for some clients."""
    losses, reference_losses = (
        by_client(run.measure, by_model(run).get(name, {})) for name in (model, reference)
    )
    ratios = {
        c: losses[c] / reference_losses[c]
        for c in losses
        if losses[c] > (1 + MIN_DIFFERENCE / 100) * reference_losses.get(c, math.inf)
    }
    descriptions = [
        f"{client} ({number(losses[client])} against {number(reference_losses[client])})"
        for client in sorted(ratios, key=lambda c: ratios[c], reverse=True)
    ]
    heading = f"Test {run.measure.name} of {len(descriptions)} of {len(losses)}"
    return f"{heading}: {name_some(descriptions)}." if descriptions else None


def fallbacks(run: RunFiles) -> str | None:
    """Most clients keep the global adapter."""
    tuned = [row for row in run.personal if len(row["validation"]) > 1]
    fallback_clients = [row["client"] for row in tuned if row["chosen"] == 0]
    is_majority = len(fallback_clients) > len(tuned) / 2
    return (
        f"{len(fallback_clients)} of {len(tuned)} kept the global adapter: "
        f"{name_some(fallback_clients)}."
        if is_majority
        else None
    )


def too_little_data(run: RunFiles) -> str | None:
    """Some clients have hardly any data to train on."""
    steps = {c["client"]: c["steps"] for row in run.rounds for c in row["clients"]}
    descriptions = [
        f"{row['client']} ({row['items']} {run.measure.items})"
        for row in _list_participants(run)
        if row["items"] < run.measure.scarce_items
        or steps.get(row["client"], FEW_STEPS) < FEW_STEPS
    ]
    requirement = (
        f"{run.measure.scarce_items} training {run.measure.items} or {FEW_STEPS} steps a round"
    )
    return (
        f"{len(descriptions)} have fewer than {requirement}: {name_some(descriptions)}."
        if descriptions
        else None
    )


def updates_cancel(run: RunFiles) -> str | None:
    """Updates cancel in the mean."""
    rows = [(row, cosine) for row in run.rounds if (cosine := agreement(row)) is not None]
    if not rows or (typical := median(cosine for _, cosine in rows)) >= AGREEMENT:
        return None
    drift = median(fmean(c["drift"] for c in row["clients"]) for row, _ in rows)
    mean_norm = median(row["mean_norm"] for row, _ in rows)
    return (
        f"In a round a client moves by {number(drift)}, their mean by {number(mean_norm)}: two "
        f"clients' updates have a cosine of about {typical:.2f}."
    )


def rank_collapses(run: RunFiles) -> str | None:
    """The products of half of the layers or more have shrunk to one direction.

    B starts at zero, so a small rank alone is no sign; a rank that was larger before is.
    """
    ranks = [found for row in run.rounds if (found := by_layer(row, "rank"))]
    last_ranks = ranks[-1] if ranks else {}
    best_ranks = {layer: max(each.get(layer, 0.0) for each in ranks) for layer in last_ranks}
    collapsed_layers = [
        layer
        for layer in last_ranks
        if best_ranks[layer] >= MIN_BEST_RANK and last_ranks[layer] <= COLLAPSED_RANK
    ]
    if not collapsed_layers or 2 * len(collapsed_layers) < len(last_ranks):
        return None
    worst = max(collapsed_layers, key=best_ranks.__getitem__)
    return (
        f"In {len(collapsed_layers)} of {len(last_ranks)} layers the product of B and A "
        "is all but of rank 1: in "
        f"{worst} its effective rank fell from {number(best_ranks[worst])} to "
        f"{number(last_ranks[worst])}."
    )


def one_client_dominates(run: RunFiles) -> str | None:
    """One client has most of the data."""
    rows = sorted(_list_participants(run), key=lambda row: row["items"])
    total, items = sum(row["items"] for row in rows), run.measure.items
    if len(rows) < 3 or rows[-1]["items"] <= DOMINANT_SHARE * total:
        return None
    return f"{rows[-1]['client']} has {100 * rows[-1]['items'] / total:.0f} % of {total} {items}."


def validation_is_noisy(run: RunFiles) -> str | None:
    """Validation is too small to tell rounds apart."""
    counts = [row["validation"]["count"] for row in run.rounds if row.get("validation")]
    num_items, measure = min(counts, default=math.inf), run.measure
    if measure.loss_spread / math.sqrt(max(1, num_items)) <= MAX_RELATIVE_ERROR:
        return None
    error = 100 * math.expm1(measure.loss_spread / math.sqrt(max(1, num_items)))
    return (
        f"It reads {num_items:.0f} {measure.items} a round, so its {measure.name} is "
        "known to about "
        f"{error:.0f} %."
    )


def never_sampled(run: RunFiles) -> str | None:
    """Some clients took part in no round."""
    cohort_members = {client for row in run.rounds for client in row["cohort"]}
    never_members = [
        row["client"]
        for row in _list_participants(run)
        if run.rounds and row["client"] not in cohort_members
    ]
    return (
        f"{len(never_members)} of {len(run.clients)}: {name_some(never_members)}."
        if never_members
        else None
    )


def idle_rounds(run: RunFiles) -> str | None:
    """Half of the rounds or more changed nothing, since no client finished them."""
    empty = [row["round"] for row in run.rounds if not row["clients"]]
    if not empty or 2 * len(empty) < len(run.rounds):
        return None
    return f"{len(empty)} of {len(run.rounds)} rounds, round {empty[0]} first."


def modes_collapse(run: RunFiles) -> str | None:
    """Samples are of fewer kinds than real images are, and than the backbone's were.

    Training did not lose what a poor backbone lacks: half of the backbone's diversity must be gone,
    and half of its samples in the right classes.
    """
    distance_rows = distances(run)
    backbone_row = next((row for row in distance_rows if row.model == BACKBONE), None)
    signs_by_model = {
        row.model: signs
        for row in distance_rows
        if (signs := _list_collapse_signs(row, backbone_row))
    }
    model = next((name for name in signs_by_model if name in {GLOBAL, PERSONAL}), None)
    return f"Of the {model} samples, {'; '.join(signs_by_model[model])}." if model else None


def backbone_lacks_diversity(run: RunFiles) -> str | None:
    """The backbone's own samples are of fewer kinds than real images are."""
    backbone_row = next((row for row in distances(run) if row.model == BACKBONE), None)
    # ignore whether they look real, which would excuse them
    signs = _list_collapse_signs(replace(backbone_row, precision=1.0)) if backbone_row else []
    return f"Of its samples, {'; '.join(signs)}." if signs else None


def _list_collapse_signs(row: DistanceRow, backbone_row: DistanceRow | None = None) -> list[str]:
    """List the signs that a model's samples show, and its backbone's did not."""
    signs = []
    if row.diversity < MIN_DIVERSITY * min(1.0, backbone_row.diversity if backbone_row else 1.0):
        signs.append(f"two of a class lie {number(row.diversity)} times as far apart as real")
    if (
        row.precision > 0.5
        and row.recall < MIN_RECALL
        and not (backbone_row and backbone_row.recall < MIN_RECALL)
    ):
        signs.append(f"they reach {100 * row.recall:.0f} % of the real pictures")
    max_misplaced = (
        (1 + backbone_row.misplaced) / 2
        if backbone_row and backbone_row.misplaced > MAX_MISPLACED
        else MAX_MISPLACED
    )
    if row.misplaced > max_misplaced:
        signs.append(f"the classes' shares are {100 * row.misplaced:.0f} % off those of real ones")
    return signs


def too_few_images(run: RunFiles) -> str | None:
    """The distance mostly reflects the number of images."""
    message = next((row.get("few") for row in run.distances if row["client"] is None), None)
    return f"{message[0].upper()}{message[1:]}." if message else None


def stops_early(run: RunFiles) -> str | None:
    """The run stopped before its end."""
    planned = run.settings.get("federation.rounds", "?")
    is_finished = run.facts.get("finished", False)
    return None if is_finished else f"{len(run.rounds)} of {planned} rounds are recorded."


def _curve(run: RunFiles) -> list[tuple[int, Number]]:
    points = [(at, run.measure.log_level(loss)) for at, loss in validation(run.rounds)]
    return [point for point in points if math.isfinite(point[1])]


def _landmarks(run: RunFiles) -> tuple[tuple[int, Number], ...]:
    """Return the first, best and last validation: round, and the metric's logarithm."""
    curve = _curve(run) or [(0, 0.0)]
    return curve[0], min(curve, key=lambda point: point[1]), curve[-1]


def _describe_change(run: RunFiles, start: tuple[int, Number], end: tuple[int, Number]) -> str:
    descriptions = [
        f"{number(math.exp(min(level, 700)))} in round {r}" for r, level in (start, end)
    ]
    return f"Validation {run.measure.name} is {descriptions[0]} and {descriptions[1]}."


def _capitalize_measure(run: RunFiles) -> str:
    name = run.measure.name
    return name[0].upper() + name[1:]


def _list_participants(run: RunFiles) -> Sequence[Row]:
    return [row for row in run.clients if not row.get("newcomer", False)]


def name_some(names: Sequence[str]) -> str:
    """Name the first three, and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
