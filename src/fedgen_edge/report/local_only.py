"""Do clients do better alone than with the federation?"""

import math

from fedgen_edge.report.gains import MIN_GAIN, gains
from fedgen_edge.report.signatures import MIN_DIFFERENCE, name_some
from fedgen_edge.report.summary import GLOBAL, LOCAL, PERSONAL, RunFiles, summarize_models
from fedgen_edge.runs.formatting import number

MIN_CLIENT_SHARE = (
    0.25  # fraction of the clients: for fewer, losses below `MIN_DIFFERENCE` may be accidents
)


def alone_is_better(run: RunFiles) -> str | None:
    """local-only beats the federation's best model."""
    percents = [_get_percent_below_local(run, model) for model in (GLOBAL, PERSONAL)]
    best = max((percent for percent in percents if not math.isnan(percent)), default=0.0)
    return f"The best mean is {-best:.1f} % above local-only's." if best < -MIN_DIFFERENCE else None


def alone_beats_global(run: RunFiles) -> str | None:
    """local-only beats the global adapter, not the personal ones."""
    global_percent, personal_percent = (
        _get_percent_below_local(run, GLOBAL),
        _get_percent_below_local(run, PERSONAL),
    )
    if not (global_percent < -MIN_DIFFERENCE and personal_percent > 0):
        return None
    return (
        f"Mean test {run.measure.name} with the global adapter is {-global_percent:.1f} % above "
        f"local-only's; with personal ones, {personal_percent:.1f} % below it."
    )


def some_better_alone(run: RunFiles) -> str | None:
    """local-only beats the best model of some clients, clearly or for many of them."""
    local_gains = [gain for gain in gains(run) if gain.reference == LOCAL and not gain.newcomers]
    best = next(
        (gain for gain in local_gains if gain.model == PERSONAL),
        local_gains[0] if local_gains else None,
    )
    if best is None or alone_is_better(run):
        return None
    losses = {c: -gain for c, gain in best.gain_by_client.items() if not gain >= -MIN_GAIN}
    if not any(loss > MIN_DIFFERENCE for loss in losses.values()) and len(
        losses
    ) < MIN_CLIENT_SHARE * len(best.gain_by_client):
        return None
    clients = [f"{client} ({number(loss)} % worse)" for client, loss in losses.items()]
    return (
        f"{len(losses)} of {len(best.gain_by_client)} with their {best.model} adapter: "
        f"{name_some(clients)}."
    )


def _get_percent_below_local(run: RunFiles, model: str) -> float:
    """Return the percent by which a model's mean lies below local-only's; nan without one."""
    return next((row.over_local for row in summarize_models(run) if row.model == model), math.nan)
