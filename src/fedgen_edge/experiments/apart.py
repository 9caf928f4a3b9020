"""How far samples lie from real pictures, model by model."""

import math
from dataclasses import dataclass
from statistics import fmean

from fedgen_edge.experiments.summary import RunFiles

OVERLAP = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class DistanceRow:
    """One model's samples against real pictures; nan where there is nothing to say."""

    model: str
    pooled: float
    """Frechet distance of all clients' samples together."""
    own: float
    """Mean over clients of the distance to their own pictures."""
    worst_client: str
    worst: float
    kernel: tuple[float, float, float]
    """Kernel distance, and the ends of its 95 % interval."""
    precision: float
    recall: float
    density: float
    coverage: float
    diversity: float
    """How far two samples of a class lie apart, over how far two real pictures do: mean of the
    classes."""
    misplaced: float
    """Share of the samples that would have to be of other classes for the classes' shares to be
    those of real pictures."""


def distances(run: RunFiles) -> list[DistanceRow]:
    """Samples against real pictures, a row a model, over the clients that took part."""
    found = []
    for whole in (row for row in run.distances if row["client"] is None):
        mine = [row for row in run.distances if row["model"] == whole["model"]]
        told = [r for r in mine if r.get("participated") and r["frechet"] is not None]
        own = {r["client"]: r["frechet"] for r in told}
        worst = max(own, key=lambda c: own[c], default="")
        diverse = [v for v in whole.get("diversity", {}).values() if not math.isnan(v)]
        shares, real = whole.get("shares", {}), whole.get("real_shares", {})
        found.append(
            DistanceRow(
                model=whole["model"],
                pooled=math.nan if whole["frechet"] is None else whole["frechet"],
                own=fmean(own.values()) if own else math.nan,
                worst_client=worst,
                worst=own.get(worst, math.nan),
                kernel=tuple(whole.get("kernel", (math.nan,) * 3)),
                **{k: whole.get(k, math.nan) for k in OVERLAP},
                diversity=fmean(diverse) if diverse else math.nan,
                misplaced=sum(abs(shares[c] - real[c]) for c in shares) / 2,
            )
        )
    return found
