"""Models of pictures by their samples: a line a client, and one of all clients together.

Each client's share of the samples is asked for by the classes of its test pictures, from noise that
is the same for every model, and compared with those pictures. All together are those clients that
took part: who never trained has the backbone for a local-only model.
"""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedgen_edge.data.corpus import Images
from fedgen_edge.image_metrics.distances import (
    NEIGHBORS,
    NUM_SUBSETS,
    Moments,
    collapse,
    explain_too_few,
    floor,
    frechet,
    kernel_distance,
    moments,
    overlap,
)
from fedgen_edge.image_metrics.features import Extractor, make_extractor
from fedgen_edge.runs import records
from fedgen_edge.runs.build import Experiment
from fedgen_edge.runs.evaluate import list_models, load_method_result
from fedgen_edge.runs.models import find_model_folders
from fedgen_edge.seeds import seed
from fedgen_edge.tasks.task import ImageTask
from fedgen_edge.types import Leaves

MAX_FEATURES = 5000
"""Samples of a model whose features are kept for the kernel and for nearest neighbours; of the
others only sums are, so that memory does not grow with their number."""

MIN_CLASS_IMAGES = 10
"""Pictures of a class from which its diversity can be told."""


class FeatureSample(NamedTuple):
    """Some pictures of known classes, as the features see them."""

    moments: dict[int, Moments]
    """Of each class that is there."""
    features: Tensor
    """Of some, evenly spaced: `[kept, d]`."""
    labels: Tensor
    """Their classes, `[kept]`."""

    @property
    def pooled_moments(self) -> Moments:
        """Of all classes together."""
        return reduce(add, self.moments.values())


def merge_samples(first: FeatureSample, second: FeatureSample) -> FeatureSample:
    """What two have, as one."""
    common_classes = first.moments.keys() & second.moments.keys()
    return FeatureSample(
        {
            **first.moments,
            **second.moments,
            **{c: first.moments[c] + second.moments[c] for c in common_classes},
        },
        torch.cat([first.features, second.features]),
        torch.cat([first.labels, second.labels]),
    )


