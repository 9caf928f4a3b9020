"""Cost of a target quality: rounds, bytes and virtual seconds until a method first reaches it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from fedgen_edge.report import plots
from fedgen_edge.report.summary import Number, Row, RunFiles, validation

TARGET = "evaluation.target"


class TargetCost(NamedTuple):
    """One method's costs; nan if it never reached the target, or the cost is unknown."""

    method: str
    best: Number
    """Lowest validation metric of all its rounds."""
    rounds: Number = math.nan
    """Rounds (or commits) until validation was first no worse than the target."""
    up: Number = math.nan
    """Bytes that clients had sent by then, including updates that were discarded."""
    down: Number = math.nan
    """Bytes that the server had sent by then."""
    seconds: Number = math.nan
    """Virtual seconds, if the settings describe devices."""


class Costs(NamedTuple):
    """The costs of all methods of a run, its own first."""

    target: Number
    is_target_set: bool
    """Whether a setting gives the target; else it is the best value that every method reaches."""
    methods: list[TargetCost]

    @property
    def has_seconds(self) -> bool:
        """Whether the time of any method is known."""
        return any(not math.isnan(cost.seconds) for cost in self.methods)


def costs(run: RunFiles) -> Costs | None:
    """Return each method's cost to reach the target; None if there is nothing to compare.

    A single method without a target setting has nothing to compare with.
    """
    methods = {str(run.settings.get("method.name", "this run")): run.rounds, **run.baselines}
    curves = {name: _curve(run, rows) for name, rows in methods.items()}
    best = {name: min(curve.values()) for name, curve in curves.items() if curve}
    target_setting = run.settings.get(TARGET)
    if not best or (target_setting is None and len(best) < 2):
        return None
    target = max(best.values()) if target_setting is None else target_setting
    method_costs = [_cost(name, methods[name], curves[name], target) for name in best]
    return Costs(target, target_setting is not None, method_costs)


def _curve(run: RunFiles, rows: Sequence[Row]) -> dict[int, Number]:
    """Return the validation metric by round, without nan."""
    values = {r: run.measure.compute(loss, 1) for r, loss in validation(rows)}
    return {r: value for r, value in values.items() if math.isfinite(value)}


def _cost(name: str, rows: Sequence[Row], curve: dict[int, Number], target: Number) -> TargetCost:
    best = min(curve.values())
    first = next((r for r, value in curve.items() if value <= target), None)
    if first is None:
        return TargetCost(name, best)
    counted_rounds = [row for row in rows if row["round"] <= first]
    up, down = (sum(row[key] for row in counted_rounds) for key in ("bytes_up", "bytes_down"))
    return TargetCost(name, best, first, up, down, counted_rounds[-1].get("clock", math.nan))


def quality_for_seconds(run: RunFiles) -> Figure | None:
    """Plot validation against virtual time."""

    def points(rows: Sequence[Row]) -> list[plots.Point]:
        clock = {row["round"]: row["clock"] for row in rows if "clock" in row}
        return [(clock[r], value) for r, value in _curve(run, rows).items() if r in clock]

    return plots.validation_against(run, points, "virtual seconds")


PLOTS: dict[str, plots.Draw] = {"clock": quality_for_seconds}
