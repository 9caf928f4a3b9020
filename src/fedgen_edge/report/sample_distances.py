"""Distances of samples from real images, model by model."""

import math
from dataclasses import dataclass
from statistics import fmean

from fedgen_edge.report.summary import RunFiles

OVERLAP = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class DistanceRow:
    """One model's samples against real images; nan if unknown."""

    model: str
    pooled: float
    """Frechet distance of all clients' samples together."""
    own: float
    """Mean over clients of the distance to their own images."""
    worst_client: str
    worst: float
    kernel: tuple[float, float, float]
    """Kernel distance, and the ends of its 95 % interval."""
    precision: float
    recall: float
    density: float
    coverage: float
    diversity: float
    """Mean distance of two samples of a class, over that of two real images; mean over classes."""
    misplaced: float
    """Fraction of the samples that would have to change class for the classes' shares to be those
    of real images."""


def distances(run: RunFiles) -> list[DistanceRow]:
    """Return one row per model of samples against real images, over participating clients."""
    distance_rows = []
    for pooled_row in (row for row in run.distances if row["client"] is None):
        model_rows = [row for row in run.distances if row["model"] == pooled_row["model"]]
        client_rows = [r for r in model_rows if r.get("participated") and r["frechet"] is not None]
        distance_by_client = {r["client"]: r["frechet"] for r in client_rows}
        worst = max(distance_by_client, key=lambda c: distance_by_client[c], default="")
        diversities = [v for v in pooled_row.get("diversity", {}).values() if not math.isnan(v)]
        shares, real_shares = pooled_row.get("shares", {}), pooled_row.get("real_shares", {})
        distance_rows.append(
            DistanceRow(
                model=pooled_row["model"],
                pooled=math.nan if pooled_row["frechet"] is None else pooled_row["frechet"],
                own=fmean(distance_by_client.values()) if distance_by_client else math.nan,
                worst_client=worst,
                worst=distance_by_client.get(worst, math.nan),
                kernel=tuple(pooled_row.get("kernel", (math.nan,) * 3)),
                **{k: pooled_row.get(k, math.nan) for k in OVERLAP},
                diversity=fmean(diversities) if diversities else math.nan,
                misplaced=sum(abs(shares[c] - real_shares[c]) for c in shares) / 2,
            )
        )
    return distance_rows
