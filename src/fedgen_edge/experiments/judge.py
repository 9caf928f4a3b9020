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
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment
from fedgen_edge.experiments.evaluate import left, models
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
from fedgen_edge.experiments.models import folders
from fedgen_edge.seeds import seed
from fedgen_edge.tasks.task import Pictured
from fedgen_edge.types import Leaves

KEPT = 5000
"""Samples of a model whose features are kept for the kernel and for nearest neighbours; of the
others only sums are, so that memory does not grow with their number."""

TELLING = 10
"""Pictures of a class from which its diversity can be told."""


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
    eyes: Extractor
    drawn: Collection[str]
    """Names of the clients that some round drew."""

    @cached_property
    def fair(self) -> set[int]:
        """Clients that took part."""
        drawn = set(self.drawn)
        return {c for c, name in enumerate(self.experiment.names) if name in drawn}

    @cached_property
    def features(self) -> list[Tensor]:
        """Of each client's test pictures."""
        held = self.experiment.corpus.examples
        assert isinstance(held, Images)
        return [self.eyes.see(held.pixels[list(own.test)]) for own in self.experiment.holdings]

    def real(self, client: int) -> Seen:
        """A client's test pictures."""
        return self._seen(self.features[client], self.labels[client], self._total(self.labels))

    @cached_property
    def all_real(self) -> Seen:
        """Every client's test pictures."""
        return reduce(together, map(self.real, sorted(self.fair)))

    def _total(self, each: Sequence[Sequence[int]]) -> int:
        return sum(len(each[client]) for client in self.fair)

    @cached_property
    def labels(self) -> list[list[int]]:
        """Of each client's test pictures."""
        corpus = self.experiment.corpus
        assert isinstance(corpus.examples, Images)
        assert corpus.labels is not None
        numbers = {name: number for number, name in enumerate(corpus.examples.classes)}
        return [[numbers[corpus.labels[i]] for i in own.test] for own in self.experiment.holdings]

    @cached_property
    def asked(self) -> list[list[int]]:
        """Classes of each client's samples: those of its test pictures, in their proportions.

        A client's share is rounded up, so that all of them are no fewer than the setting says.
        """
        total, least = self._total(self.labels), self.experiment.settings.judging.samples
        counts = [max(2, math.ceil(least * len(own) / total)) for own in self.labels]
        return [
            [own[i * len(own) // count] for i in range(count)]
            for own, count in zip(self.labels, counts, strict=True)
        ]

    def made(self, task: Pictured, adapter: Leaves, client: int) -> Seen:
        """A client's samples under one adapter."""
        settings, labels = self.experiment.settings, self.asked[client]
        key = seed(settings.federation.seed, "judge", client)
        made = task.generate(adapter, labels, key, settings.evaluation)
        return self._seen(self.eyes.see(made), labels, self._total(self.asked))

    def _seen(self, features: Tensor, labels: Sequence[int], total: int) -> Seen:
        """Of one client; what is kept of it is its share of all, so that no client weighs more."""
        numbers = torch.tensor(labels)
        most = math.ceil(len(labels) * min(1, KEPT / total))
        few = torch.linspace(0, len(labels) - 1, most).long()
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
        known = real.labels.unique()
        mine = torch.isin(made.labels, known)
        own = [torch.searchsorted(known, labels) for labels in (real.labels, made.labels[mine])]
        signs = collapse(real.features, own[0], made.features[mine], own[1], len(known))
        told = [bool(min((labels == c).sum() for labels in own) >= TELLING)
                for c in range(len(known))]  # fmt: skip
        classes = [names[int(c)] for c in known]
        half = min(len(made.features), len(real.features) // 2)
        some = torch.linspace(0, len(real.features) - 1, 2 * half).long()
        both = sorted(made.moments.keys() & real.moments.keys())
        return {
            "floor": floor(real.features[some], key),
            **overlap(real.features, made.features)._asdict(),
            "diversity": {
                c: v for c, v, known in zip(classes, signs.diversity, told, strict=True) if known
            },
            "shares": dict(zip(classes, signs.shares, strict=True)),
            "real_shares": dict(zip(classes, signs.real_shares, strict=True)),
            "classes": {
                names[c]: frechet(made.moments[c], real.moments[c])
                for c in both
                if min(made.moments[c].count, real.moments[c].count) > 1
            },
        }


def jury(experiment: Experiment, run: Path) -> Jury:
    """Of a run whose rounds are done."""
    settings = experiment.settings.judging
    assert settings.features is not None
    eyes = extractor(settings.features, settings.weights, experiment.clients.device)
    return Jury(experiment, eyes, records.drawn(run))


def judge(experiment: Experiment, run: Path) -> Iterator[str]:
    """Judge what is not judged yet, a model at a time; yields each model's name when it is."""
    log, told = run / "distances.jsonl", jury(experiment, run)
    each = len(experiment.holdings) + 1
    done = len(records.lines(log)) // each
    records.truncate(log, done * each)
    for model in judged(experiment)[done:]:
        began = time.perf_counter()
        lines, pooled = [], None
        for task, adapter, client in _each(experiment, run, model):
            made = told.made(task, adapter, client)
            line = told.verdict(model, experiment.names[client], made, told.real(client))
            lines.append({**line, "participated": client in told.fair})
            if client in told.fair:
                pooled = made if pooled is None else together(pooled, made)
        assert pooled is not None
        whole = told.verdict(model, None, pooled, told.all_real)
        whole["seconds"] = round(time.perf_counter() - began, 3)
        records.write_lines(log, [*records.lines(log), *lines, whole])
        yield model


def judged(experiment: Experiment) -> list[str]:
    """What a run has to judge, in the order of its tables."""
    return [*models(experiment), *(["personal"] if experiment.has_own else [])]


def _each(experiment: Experiment, run: Path, model: str) -> Iterator[tuple[Pictured, Leaves, int]]:
    """Every client's task and adapter under a model."""
    if model == "personal":
        task, own = experiment.task, folders(run, experiment.names)
        adapters = (task.model.load(own[name]) for name in experiment.names)
    else:
        found = left(experiment, run, model)
        task, clients = found.experiment.task, range(len(experiment.names))
        adapters = (found.adapter(c) for c in clients)
    assert isinstance(task, Pictured)
    for client, adapter in enumerate(adapters):
        yield task, adapter, client
