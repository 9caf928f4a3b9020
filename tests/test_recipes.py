"""The digits' recipes, whole: what federation and personalisation are worth, seen by samples.

Five seeds each; a seed draws another partition, other cohorts and other noise. The pretrained
backbone is one, of seed 0.
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from fedgen_edge.config import Settings, load
from fedgen_edge.report.summary import paired_interval
from fedgen_edge.runs import pretrain, records
from fedgen_edge.runs.run import create, proceed

RECIPES = Path(__file__).parents[1] / "recipes"
SEEDS = range(5)


def own_distances(run: Path) -> dict[str, float]:
    """Mean over clients of each model's distance to the client's own test pictures."""
    found: dict[str, list[float]] = {}
    for row in records.lines(run / "distances.jsonl"):
        if row["client"] is not None:
            found.setdefault(row["model"], []).append(row["frechet"])
    return {model: fmean(each) for model, each in found.items()}


def carried_out(settings: Settings, out: Path) -> dict[str, float]:
    for _ in proceed(create(settings, out), out):
        pass
    return own_distances(out)


@pytest.mark.parametrize("task", ["diffusion", "gan", "vae"])
def test_samples_come_nearer_by_federation_and_nearer_still_by_tuning(
    task: str, tmp_path: Path
) -> None:
    recipe = load(RECIPES / f"digits-{task}.toml")
    made = tmp_path / "backbone"
    for _ in pretrain.train(pretrain.begin(recipe, made), made):
        pass
    recipe = replace(recipe, backbone=replace(recipe.backbone, path=str(made)))
    found = [
        carried_out(
            replace(recipe, federation=replace(recipe.federation, seed=seed)), tmp_path / str(seed)
        )
        for seed in SEEDS
    ]
    federated = paired_interval([each["backbone"] - each["global"] for each in found])
    tuned = paired_interval([each["global"] - each["personal"] for each in found])
    assert federated[1] > 0, f"the global adapter against the backbone: {federated}"
    assert tuned[1] > 0, f"personal adapters against the global one: {tuned}"
