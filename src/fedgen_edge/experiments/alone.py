"""Do clients do better alone than with the federation?"""

import math

from fedgen_edge.experiments.checks import REAL, name_some
from fedgen_edge.experiments.gains import ROUNDING, gains
from fedgen_edge.experiments.summary import GLOBAL, LOCAL, PERSONAL, RunFiles, judged, number

MANY = 0.25  # share of the clients: of fewer, losses below `REAL` may be accidents


def alone_is_better(run: RunFiles) -> str | None:
    """local-only beats the best that the federation has."""
    known = [_below_local(run, model) for model in (GLOBAL, PERSONAL)]
    best = max((percent for percent in known if not math.isnan(percent)), default=0.0)
    return f"The best mean is {-best:.1f} % above local-only's." if best < -REAL else None


def alone_beats_global(run: RunFiles) -> str | None:
    """local-only beats the global adapter, not the personal ones."""
    together, own = _below_local(run, GLOBAL), _below_local(run, PERSONAL)
    if not (together < -REAL and own > 0):
        return None
    return (
        f"Mean test {run.measure.name} with the global adapter is {-together:.1f} % above "
        f"local-only's; with personal ones, {own:.1f} % below it."
    )


def better_alone(run: RunFiles) -> str | None:
    """local-only beats the best that some clients have, clearly or for many of them."""
    models = [gain for gain in gains(run) if gain.reference == LOCAL and not gain.newcomers]
    best = next((gain for gain in models if gain.model == PERSONAL), models[0] if models else None)
    if best is None or alone_is_better(run):
        return None
    lost = {c: -gain for c, gain in best.each.items() if not gain >= -ROUNDING}
    if not any(loss > REAL for loss in lost.values()) and len(lost) < MANY * len(best.each):
        return None
    clients = [f"{client} ({number(loss)} % worse)" for client, loss in lost.items()]
    return f"{len(lost)} of {len(best.each)} with their {best.model} adapter: {name_some(clients)}."


def _below_local(run: RunFiles, model: str) -> float:
    """Percent by which a model's mean lies below local-only's; nan without one."""
    return next((row.over_local for row in judged(run) if row.model == model), math.nan)
