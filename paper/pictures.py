"""Keep the records of finished runs on pictures, a seed each, and make their table.

    fedgen run recipes/cifar10-vae.toml --data.path CIFAR10 --judging.weights RESNET56 --out RUN
    python paper/pictures.py cifar10-vae RUN...
    python paper/pictures.py cifar10-gan-skew --recipe cifar10-gan fedavg=RUN layerwise=RUN

The second way is for runs of several methods; all but the first add their own models alone.
Writes `paper/results/NAME.jsonl`, a line for every seed and model, and `paper/results/NAME.md`, the
table made from it alone.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from fedgen_edge.errors import CheckpointError
from fedgen_edge.report.sample_distances import distances
from fedgen_edge.report.summary import (
    BACKBONE,
    GLOBAL,
    PERSONAL,
    RunFiles,
    paired_interval,
    read,
    summarize_models,
)
from fedgen_edge.runs.formatting import number, size
from fedgen_edge.runs.records import lines, write_lines

OWN = (GLOBAL, PERSONAL)
"""Models of a run's own method."""
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def records(run: RunFiles, recipe: str, label: str = "") -> list[Row]:
    """What a run says of each model: distances, held-out loss, bytes and seconds.

    Args:
        run: finished.
        recipe: that it began from.
        label: of the run, said before the models that it made.
    """
    if not run.facts.get("finished") or not run.distances:
        raise CheckpointError(f"{run.folder} is not finished, or was not judged by samples")
    told = next(row for row in run.distances if row["client"] is None)
    setting = run.settings
    unseen = setting["data.unseen"]
    by_class = {
        row["model"]: (
            fmean(d for k, d in row["classes"].items() if k not in unseen),
            fmean(d for k, d in row["classes"].items() if k in unseen),
        )
        for row in run.distances
        if row["client"] is None
    }
    facts = {
        "recipe": recipe,
        "unseen": list(unseen),
        "seed": setting["federation.seed"],
        "hardware": run.facts["hardware"],
        "threads": run.facts["threads"],
        "torch": run.facts["torch"],
        "backbone_sha256": run.facts["backbone"]["sha256"],
        "adapter_parameters": run.facts["adapter_parameters"],
        "parameters": run.facts["backbone"]["parameters"],
        **{k: told.get(k) for k in ("distance", "made", "real", "floor")},
        "measure": run.measure.name,
        **{k: setting[f"federation.{k}"] for k in ("clients", "cohort", "rounds")},
        **{k: setting[f"training.{k}"] for k in ("steps", "batch", "lr")},
        "alpha": setting["partition.alpha"],
        "sample_steps": setting["evaluation.sample_steps"],
    }
    held_out = {row.model: row.mean for row in summarize_models(run)}
    return [
        {
            **facts,
            **asdict(row),
            **dict(zip(("seen_classes", "unseen_classes"), by_class[row.model], strict=True)),
            "held_out": held_out[row.model],
            **_cost(run, row.model),
            "model": f"{label}, {row.model}" if label and row.model in OWN else row.model,
        }
        for row in distances(run)
    ]


def _cost(run: RunFiles, model: str) -> Row:
    """Bytes that clients sent, and seconds of training, for one model."""
    rounds = run.baselines.get(model, run.rounds if model in OWN else [])
    tuning = run.facts["seconds"]["personal"] if model == PERSONAL else 0
    return {
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "seconds": round(sum(row["seconds"] for row in rounds) + tuning, 1),
    }


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown, from the records alone."""
    first, seeds = rows[0], sorted({row["seed"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns: dict[str, Callable[[Row], float]] = {
        f"{first['distance']}, all": lambda r: r["pooled"],
        "KID x 1000": lambda r: 1000 * r["kernel"][0],
        f"{first['distance']}, mean of clients": lambda r: r["own"],
        "classes that the backbone knows": lambda r: r["seen_classes"],
        "that it never saw": lambda r: r["unseen_classes"],
        "recall": lambda r: r["recall"],
        "diversity": lambda r: r["diversity"],
        first["measure"]: lambda r: r["held_out"],
    }
    out = [
        f"Recipe `recipes/{first['recipe']}.toml`, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}; {first['hardware']}, {first['threads']} thread(s), torch "
        f"{first['torch']}. {first['clients']} clients, Dirichlet({first['alpha']}), "
        f"{first['cohort']} a round, {first['rounds']} rounds of {first['steps']} steps of "
        f"{first['batch']} pictures; {first['parameters']:,} weights, of which the adapter has "
        f"{first['adapter_parameters']:,}. n = {first['made']:,} samples of each model against "
        f"{first['real']:,} test pictures; two halves of those lie {number(first['floor'])} apart. "
        f"Distances of classes are means over them; never seen: {', '.join(first['unseen'])}.",
        "",
        f"| model | {' | '.join(columns)} | sent by clients | seconds of training |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for model in models:
        own = [row for row in rows if row["model"] == model]
        cells = [_cell([get(row) for row in own]) for get in columns.values()]
        sent, spent = (fmean(row[k] for row in own) for k in ("bytes_up", "seconds"))
        out.append(f"| {model} | {' | '.join(cells)} | {size(sent)} | {spent:.0f} |")
    return "\n".join(out)


def _cell(values: Sequence[float]) -> str:
    mean, low, _ = paired_interval(values)
    return number(mean) if len(values) == 1 else f"{number(mean)} ± {number(mean - low)}"


def _is_common(row: Row) -> bool:
    """Whether the model is the same in every run."""
    return row["model"] == BACKBONE


def _all(runs: Sequence[str], recipe: str) -> list[Row]:
    found: list[Row] = []
    for told in runs:
        label, _, folder = told.rpartition("=")
        rows = records(read(Path(folder)), recipe, label)
        found += [row for row in rows if not (label and found and _is_common(row))]
    return found


def main() -> None:
    """Read the runs that are named, write their records and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help="of the table")
    parser.add_argument("runs", nargs="*", help="finished; none makes the table again")
    parser.add_argument("--recipe", help="that the runs began from; none is NAME")
    told = parser.parse_intermixed_args()
    if told.runs:
        write_lines(RESULTS / f"{told.name}.jsonl", _all(told.runs, told.recipe or told.name))
    made = table(lines(RESULTS / f"{told.name}.jsonl"))
    (RESULTS / f"{told.name}.md").write_text(made + "\n")
    print(made)


if __name__ == "__main__":
    main()
