"""What a quality costs: rounds, bytes and virtual seconds until a method first reaches it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from fedgen_edge.report import plots
from fedgen_edge.report.summary import Number, Row, RunFiles, validation

TARGET = "evaluation.target"


class TargetCost(NamedTuple):
    """Of one method; nan where it never reached the target, or nothing is known."""

    method: str
    best: Number
    """Lowest validation number of all its rounds."""
    rounds: Number = math.nan
    """Rounds (or commits) until the first validation that was no worse than the target."""
    up: Number = math.nan
    """Bytes that clients had sent by then, those included that did not count."""
    down: Number = math.nan
    """Bytes that clients had been sent."""
    seconds: Number = math.nan
    """Virtual ones, where devices are described."""


class Costs(NamedTuple):
    """Of all methods of a run, its own first."""

    target: Number
    is_target_set: bool
    """Whether a setting names the target; else it is the best that every method reaches."""
    methods: list[TargetCost]

    @property
    def has_seconds(self) -> bool:
        """Whether any method is known to have taken time."""
        return any(not math.isnan(cost.seconds) for cost in self.methods)


def costs(run: RunFiles) -> Costs | None:
    """What each method spent to reach the target; none where there is nothing to tell.

    A single method without a target of its own says nothing: its best is its best.
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
    """Validation numbers by round, those that are numbers."""
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
    """Validation against virtual time."""

    def points(rows: Sequence[Row]) -> list[plots.Point]:
        clock = {row["round"]: row["clock"] for row in rows if "clock" in row}
        return [(clock[r], value) for r, value in _curve(run, rows).items() if r in clock]

    return plots.validation_against(run, points, "virtual seconds")


PLOTS: dict[str, plots.Draw] = {"clock": quality_for_seconds}