@dataclass(frozen=True)
class SampleEvaluator:
    """The clients' test pictures, and how samples are held against them."""

    experiment: Experiment
    feature_extractor: Extractor
    cohort_members: Collection[str]
    """Names of the clients that some round drew."""

    @cached_property
    def participants(self) -> set[int]:
        """Clients that took part."""
        cohort_members = set(self.cohort_members)
        return {c for c, name in enumerate(self.experiment.names) if name in cohort_members}

    @cached_property
    def features(self) -> list[Tensor]:
        """Of each client's test pictures."""
        images = self.experiment.corpus.examples
        assert isinstance(images, Images)
        return [
            self.feature_extractor.extract(images.pixels[list(own.test)])
            for own in self.experiment.holdings
        ]

    def make_test_sample(self, client: int) -> FeatureSample:
        """A client's test pictures."""
        return self._make_sample(
            self.features[client], self.labels[client], self._total(self.labels)
        )

    @cached_property
    def pooled_test_sample(self) -> FeatureSample:
        """Every client's test pictures."""
        return reduce(merge_samples, map(self.make_test_sample, sorted(self.participants)))

    def _total(self, labels_per_client: Sequence[Sequence[int]]) -> int:
        return sum(len(labels_per_client[client]) for client in self.participants)

    @cached_property
    def labels(self) -> list[list[int]]:
        """Of each client's test pictures."""
        corpus = self.experiment.corpus
        assert isinstance(corpus.examples, Images)
        assert corpus.labels is not None
        numbers = {name: number for number, name in enumerate(corpus.examples.classes)}
        return [[numbers[corpus.labels[i]] for i in own.test] for own in self.experiment.holdings]

    @cached_property
    def requested_labels(self) -> list[list[int]]:
        """Classes of each client's samples: those of its test pictures, in their proportions.

        A client's share is rounded up, so that all of them are no fewer than the setting says.
        """
        total, min_samples = (
            self._total(self.labels),
            self.experiment.settings.image_metrics.samples,
        )
        counts = [max(2, math.ceil(min_samples * len(own) / total)) for own in self.labels]
        return [
            [own[i * len(own) // count] for i in range(count)]
            for own, count in zip(self.labels, counts, strict=True)
        ]

    def generate_sample(self, task: ImageTask, adapter: Leaves, client: int) -> FeatureSample:
        """A client's samples under one adapter."""
        settings, labels = self.experiment.settings, self.requested_labels[client]
        key = seed(settings.federation.seed, "judge", client)
        images = task.generate(adapter, labels, key, settings.evaluation)
        return self._make_sample(
            self.feature_extractor.extract(images), labels, self._total(self.requested_labels)
        )

    def _make_sample(self, features: Tensor, labels: Sequence[int], total: int) -> FeatureSample:
        """Of one client; what is kept of it is its share of all, so that no client weighs more."""
        numbers = torch.tensor(labels)
        kept_count = math.ceil(len(labels) * min(1, MAX_FEATURES / total))
        kept_indices = torch.linspace(0, len(labels) - 1, kept_count).long()
        groups = {c: moments(features[numbers == c]) for c in sorted(set(labels))}
        return FeatureSample(groups, features[kept_indices], numbers[kept_indices])

    def measure_distance(
        self, model: str, client: str | None, generated: FeatureSample, real: FeatureSample
    ) -> records.Line:
        """A line of distances.jsonl; what too few pictures cannot say is not there."""
        generated_moments, real_moments, key = (
            generated.pooled_moments,
            real.pooled_moments,
            self.experiment.settings.federation.seed,
        )
        smaller_count = min(generated_moments.count, real_moments.count)
        line: records.Line = {
            "model": model,
            "client": client,
            "distance": self.feature_extractor.distance_name,
            "seed": key,
            "made": generated_moments.count,
            "real": real_moments.count,
            "frechet": frechet(generated_moments, real_moments) if smaller_count > 1 else None,
            "few": explain_too_few(smaller_count, len(generated_moments.mean)),
        }
        if min(len(generated.features), len(real.features)) >= 2 * NUM_SUBSETS:
            line["kernel"] = list(kernel_distance(generated.features, real.features, key))
        if client is None and smaller_count > NEIGHBORS:
            line |= self._measure_pooled(generated, real, key)
        return line

    def _measure_pooled(
        self, generated: FeatureSample, real: FeatureSample, key: int
    ) -> dict[str, Any]:
        """What only many pictures can say."""
        names = self.experiment.settings.data.names
        known = real.labels.unique()
        of_known_class = torch.isin(generated.labels, known)
        class_indices = [
            torch.searchsorted(known, labels)
            for labels in (real.labels, generated.labels[of_known_class])
        ]
        signs = collapse(
            real.features,
            class_indices[0],
            generated.features[of_known_class],
            class_indices[1],
            len(known),
        )
        has_enough_images = [
            bool(min((labels == c).sum() for labels in class_indices) >= MIN_CLASS_IMAGES)
            for c in range(len(known))
        ]
        classes = [names[int(c)] for c in known]
        half = min(len(generated.features), len(real.features) // 2)
        half_indices = torch.linspace(0, len(real.features) - 1, 2 * half).long()
        common_classes = sorted(generated.moments.keys() & real.moments.keys())
        return {
            "floor": floor(real.features[half_indices], key),
            **overlap(real.features, generated.features)._asdict(),
            "diversity": {
                c: v
                for c, v, known in zip(classes, signs.diversity, has_enough_images, strict=True)
                if known
            },
            "shares": dict(zip(classes, signs.shares, strict=True)),
            "real_shares": dict(zip(classes, signs.real_shares, strict=True)),
            "classes": {
                names[c]: frechet(generated.moments[c], real.moments[c])
                for c in common_classes
                if min(generated.moments[c].count, real.moments[c].count) > 1
            },
        }


def make_evaluator(experiment: Experiment, run: Path) -> SampleEvaluator:
    """Of a run whose rounds are done."""
    settings = experiment.settings.image_metrics
    assert settings.features is not None
    feature_extractor = make_extractor(
        settings.features, settings.weights, experiment.clients.device
    )
    return SampleEvaluator(experiment, feature_extractor, records.list_cohort_members(run))


def judge(experiment: Experiment, run: Path) -> Iterator[str]:
    """Judge what is not judged yet, a model at a time; yields each model's name when it is."""
    log, evaluator = run / "distances.jsonl", make_evaluator(experiment, run)
    lines_per_model = len(experiment.holdings) + 1
    completed = len(records.lines(log)) // lines_per_model
    records.truncate(log, completed * lines_per_model)
    for model in list_judged_models(experiment)[completed:]:
        began = time.perf_counter()
        lines, pooled = [], None
        for task, adapter, client in _iter_client_adapters(experiment, run, model):
            generated = evaluator.generate_sample(task, adapter, client)
            line = evaluator.measure_distance(
                model, experiment.names[client], generated, evaluator.make_test_sample(client)
            )
            lines.append({**line, "participated": client in evaluator.participants})
            if client in evaluator.participants:
                pooled = generated if pooled is None else merge_samples(pooled, generated)
        assert pooled is not None
        pooled_line = evaluator.measure_distance(model, None, pooled, evaluator.pooled_test_sample)
        pooled_line["seconds"] = round(time.perf_counter() - began, 3)
        records.write_lines(log, [*records.lines(log), *lines, pooled_line])
        yield model


def list_judged_models(experiment: Experiment) -> list[str]:
    """What a run has to judge, in the order of its tables."""
    return [*list_models(experiment), *(["personal"] if experiment.has_personal_models else [])]


def _iter_client_adapters(
    experiment: Experiment, run: Path, model: str
) -> Iterator[tuple[ImageTask, Leaves, int]]:
    """Every client's task and adapter under a model."""
    if model == "personal":
        task, personal_folders = experiment.task, find_model_folders(run, experiment.names)
        adapters = (task.model.load(personal_folders[name]) for name in experiment.names)
    else:
        method_state = load_method_result(experiment, run, model)
        task, clients = method_state.experiment.task, range(len(experiment.names))
        adapters = (method_state.adapter(c) for c in clients)
    assert isinstance(task, ImageTask)
    for client, adapter in enumerate(adapters):
        yield task, adapter, client
