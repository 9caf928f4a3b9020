"""Compare settings of a recipe on validation text; no trial ever sees a test example.

    python paper/tune.py paper/quickstart-tuning.toml

Writes `paper/results/NAME.jsonl`, a line for every trial, seed and model, and `NAME.md` from it.
"""

import argparse
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fedgen_edge.federation.rounds import rounds
from fedgen_edge.hardware import steady_allocations
from fedgen_edge.runs.build import Experiment, build, with_method
from fedgen_edge.runs.records import lines, write_lines
from fedgen_edge.types import Order, ServerState
from items import of_recipe
from kept import RESULTS


def trained(experiment: Experiment) -> tuple[ServerState, float]:
    """The last state, and the mean over clients of validation perplexity."""
    state = experiment.start()
    plan = experiment.settings.federation
    for done in rounds(state, experiment.algorithm, experiment.engine, experiment.train, plan):
        state = done.state
    held = experiment.validation(state)["clients"]
    return state, fmean(experiment.task.measure.compute(loss, 1) for loss in held.values())


def models(experiment: Experiment) -> Iterator[tuple[str, float]]:
    """The trial's models, with the mean over clients of validation perplexity."""
    state, found = trained(experiment)
    yield "global", found
    orders = [Order((c,), state.round, state.adapter) for c in range(len(experiment.holdings))]
    tuned = experiment.engine(orders, experiment.tune)
    best = [own.history[own.chosen] for own in tuned]
    yield "personal", fmean(experiment.task.measure.compute(loss, 1) for loss in best)
    for name in experiment.settings.evaluation.baselines:
        yield name, trained(with_method(experiment, name))[1]


def attempt(told: dict[str, Any], trial: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """One trial's lines."""
    claim = {"recipe": told["recipe"], "overrides": trial}
    settings = of_recipe(claim)
    settings = replace(settings, federation=replace(settings.federation, seed=seed))
    for model, found in models(build(settings)):
        print(trial, seed, model, round(found, 2), flush=True)
        yield {"trial": trial, "seed": seed, "model": model, "perplexity": found}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean validation perplexity over seeds, a row a trial."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    out = [f"Mean validation perplexity over clients, seeds {', '.join(map(str, seeds))}.", ""]
    out += [f"| trial | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for trial in dict.fromkeys(str(row["trial"]) for row in rows):
        own = [row for row in rows if str(row["trial"]) == trial]
        cells = [fmean(r["perplexity"] for r in own if r["model"] == name) for name in names]
        out.append(f"| `{trial}` | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", type=Path)
    path = parser.parse_args().trials
    steady_allocations()
    told = tomllib.loads(path.read_text())
    made = [
        row
        for trial in told["trials"]
        for seed in told["seeds"]
        for row in attempt(told, trial, seed)
    ]
    target = RESULTS / f"{path.stem}.jsonl"
    write_lines(target, made)
    target.with_suffix(".md").write_text(table(lines(target)))
    print(table(made))


if __name__ == "__main__":
    main()
