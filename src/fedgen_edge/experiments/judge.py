"""Models of pictures by their samples: a line a client, and one of all clients together.

Each client's share of the samples is asked for by the classes of its test pictures, from noise that
is the same for every model, and compared with those pictures.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedgen_edge.config import Judging
from fedgen_edge.data.corpus import Images
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment, beside
from fedgen_edge.experiments.checkpoint import last
from fedgen_edge.experiments.features import Extractor, extractor
from fedgen_edge.experiments.frechet import (
    NEIGHBOURS,
    SUBSETS,
    Moments,
    collapse,
    floor,
    frechet,
    kernel_distance,
    moments,
    overlap,
    too_few,
)
from fedgen_edge.experiments.models import folder_of
from fedgen_edge.seeds import seed
from fedgen_edge.tasks.task import Pictured
from fedgen_edge.types import Leaves, ServerState

KEPT = 5000
"""Pictures whose features are in memory at once; beyond them only sums are kept."""


class Seen(NamedTuple):
    """Some pictures of known classes, as the features see them."""

    moments: dict[int, Moments]
    """Of each class that is there."""
    features: Tensor
    """Of some, evenly spaced: `[kept, d]`."""
    labels: Tensor
    """Their classes, `[kept]`."""

    @property
    def whole(self) -> Moments:
        """Of all classes together."""
        return reduce(add, self.moments.values())


def together(parts: Sequence[Seen]) -> Seen:
    """What several clients have, as one."""
    classes = sorted({label for part in parts for label in part.moments})
    return Seen(
        {c: reduce(add, [p.moments[c] for p in parts if c in p.moments]) for c in classes},
        torch.cat([part.features for part in parts]),
        torch.cat([part.labels for part in parts]),
    )


@dataclass(frozen=True)
class Jury:
    """The clients' test pictures, and how samples are held against them."""

    experiment: Experiment
    settings: Judging
    eyes: Extractor

    @cached_property
    def real(self) -> list[Seen]:
        """Each client's test pictures."""
        held = self.experiment.corpus.examples
        assert isinstance(held, Images)
        return [
            self._seen(held.pixels[list(own.test)], labels)
            for own, labels in zip(self.experiment.holdings, self.labels, strict=True)
        ]

    @cached_property
    def labels(self) -> list[list[int]]:
        """Of each client's test pictures."""
        corpus = self.experiment.corpus
        assert isinstance(corpus.examples, Images)
        assert corpus.labels is not None
        numbers = {name: number for number, name in enumerate(corpus.examples.classes)}
        return [[numbers[corpus.labels[i]] for i in own.test] for own in self.experiment.holdings]

    def asked(self, client: int) -> list[int]:
        """Classes of the client's samples: those of its test pictures, again and again."""
        own, total = self.labels[client], sum(map(len, self.labels))
        count = max(2, round(self.settings.samples * len(own) / total))
        return list(itertools.islice(itertools.cycle(own), count))

    def made(self, task: Pictured, adapter: Leaves, client: int) -> Seen:
        """A client's samples under one adapter."""
        settings, labels = self.experiment.settings, self.asked(client)
        key = seed(settings.federation.seed, "judge", client)
        made = task.generate(adapter, labels, key, settings.evaluation)
        return self._seen(made, labels)

    def _seen(self, pictures: Tensor, labels: Sequence[int]) -> Seen:
        features, numbers = self.eyes.see(pictures), torch.tensor(labels)
        most = max(1, KEPT // len(self.experiment.holdings))
        few = torch.linspace(0, len(labels) - 1, min(most, len(labels))).long()
        groups = {c: moments(features[numbers == c]) for c in sorted(set(labels))}
        return Seen(groups, features[few], numbers[few])

    def verdict(self, model: str, client: str | None, made: Seen, real: Seen) -> records.Line:
        """A line of distances.jsonl; what too few pictures cannot say is not there."""
        ours, theirs, key = made.whole, real.whole, self.experiment.settings.federation.seed
        fewest = min(ours.count, theirs.count)
        line: records.Line = {
            "model": model,
            "client": client,
            "distance": self.eyes.shown,
            "seed": key,
            "made": ours.count,
            "real": theirs.count,
            "frechet": frechet(ours, theirs) if fewest > 1 else None,
            "few": too_few(fewest, len(ours.mean)),
        }
        if min(len(made.features), len(real.features)) >= 2 * SUBSETS:
            line["kernel"] = list(kernel_distance(made.features, real.features, key))
        if client is None and fewest > NEIGHBOURS:
            line |= self._of_all(made, real, key)
        return line

    def _of_all(self, made: Seen, real: Seen, key: int) -> dict[str, Any]:
        """What only many pictures can say."""
        names = self.experiment.settings.data.names
        numbers = {c: at for at, c in enumerate(real.moments)}
        own = [torch.tensor([numbers[int(c)] for c in seen.labels]) for seen in (real, made)]
        signs = collapse(real.features, own[0], made.features, own[1], len(numbers))
        each = {
            names[c]: frechet(made.moments[c], real.moments[c])
            for c in numbers
            if min(made.moments[c].count, real.moments[c].count) > 1
        }
        return {
            "floor": floor(real.features, key),
            **overlap(real.features, made.features)._asdict(),
            "diversity": {names[c]: signs.diversity[at] for c, at in numbers.items()},
            "shares": {names[c]: signs.shares[at] for c, at in numbers.items()},
            "real_shares": {names[c]: signs.real_shares[at] for c, at in numbers.items()},
            "classes": each,
        }


def jury(experiment: Experiment) -> Jury:
    """Of a run's settings."""
    settings = experiment.settings.judging
    assert settings.features is not None
    eyes = extractor(settings.features, settings.weights, experiment.clients.device)
    return Jury(experiment, settings, eyes)


def judge(experiment: Experiment, run: Path) -> Iterator[str]:
    """Judge what is not judged yet, a model at a time; yields each model's name when it is."""
    log, told = run / "distances.jsonl", jury(experiment)
    each = len(experiment.holdings) + 1
    done = len(records.lines(log)) // each
    records.truncate(log, done * each)
    for model in models(experiment)[done:]:
        began = time.perf_counter()
        made = [told.made(*found) for found in _each(experiment, run, model)]
        names = experiment.names
        lines = [
            told.verdict(model, name, mine, real)
            for name, mine, real in zip(names, made, told.real, strict=True)
        ]
        lines.append(told.verdict(model, None, together(made), together(told.real)))
        lines[-1]["seconds"] = round(time.perf_counter() - began, 3)
        records.write_lines(log, [*records.lines(log), *lines])
        yield model


def models(experiment: Experiment) -> list[str]:
    """What a run has to judge, in the order of its tables."""
    shared = ["global"] if experiment.has_global else []
    return ["backbone", *experiment.settings.evaluation.baselines, *shared, "personal"]


def _each(experiment: Experiment, run: Path, model: str) -> Iterator[tuple[Pictured, Leaves, int]]:
    """Every client's task and adapter under a model."""
    if model in experiment.settings.evaluation.baselines:
        experiment = beside(experiment, model)
        state, memory = last(run / "baselines" / model)
    else:
        state, memory = last(run)
    if model == "backbone":
        state, memory = ServerState(0, experiment.task.model.backbone()), {}
    task = experiment.task
    assert isinstance(task, Pictured)
    for client, name in enumerate(experiment.names):
        if model == "personal":
            yield task, task.model.load(folder_of(run, name)), client
        else:
            yield task, experiment.own(state, memory.get(client, {})), client
