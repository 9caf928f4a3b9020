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
"""Samples of a model whose features are kept for the kernel and for nearest neighbours; of the
others only sums are, so that memory does not grow with their number."""


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


def together(one: Seen, two: Seen) -> Seen:
    """What two have, as one."""
    both = one.moments.keys() & two.moments.keys()
    return Seen(
        {**one.moments, **two.moments, **{c: one.moments[c] + two.moments[c] for c in both}},
        torch.cat([one.features, two.features]),
        torch.cat([one.labels, two.labels]),
    )


@dataclass(frozen=True)
class Jury:
    """The clients' test pictures, and how samples are held against them."""

    experiment: Experiment
    settings: Judging
    eyes: Extractor

    @cached_property
    def features(self) -> list[Tensor]:
        """Of each client's test pictures."""
        held = self.experiment.corpus.examples
        assert isinstance(held, Images)
        return [self.eyes.see(held.pixels[list(own.test)]) for own in self.experiment.holdings]

    def real(self, client: int) -> Seen:
        """A client's test pictures."""
        return self._seen(self.features[client], self.labels[client])

    @cached_property
    def all_real(self) -> Seen:
        """Every client's test pictures."""
        return reduce(together, map(self.real, range(len(self.labels))))

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
        return self._seen(self.eyes.see(made), labels)

    def _seen(self, features: Tensor, labels: Sequence[int]) -> Seen:
        numbers = torch.tensor(labels)
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
        numbers = {c: at for at, c in enumerate(sorted(real.moments))}
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
        lines, pooled = [], None
        for task, adapter, client in _each(experiment, run, model):
            made = told.made(task, adapter, client)
            lines.append(told.verdict(model, experiment.names[client], made, told.real(client)))
            pooled = made if pooled is None else together(pooled, made)
        assert pooled is not None
        whole = told.verdict(model, None, pooled, told.all_real)
        whole["seconds"] = round(time.perf_counter() - began, 3)
        records.write_lines(log, [*records.lines(log), *lines, whole])
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
