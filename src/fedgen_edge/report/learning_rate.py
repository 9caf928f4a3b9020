"""Does the learning rate spoil a run, rather than its data?"""

import math

from fedgen_edge.report.summary import (
    BACKBONE,
    GLOBAL,
    PERSONAL,
    RunFiles,
    select_common_rows,
    validation,
)
from fedgen_edge.runs.formatting import number

HARM = 0.01  # in the metric's logarithm, 1 %: both models were tested on the same data
RISE = 0.05  # 5 % from the first round's training loss to the last's: cohorts differ by less
GAIN = 0.01  # 1 %: less is no learning
FAR = 0.25  # losses of two texts differ by less; a diverged first round exceeds it


def rate_too_high(run: RunFiles) -> str | None:
    """Training makes the model worse than at its start, and never lowers its own loss.

    A model that overfits, or whose clients disagree, lowers its training loss first.
    """
    tested = {model: _level(run, model) for model in (BACKBONE, GLOBAL, PERSONAL)}
    start, end = tested[BACKBONE], _first_known(tested[GLOBAL], tested[PERSONAL])
    losses = _training_levels(run)
    if math.isnan(start) or math.isnan(end):
        rises = losses and losses[-1] - losses[0] > RISE and not _has_lower_loss(run, losses[0])
        return _loss_rises(run) if rises else None
    if end - start <= HARM or _has_lower_loss(run, start):
        return None
    name, best = run.measure.name, min(losses, default=math.nan)
    began, ended = (_number(level) for level in (start, end))
    evidence = (
        f"Test {name} is {ended} after the rounds, and {began} with the backbone they began from"
    )
    return f"{evidence}; in training the best round's was {_number(best)}."


def _has_lower_loss(run: RunFiles, start: float) -> bool:
    """Whether some round's loss lies below the start's, on its own text or on another."""
    losses = _training_levels(run)
    near = losses[:1] if losses and losses[0] < start + FAR else []
    validation_levels = [run.measure.log_level(loss) for _, loss in validation(run.rounds)]
    is_training_lower = min(losses, default=math.inf) < max([start, *near]) - GAIN
    return is_training_lower or min(validation_levels, default=math.inf) < start - GAIN


def _training_levels(run: RunFiles) -> list[float]:
    """Return the levels of rounds, if training minimizes what the test measures."""
    if run.measure.training_loss:
        return []
    losses = [row["loss"] for row in run.rounds if row["clients"]]
    return [run.measure.log_level(loss) for loss in losses if math.isfinite(loss)]


def _level(run: RunFiles, model: str) -> float:
    """Return the logarithm of a model's metric on all clients' pooled test data; nan if none."""
    rows = select_common_rows(run).get(model, {}).values()
    count = sum(row["count"] for row in rows)
    return run.measure.log_level(sum(row["total"] for row in rows) / count) if count else math.nan


def _number(level: float) -> str:
    return number(math.exp(min(level, 700)))


def _first_known(*levels: float) -> float:
    return next((level for level in levels if not math.isnan(level)), math.nan)


def _loss_rises(run: RunFiles) -> str:
    losses = [row["loss"] for row in run.rounds if row["clients"] and math.isfinite(row["loss"])]
    unit = run.measure.unit
    return (
        f"Training loss is {losses[0]:.3f} {unit} in the first round, {losses[-1]:.3f} in the last."
    )
