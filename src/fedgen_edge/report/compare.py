"""Compare several runs: group those that differ only in their seed, and compare the groups."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedgen_edge.report import plots, summary
from fedgen_edge.report.diagnose import diagnose
from fedgen_edge.report.gains import MODEL_PAIRS
from fedgen_edge.report.summary import GLOBAL, PERSONAL, Number, RunFiles, by_model
from fedgen_edge.report.wording import explain_global
from fedgen_edge.runs.formatting import number

SEED = "federation.seed"
IGNORED_SETTINGS = (SEED, "engine.", "checkpoints.keep", "evaluation.target")
"""Settings that do not change the experiment: the seed, and how the machine computes."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    settings: dict[str, str]
    """The settings in which the groups differ."""
    runs: list[RunFiles]


def group_runs(runs: Sequence[RunFiles]) -> list[Group]:
    """Group runs by the settings that differ between them, except the seed."""
    names = sorted({n for run in runs for n in run.settings if not n.startswith(IGNORED_SETTINGS)})
    settings_by_run = [
        {name: json.dumps(run.settings.get(name)) for name in names}
        | {name: text for name, text in summary.describe_changes(run).items() if name in names}
        for run in runs
    ]
    varied = [name for name in names if len({each[name] for each in settings_by_run}) > 1]
    runs_by_values: dict[tuple[str, ...], list[RunFiles]] = {}
    for run, run_settings in zip(runs, settings_by_run, strict=True):
        runs_by_values.setdefault(
            tuple(run_settings[name].strip('"') for name in varied), []
        ).append(run)
    names_of = _run_names(runs)
    return [
        Group(
            _make_label([names_of[run.folder] for run in same]),
            dict(zip(varied, values, strict=True)),
            same,
        )
        for values, same in runs_by_values.items()
    ]


def _run_names(runs: Sequence[RunFiles]) -> dict[Path, str]:
    """Return each run's shortest unique name, from the end of its path."""
    folders = list(dict.fromkeys(run.folder for run in runs))
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    lengths = (
        n for n in range(1, longest + 1) if len({own[-n:] for own in parts}) == len({*parts})
    )
    length = next(lengths, longest)
    return {folder: "/".join(own[-length:]) for folder, own in zip(folders, parts, strict=True)}


def _make_label(names: Sequence[str]) -> str:
    """Return a group's label: its first run, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


def make_comparison_page(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return the content of the page of several runs."""
    groups = group_runs(runs)
    models = list(dict.fromkeys(m for run in runs for m in by_model(run)))
    rows = [_make_group_row(group, groups[0], models) for group in groups]
    varied, names = list(groups[0].settings), _run_names(runs)
    data_settings = [n for n in varied if n.split(".")[0] in {"data", "partition", "backbone"}]
    return {
        "kind": "comparison",
        "title": f"{len(runs)} runs compared",
        "headline": f"Groups compared: {len(groups)}. {_describe_lowest(rows, models)}",
        "note": explain_global([(group.label, run) for group in groups for run in group.runs]),
        "measure": runs[0].measure,
        "differ": [(name, [group.settings[name] for group in groups]) for name in varied],
        "apart": data_settings,
        "models": models,
        "pairs": MODEL_PAIRS,
        "groups": rows,
        "runs": [(names[run.folder], run, diagnose(run)) for run in runs],
        "pictures": plots.overlay({group.label: group.runs for group in groups}),
    }


def _describe_lowest(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    means = [
        (cell["mean"], model, row["label"])
        for row in rows
        for model, cell in zip(models, row["means"], strict=True)
        if cell
    ]
    mean, model, label = min(means, default=(math.nan, "", ""))
    return f"Lowest mean: {number(mean)} ({model}, {label})." if means else ""


def _make_group_row(group: Group, first: Group, models: Sequence[str]) -> dict[str, Any]:
    means = [{row.model: row.mean for row in summary.summarize_models(run)} for run in group.runs]
    uplinks = [summary.uplink(run) for run in group.runs]
    return {
        "label": group.label,
        "seeds": [run.settings.get(SEED) for run in group.runs],
        "means": [_make_interval([m[model] for m in means if model in m]) for model in models],
        "within": [
            _make_interval([_get_difference(run, run, *pair) for run in group.runs])
            for pair in MODEL_PAIRS
        ],
        "against": [
            _make_interval(_list_differences(group, first, model)) for model in (GLOBAL, PERSONAL)
        ],
        "up": fmean(each.up for each in uplinks),
        "saving": fmean(each.saving for each in uplinks),
    }


def _get_difference(run: RunFiles, other: RunFiles, model: str, reference: str) -> float:
    model_rows, reference_rows = summary.select_common_rows(run), summary.select_common_rows(other)
    return summary.difference(
        run.measure, model_rows.get(model, {}), reference_rows.get(reference, {})
    )


def _list_differences(group: Group, first: Group, model: str) -> list[float]:
    """List the differences from the first group, seed by seed."""
    first_by_seed = {run.settings.get(SEED): run for run in first.runs}
    pairs = [
        (run, first_by_seed.get(run.settings.get(SEED))) for run in group.runs if group is not first
    ]
    return [_get_difference(run, other, model, model) for run, other in pairs if other]


def _make_interval(values: Sequence[Number]) -> dict[str, Any] | None:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean, low, high = summary.paired_interval(finite)
    has_interval, is_significant = math.isfinite(low), low > 0 or high < 0
    return {"mean": mean, "low": low, "high": high, "known": has_interval, "sure": is_significant}
