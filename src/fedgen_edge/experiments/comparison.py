"""Several runs side by side: groups that differ in their seed, and differences between them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedgen_edge.experiments import plots, summary
from fedgen_edge.experiments.called import noted
from fedgen_edge.experiments.diagnose import diagnose
from fedgen_edge.experiments.gains import PAIRS
from fedgen_edge.experiments.summary import (
    GLOBAL,
    PERSONAL,
    Number,
    RunFiles,
    by_model,
    number,
)

SEED = "federation.seed"
ASIDE = (SEED, "engine.", "evaluation.keep", "evaluation.target")
"""Settings that make no other experiment: the seed, and how the machine carries it out."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    settings: dict[str, str]
    """Those in which the groups differ."""
    runs: list[RunFiles]


def grouped(runs: Sequence[RunFiles]) -> list[Group]:
    """Runs by the settings that differ between them, the seed aside."""
    names = sorted({n for run in runs for n in run.settings if not n.startswith(ASIDE)})
    told = [
        {name: json.dumps(run.settings.get(name)) for name in names}
        | {name: text for name, text in summary.describe_changes(run).items() if name in names}
        for run in runs
    ]
    differ = [name for name in names if len({each[name] for each in told}) > 1]
    found: dict[tuple[str, ...], list[RunFiles]] = {}
    for run, each in zip(runs, told, strict=True):
        found.setdefault(tuple(each[name].strip('"') for name in differ), []).append(run)
    names_of = _run_names(runs)
    return [
        Group(
            _label([names_of[run.folder] for run in same]),
            dict(zip(differ, values, strict=True)),
            same,
        )
        for values, same in found.items()
    ]


def _run_names(runs: Sequence[RunFiles]) -> dict[Path, str]:
    """Each run's folder, with as much of its path as tells it from the others."""
    folders = list(dict.fromkeys(run.folder for run in runs))
    parts = [folder.resolve().parts for folder in folders]
    most = max(map(len, parts))
    enough = (n for n in range(1, most + 1) if len({own[-n:] for own in parts}) == len({*parts}))
    length = next(enough, most)
    return {folder: "/".join(own[-length:]) for folder, own in zip(folders, parts, strict=True)}


def _label(names: Sequence[str]) -> str:
    """What a group is called: its first run, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


def compared(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What the page of several runs shows."""
    groups = grouped(runs)
    models = list(dict.fromkeys(m for run in runs for m in by_model(run)))
    rows = [_group_row(group, groups[0], models) for group in groups]
    differ, names = list(groups[0].settings), _run_names(runs)
    apart = [n for n in differ if n.split(".")[0] in {"data", "partition", "backbone"}]
    return {
        "kind": "comparison",
        "title": f"{len(runs)} runs compared",
        "headline": f"Groups compared: {len(groups)}. {_lowest(rows, models)}",
        "note": noted([(group.label, run) for group in groups for run in group.runs]),
        "measure": runs[0].measure,
        "differ": [(name, [group.settings[name] for group in groups]) for name in differ],
        "apart": apart,
        "models": models,
        "pairs": PAIRS,
        "groups": rows,
        "runs": [(names[run.folder], run, diagnose(run)) for run in runs],
        "pictures": plots.overlay({group.label: group.runs for group in groups}),
    }


def _lowest(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    means = [
        (cell["mean"], model, row["label"])
        for row in rows
        for model, cell in zip(models, row["means"], strict=True)
        if cell
    ]
    mean, model, label = min(means, default=(math.nan, "", ""))
    return f"Lowest mean: {number(mean)} ({model}, {label})." if means else ""


def _group_row(group: Group, first: Group, models: Sequence[str]) -> dict[str, Any]:
    means = [{row.model: row.mean for row in summary.judged(run)} for run in group.runs]
    sent = [summary.uplink(run) for run in group.runs]
    return {
        "label": group.label,
        "seeds": [run.settings.get(SEED) for run in group.runs],
        "means": [_interval([m[model] for m in means if model in m]) for model in models],
        "within": [_interval([_gap(run, run, *pair) for run in group.runs]) for pair in PAIRS],
        "against": [_interval(_against(group, first, model)) for model in (GLOBAL, PERSONAL)],
        "up": fmean(each.up for each in sent),
        "saving": fmean(each.saving for each in sent),
    }


def _gap(run: RunFiles, other: RunFiles, model: str, reference: str) -> float:
    ours, theirs = summary.shared(run), summary.shared(other)
    return summary.difference(run.measure, ours.get(model, {}), theirs.get(reference, {}))


def _against(group: Group, first: Group, model: str) -> list[float]:
    """Differences from the first group, seed by seed."""
    others = {run.settings.get(SEED): run for run in first.runs}
    pairs = [(run, others.get(run.settings.get(SEED))) for run in group.runs if group is not first]
    return [_gap(run, other, model, model) for run, other in pairs if other]


def _interval(values: Sequence[Number]) -> dict[str, Any] | None:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean, low, high = summary.paired_interval(finite)
    known, sure = math.isfinite(low), low > 0 or high < 0
    return {"mean": mean, "low": low, "high": high, "known": known, "sure": sure}
