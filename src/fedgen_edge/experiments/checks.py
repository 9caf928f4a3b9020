"""Signs of a federation that fails: each looks at a run, and gives its evidence or none."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median

from fedgen_edge.experiments.apart import DistanceRow, distances
from fedgen_edge.experiments.merging import agreement, by_layer
from fedgen_edge.experiments.summary import (
    BACKBONE,
    GLOBAL,
    PERSONAL,
    Number,
    Row,
    RunFiles,
    by_client,
    by_model,
    judged,
    number,
    validation,
)

REAL = 1.0  # percent: both models were tested on the same data, so it is hardly an accident
FLAT = 0.01  # of the number's logarithm, 1 %: a run that learns passes it in a round or two
RELAPSE = 0.05  # above the best round, in the same terms, 5 %: more than rounds jitter
SWING = 0.5  # rises to falls: a curve on its way down gives back far less than half of what it won
AGREEMENT = 0.0  # mean cosine of two updates: below it, they cancel more than by chance
FEW_STEPS = 2  # AdamW's first step is the gradient's sign alone; direction begins with the second
WIDE = 2.0  # effective rank: a product that never had two directions has none to lose
SINGLE = 1.25  # effective rank: one direction has all but a twentieth; sound medians exceed 1.5
LOPSIDED = 0.5  # share of the training data: above it, one client outvotes all the others
ALIKE = 0.5  # diversity: half as far apart as real pictures, more than blur alone would do
MISSED = 0.1  # recall: samples that look real, and leave out nine in ten real ones
MISPLACED = 0.3  # of the samples that far off in their classes, by the nearest class's mean
DOUBT = 0.067  # standard error, as a share of the number: above it, rounds cannot be told apart


def not_finite(run: RunFiles) -> str | None:
    """A loss is NaN or infinite."""
    losses = [(f"round {row['round']}", row["loss"]) for row in run.rounds if row["clients"]]
    judged = [(f"the validation of round {n}", loss) for n, loss in validation(run.rounds)]
    final = [(f"the test of {r['model']} for {r['client']}", r["total"]) for r in run.evaluation]
    bad = [where for where, loss in (*losses, *judged, *final) if not math.isfinite(loss)]
    return f"First in {bad[0]}; {len(bad)} numbers in all." if bad else None


def diverges(run: RunFiles) -> str | None:
    """Validation ends above where it began."""
    first, _, last = _landmarks(run)
    return _from_to(run, first, last) if last[1] - first[1] > RELAPSE else None


def relapses(run: RunFiles) -> str | None:
    """Validation ends above its best round."""
    first, best, last = _landmarks(run)
    past = last[1] - best[1] > RELAPSE >= last[1] - first[1]
    return _from_to(run, best, last) if past else None


def swings(run: RunFiles) -> str | None:
    """Validation goes up and down instead of down."""
    moves = [b[1] - a[1] for a, b in pairwise(_curve(run))]
    ups = [move for move in moves if move > 0]
    turns = sum(a * b < 0 for a, b in pairwise(moves))
    if turns < 2 or max(ups) < FLAT or sum(ups) <= SWING * (sum(ups) - sum(moves)):
        return None
    cohort = median(len(row["cohort"]) for row in run.rounds)
    return (
        f"{_named(run)} rose in {len(ups)} of {len(moves)} steps, by up to "
        f"{100 * math.expm1(max(ups)):.1f} %; a cohort is {cohort:g} of {len(run.clients)} clients."
    )


def stuck(run: RunFiles) -> str | None:
    """The loss hardly moves, and the test does not say otherwise."""
    losses = [row["loss"] for row in run.rounds if row["clients"]]
    levels = [run.measure.level(loss) for loss in losses]
    helps = any(row.model == GLOBAL and row.over_backbone > 0 for row in judged(run))
    if len(losses) < 3 or helps or run.measure.trained or not levels[0] - min(levels) < FLAT:
        return None
    unit = run.measure.unit
    return f"Training loss is {losses[0]:.3f} {unit} at first, {min(losses):.3f} at its best."


def losers(run: RunFiles, model: str, reference: str) -> str | None:
    """One model is worse than another, for some clients."""
    ours, theirs = (
        by_client(run.measure, by_model(run).get(name, {})) for name in (model, reference)
    )
    lost = {
        c: ours[c] / theirs[c] for c in ours if ours[c] > (1 + REAL / 100) * theirs.get(c, math.inf)
    }
    told = [
        f"{client} ({number(ours[client])} against {number(theirs[client])})"
        for client in sorted(lost, key=lambda c: lost[c], reverse=True)
    ]
    said = f"Test {run.measure.name} of {len(told)} of {len(ours)}"
    return f"{said}: {name_some(told)}." if told else None


def fallbacks(run: RunFiles) -> str | None:
    """Most clients keep the global adapter."""
    tuned = [row for row in run.personal if len(row["validation"]) > 1]
    kept = [row["client"] for row in tuned if row["chosen"] == 0]
    most = len(kept) > len(tuned) / 2
    return (
        f"{len(kept)} of {len(tuned)} kept the global adapter: {name_some(kept)}." if most else None
    )


def too_little_data(run: RunFiles) -> str | None:
    """Some clients can hardly train."""
    steps = {c["client"]: c["steps"] for row in run.rounds for c in row["clients"]}
    poor = [
        f"{row['client']} ({row['items']} {run.measure.items})"
        for row in _learners(run)
        if row["items"] < run.measure.few or steps.get(row["client"], FEW_STEPS) < FEW_STEPS
    ]
    least = f"{run.measure.few} training {run.measure.items} or {FEW_STEPS} steps a round"
    return f"{len(poor)} have fewer than {least}: {name_some(poor)}." if poor else None


def pulled_apart(run: RunFiles) -> str | None:
    """Updates cancel in the mean."""
    rows = [(row, cosine) for row in run.rounds if (cosine := agreement(row)) is not None]
    if not rows or (typical := median(cosine for _, cosine in rows)) >= AGREEMENT:
        return None
    drift = median(fmean(c["drift"] for c in row["clients"]) for row, _ in rows)
    merged = median(row["mean_norm"] for row, _ in rows)
    return (
        f"In a round a client moves by {number(drift)}, their mean by {number(merged)}: two "
        f"clients' updates have a cosine of about {typical:.2f}."
    )


def rank_collapses(run: RunFiles) -> str | None:
    """The products of half of the layers or more have shrunk to one direction.

    B begins at zero, so a small rank is no sign; that it was larger once is.
    """
    ranks = [found for row in run.rounds if (found := by_layer(row, "rank"))]
    last = ranks[-1] if ranks else {}
    best = {layer: max(each.get(layer, 0.0) for each in ranks) for layer in last}
    gone = [layer for layer in last if best[layer] >= WIDE and last[layer] <= SINGLE]
    if not gone or 2 * len(gone) < len(last):
        return None
    worst = max(gone, key=best.__getitem__)
    return (
        f"In {len(gone)} of {len(last)} layers the product of B and A is all but of rank 1: in "
        f"{worst} its effective rank fell from {number(best[worst])} to {number(last[worst])}."
    )


def lopsided(run: RunFiles) -> str | None:
    """One client has most of the data."""
    rows = sorted(_learners(run), key=lambda row: row["items"])
    total, items = sum(row["items"] for row in rows), run.measure.items
    if len(rows) < 3 or rows[-1]["items"] <= LOPSIDED * total:
        return None
    return f"{rows[-1]['client']} has {100 * rows[-1]['items'] / total:.0f} % of {total} {items}."


def noisy_judge(run: RunFiles) -> str | None:
    """Validation is too small to tell rounds apart."""
    judged = [row["validation"]["count"] for row in run.rounds if row.get("validation")]
    read, measure = min(judged, default=math.inf), run.measure
    if measure.spread / math.sqrt(max(1, read)) <= DOUBT:
        return None
    error = 100 * math.expm1(measure.spread / math.sqrt(max(1, read)))
    return (
        f"It reads {read:.0f} {measure.items} a round, so its {measure.name} is known to about "
        f"{error:.0f} %."
    )


def never_drawn(run: RunFiles) -> str | None:
    """Some clients took part in no round."""
    drawn = {client for row in run.rounds for client in row["cohort"]}
    idle = [row["client"] for row in _learners(run) if run.rounds and row["client"] not in drawn]
    return f"{len(idle)} of {len(run.clients)}: {name_some(idle)}." if idle else None


def idle_rounds(run: RunFiles) -> str | None:
    """Half of the rounds or more changed nothing, since nobody finished them."""
    empty = [row["round"] for row in run.rounds if not row["clients"]]
    if not empty or 2 * len(empty) < len(run.rounds):
        return None
    return f"{len(empty)} of {len(run.rounds)} rounds, round {empty[0]} first."


def collapsed(run: RunFiles) -> str | None:
    """Samples are of fewer kinds than real pictures are, and than the backbone's were.

    What a poor backbone lacks, training did not lose: half must be gone of its diversity, and of
    what it had in the right classes.
    """
    found = distances(run)
    began = next((row for row in found if row.model == BACKBONE), None)
    told = {row.model: signs for row in found if (signs := _alike(row, began))}
    model = next((name for name in told if name in {GLOBAL, PERSONAL}), None)
    return f"Of the {model} samples, {'; '.join(told[model])}." if model else None


def began_alike(run: RunFiles) -> str | None:
    """The backbone's own samples are of fewer kinds than real pictures are."""
    began = next((row for row in distances(run) if row.model == BACKBONE), None)
    # whether or not they look real, which excuses too
    signs = _alike(replace(began, precision=1.0)) if began else []
    return f"Of its samples, {'; '.join(signs)}." if signs else None


