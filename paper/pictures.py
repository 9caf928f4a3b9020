"""Keep the records of finished runs on pictures, a seed each, and make their table.

    fedgen run recipes/cifar10-vae.toml --data.path CIFAR10 --judging.weights RESNET56 --out RUN
    python paper/pictures.py cifar10-vae RUN...

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
from fedgen_edge.experiments.records import lines, write_lines
from fedgen_edge.experiments.summary import (
    GLOBAL,
    PERSONAL,
    RunFiles,
    distances,
    judged,
    number,
    paired_interval,
    read,
    size,
)

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def records(run: RunFiles) -> list[Row]:
    """What a run says of each model: distances, held-out loss, bytes and seconds."""
    if not run.facts.get("finished") or not run.distances:
        raise CheckpointError(f"{run.folder} is not finished, or was not judged by samples")
    told = next(row for row in run.distances if row["client"] is None)
    setting = run.settings
    facts = {
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
    held_out = {row.model: row.mean for row in judged(run)}
    return [
        {**facts, **asdict(row), "held_out": held_out[row.model], **_cost(run, row.model)}
        for row in distances(run)
    ]


def _cost(run: RunFiles, model: str) -> Row:
    """Bytes that clients sent, and seconds of training, for one model."""
    rounds = run.baselines.get(model, run.rounds if model in {GLOBAL, PERSONAL} else [])
    tuning = run.facts["seconds"]["personal"] if model == PERSONAL else 0
    return {
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "seconds": round(sum(row["seconds"] for row in rounds) + tuning, 1),
    }


def table(name: str, rows: Sequence[Row]) -> str:
    """The table in Markdown, from the records alone."""
    first, seeds = rows[0], sorted({row["seed"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns: dict[str, Callable[[Row], float]] = {
        f"{first['distance']}, all": lambda r: r["pooled"],
        "KID x 1000": lambda r: 1000 * r["kernel"][0],
        f"{first['distance']}, mean of clients": lambda r: r["own"],
        "recall": lambda r: r["recall"],
        "diversity": lambda r: r["diversity"],
        first["measure"]: lambda r: r["held_out"],
    }
    out = [
        f"Recipe `recipes/{name}.toml`, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}; {first['hardware']}, {first['threads']} thread(s), torch "
        f"{first['torch']}. {first['clients']} clients, Dirichlet({first['alpha']}), "
        f"{first['cohort']} a round, {first['rounds']} rounds of {first['steps']} steps of "
        f"{first['batch']} pictures; {first['parameters']:,} weights, of which the adapter has "
        f"{first['adapter_parameters']:,}. n = {first['made']:,} samples of each model against "
        f"{first['real']:,} test pictures; two halves of those lie {number(first['floor'])} apart.",
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


def main() -> None:
    """Read the runs that are named, write their records and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help="of the recipe")
    parser.add_argument("runs", nargs="*", type=Path, help="finished; none makes the table again")
    told = parser.parse_args()
    if told.runs:
        found = [row for run in told.runs for row in records(read(run))]
        write_lines(RESULTS / f"{told.name}.jsonl", found)
    made = table(told.name, lines(RESULTS / f"{told.name}.jsonl"))
    (RESULTS / f"{told.name}.md").write_text(made + "\n")
    print(made)


if __name__ == "__main__":
    main()
