import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from fedgen_edge.config import Settings, from_table
from fedgen_edge.errors import ConfigError
from fedgen_edge.image_metrics.distances import frechet, kernel_distance, moments, overlap
from fedgen_edge.image_metrics.features import pixels
from fedgen_edge.report.sample_distances import distances
from fedgen_edge.report.summary import read
from fedgen_edge.runs import judge, records
from fedgen_edge.runs.build import build
from fedgen_edge.runs.judge import make_evaluator
from fedgen_edge.runs.models import find_model_folder, reopen
from fedgen_edge.runs.run import create, proceed
from fedgen_edge.seeds import seed
from fedgen_edge.tasks.task import ImageTask

TABLE: dict[str, Any] = {
    "task": "gan",
    "backbone": {"path": "tiny"},
    "adapter": {"rank": 4},
    "data": {"source": "digits", "limit": 300, "test": 0.3},
    "partition": {"by": "dirichlet", "alpha": 0.5, "minimum": 20},
    "federation": {"clients": 3, "rounds": 1, "seed": 4},
    "training": {"steps": 2, "batch": 4, "lr": 1e-2},
    "personal": {"epochs": 1, "steps": 2},
    "evaluation": {"baselines": ["fedavg-full"], "sample_images": 0},
    "image_metrics": {"features": "pixels", "samples": 240},
}
MODELS = ["backbone", "fedavg-full", "global", "personal"]


def settings(**change: Any) -> Settings:
    return from_table({**TABLE, **change})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "run"
    for _ in proceed(create(settings(), out), out):
        pass
    return out


def test_there_is_a_line_a_model_and_client_and_one_of_all(run: Path) -> None:
    lines = records.lines(run / "distances.jsonl")
    names = [row["client"] for row in records.read_json(run / "clients.json")]
    assert [(r["model"], r["client"]) for r in lines] == [
        (model, name) for model in MODELS for name in (*names, None)
    ]
    for at in range(0, len(lines), len(names) + 1):
        *own, whole = lines[at : at + len(names) + 1]
        assert whole["made"] == sum(row["made"] for row in own)
        # shares are rounded up
        assert 0 <= whole["made"] - 240 < len(names)


def test_the_numbers_are_those_of_the_samples_of_every_clients_own_model(run: Path) -> None:
    experiment = reopen(run)
    told, task, corpus = make_evaluator(experiment, run), experiment.task, experiment.corpus
    assert isinstance(task, ImageTask)
    made, real = [], []
    for client, (name, own) in enumerate(zip(experiment.names, experiment.holdings, strict=True)):
        adapter = task.model.load(find_model_folder(run, name))
        assert corpus.labels is not None
        classes = [int(corpus.labels[i]) for i in own.test]
        asked = told.requested_labels[client]
        # every class as often as the client's test pictures have it, to within one picture
        share = len(asked) / len(classes)
        for c in set(classes):
            assert abs(asked.count(c) - share * classes.count(c)) <= share + 1
        drawn = task.generate(
            adapter, asked, seed(4, "judge", client), experiment.settings.evaluation
        )
        made.append(pixels(drawn))
        real.append(pixels(corpus.examples.pixels[list(own.test)]))  # pyright: ignore
    lines = [r for r in records.lines(run / "distances.jsonl") if r["model"] == "personal"]
    for row, mine, theirs in zip(lines, made, real, strict=False):
        assert row["frechet"] == pytest.approx(frechet(moments(mine), moments(theirs)), rel=1e-6)
    whole = lines[-1]
    all_made, all_real = torch.cat(made), torch.cat(real)
    assert whole["frechet"] == pytest.approx(
        frechet(moments(all_made), moments(all_real)), rel=1e-6
    )
    assert whole["kernel"] == pytest.approx(kernel_distance(all_made, all_real, 4))
    expected = overlap(all_real, all_made)._asdict()
    assert {k: whole[k] for k in expected} == pytest.approx(expected)


def test_what_is_judged_is_not_judged_again(run: Path) -> None:
    log = run / "distances.jsonl"
    before = records.lines(log)
    # stopped within the second model: its first lines count for nothing
    records.write_lines(log, before[:6])
    for _ in proceed(reopen(run), run):
        pass
    assert [_timeless(row) for row in records.lines(log)] == [_timeless(row) for row in before]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "seconds"}


def test_what_is_kept_of_clients_is_in_their_proportions(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "MAX_FEATURES", 60)
    told = make_evaluator(reopen(run), run)
    sizes = [len(labels) for labels in told.labels]
    kept = [len(told.make_test_sample(client).features) for client in range(3)]
    assert kept == [math.ceil(60 * size / sum(sizes)) for size in sizes]
    # sums are of all pictures, whatever is kept
    assert told.pooled_test_sample.pooled_moments.count == sum(sizes)


def test_clients_who_never_trained_are_not_in_what_all_have_made(tmp_path: Path) -> None:
    table = {**TABLE["federation"], "clients": 4, "unseen_clients": 1}
    out = tmp_path / "run"
    for _ in proceed(create(settings(federation=table), out), out):
        pass
    *own, whole = records.lines(out / "distances.jsonl")[:5]
    assert [row["participated"] for row in own] == [True, True, True, False]
    assert whole["real"] == sum(row["real"] for row in own[:3])
    (first, *_) = distances(read(out))
    assert first.own == pytest.approx(fmean(row["frechet"] for row in own[:3]))


def test_few_samples_for_many_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_metrics.samples=10 must be at least 12"):
        build(
            settings(
                federation={"clients": 6, "rounds": 1},
                partition={"by": "iid"},
                image_metrics={"features": "pixels", "samples": 10},
            )
        )


def test_a_model_of_text_is_not_judged_by_pictures() -> None:
    told = settings(task="language", data={}, partition={}, evaluation={})
    with pytest.raises(ConfigError, match=r"image_metrics.features='pixels' sees pictures"):
        build(told)


def test_eyes_without_weights_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"image_metrics.weights is missing"):
        build(settings(image_metrics={"features": "resnet56"}))