def _alike(row: DistanceRow, began: DistanceRow | None = None) -> list[str]:
    """The signs that a model's samples show, and those of what it began from did not."""
    signs = []
    if row.diversity < ALIKE * min(1.0, began.diversity if began else 1.0):
        signs.append(f"two of a class lie {number(row.diversity)} times as far apart as real")
    if row.precision > 0.5 and row.recall < MISSED and not (began and began.recall < MISSED):
        signs.append(f"they reach {100 * row.recall:.0f} % of the real pictures")
    most = (1 + began.misplaced) / 2 if began and began.misplaced > MISPLACED else MISPLACED
    if row.misplaced > most:
        signs.append(f"the classes' shares are {100 * row.misplaced:.0f} % off those of real ones")
    return signs


def too_few_pictures(run: RunFiles) -> str | None:
    """The distance mostly says how many pictures there are."""
    told = next((row.get("few") for row in run.distances if row["client"] is None), None)
    return f"{told[0].upper()}{told[1:]}." if told else None


def unfinished(run: RunFiles) -> str | None:
    """The run stopped before its end."""
    planned = run.settings.get("federation.rounds", "?")
    done = run.facts.get("finished", False)
    return None if done else f"{len(run.rounds)} of {planned} rounds are recorded."


def _curve(run: RunFiles) -> list[tuple[int, Number]]:
    points = [(at, run.measure.level(loss)) for at, loss in validation(run.rounds)]
    return [point for point in points if math.isfinite(point[1])]


def _landmarks(run: RunFiles) -> tuple[tuple[int, Number], ...]:
    """The first, the best and the last validation: round, and the number's logarithm."""
    curve = _curve(run) or [(0, 0.0)]
    return curve[0], min(curve, key=lambda point: point[1]), curve[-1]


def _from_to(run: RunFiles, start: tuple[int, Number], end: tuple[int, Number]) -> str:
    told = [f"{number(math.exp(min(level, 700)))} in round {r}" for r, level in (start, end)]
    return f"Validation {run.measure.name} is {told[0]} and {told[1]}."


def _named(run: RunFiles) -> str:
    name = run.measure.name
    return name[0].upper() + name[1:]


def _learners(run: RunFiles) -> Sequence[Row]:
    return [row for row in run.clients if not row.get("newcomer", False)]


def name_some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
