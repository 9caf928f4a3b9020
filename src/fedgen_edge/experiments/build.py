"""From settings to the parts of a run; nothing is written, so a mistake costs nothing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedgen_edge import leaves, machine, schedule
from fedgen_edge.adapters.ranks import cut
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.clusters import enough, parts
from fedgen_edge.algorithms.correct import proximal, unchanged
from fedgen_edge.algorithms.methods import check, method
from fedgen_edge.client import Patience, Recipe, optimiser, rate_of
from fedgen_edge.config import Downlink, Settings
from fedgen_edge.data import sources
from fedgen_edge.data.batches import Budget, Shard, Shards, rows, side_by_side, spaced
from fedgen_edge.data.corpus import Corpus, Images
from fedgen_edge.data.partition import Holding, labelled, partition
from fedgen_edge.engines.serial import serial
from fedgen_edge.engines.stacked import stacked
from fedgen_edge.engines.staff import Staff
from fedgen_edge.errors import ConfigError, MissingExtraError
from fedgen_edge.experiments.features import extractor
from fedgen_edge.jobs import Clients, Train
from fedgen_edge.personal import Personalise
from fedgen_edge.planning.fit import fitted
from fedgen_edge.rounds import Engine, sample
from fedgen_edge.schedule import cohort_size
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TASKS, Learnt, Pictured, Task
from fedgen_edge.types import Batch, Leaves, ServerState
from fedgen_edge.uplink.wire import Wire, made

Sums = dict[str, float]
"""Held-out statistics, which add up."""


@dataclass(frozen=True)
class Experiment:
    """A run, ready to go."""

    settings: Settings
    """Resolved: nothing in them is left to the machine."""
    task: Learnt
    corpus: Corpus
    holdings: Sequence[Holding]
    clients: Clients
    staff: Staff | None = None
    """Workers, where there are some."""

    @property
    def algorithm(self) -> Algorithm:
        """What the method changes."""
        return self.clients.algorithm

    @property
    def has_global(self) -> bool:
        """Whether clients share anything, so that there is a global model to speak of."""
        return bool(self.algorithm.sends(list(self.task.model.leaf_shapes()), None))

    @property
    def has_own(self) -> bool:
        """Whether clients end with models of their own, beside the global one."""
        told, names = self.algorithm, list(self.task.model.leaf_shapes())
        more = told.beside, told.clusters, told.ranks, self.settings.personal.epochs
        return any(more) or told.sends(names, None) != set(names)

    @property
    def names(self) -> list[str]:
        """The clients' names, in their order."""
        return [holding.name for holding in self.holdings]

    @property
    def engine(self) -> Engine:
        """The engine of the settings; a method whose leaves cannot be stacked runs serially."""
        settings, able = self.settings.engine, self.task.model.stackable
        if self.staff:
            sums = settings.sums and self.algorithm.sums is not None
            stack = (settings.stack or 1) if able else None
            return self.staff.engine(self.settings.method.name, stack, sums=sums)
        if settings.name == "serial" or not able:
            return serial
        return stacked(settings.stack or 1)

    @property
    def train(self) -> Train:
        """What clients do in a round."""
        t = self.settings.training
        budget = Budget(t.batch, 1 if t.steps else t.epochs, t.steps)
        return Train(self.clients, budget, self._recipe)

    @property
    def tune(self) -> Personalise:
        """What clients do after the last round."""
        t, p = self.settings.training, self.settings.personal
        corrects = proximal(p.pull) if p.pull else unchanged
        recipe = Recipe(optimiser(t, p.lr), t.clip, corrects=corrects)
        budget = Budget(t.batch, p.epochs, p.steps)
        beside, patience = self.algorithm.beside, Patience(p.patience, p.fallback)
        mixing = p.mixing or (beside.mixing if beside else ())
        return Personalise(self.clients, budget, recipe, patience, mixing)

    def close(self) -> None:
        """Let workers go, if there are some."""
        if self.staff:
            self.staff.close()

    def start(self) -> ServerState:
        """The server before the first round."""
        rng = generator(self.settings.federation.seed, "init")
        return self.algorithm.init(self.task.init(rng))

    def shared(self, state: ServerState) -> dict[str, Leaves]:
        """What clients share, by the names of its folders: one adapter, or one a cluster."""
        return by_folder(state.adapter) if self.has_global else {}

    def remembering(self, memory: MutableMapping[int, Leaves]) -> "Experiment":
        """The same, with what its clients have kept."""
        return replace(self, clients=replace(self.clients, memory=memory))

    def cohort(self, round_: int, losses: Tensor | None) -> list[int]:
        """Who takes part in a round."""
        settings = self.settings
        return sample(settings.federation, len(self.holdings), round_, losses, settings.devices)

    def own(self, state: ServerState, memory: Leaves, client: int) -> Leaves:
        """A client's model as the rounds left it: the global adapter and what it has kept.

        Of the global one it has the terms that its rank has room for; of clusters it chooses one.
        """
        adapter = cut(state.adapter, self.algorithm.rank(client))
        return self.algorithm.receives(adapter, self.clients.chosen(client, adapter, memory))

    def sums(self, adapter: Leaves, examples: Batch) -> Sums:
        """A task's statistics of one client's examples under one adapter."""
        clients = self.clients
        found = self.task.evaluate(clients.place(adapter), clients.place(examples))
        return {k: float(v) for k, v in found.items()}

    def sums_of(self, held: Iterable[tuple[Leaves, Batch]]) -> Iterator[Sums]:
        """Statistics of several clients' examples, each under its adapter, in their order.

        As many are together as in training, on the same engine, where their adapters are of a kind.
        """
        alone = self.engine is serial or not self.task.model.stackable  # workers' engine is neither
        together = 1 if alone else self.settings.engine.stack or 1
        for _, alike in groupby(held, lambda own: leaves.shapes(own[0])):
            while group := list(islice(alike, together)):
                yield from self._together(*zip(*group, strict=True))

    def _together(self, adapters: Sequence[Leaves], examples: Sequence[Batch]) -> Iterator[Sums]:
        if len(adapters) == 1:
            yield self.sums(adapters[0], examples[0])
            return
        clients = self.clients
        found = self.task.evaluate(
            clients.place(leaves.stack(adapters)), clients.place(side_by_side(examples))
        )
        each = zip(*(v.tolist() for v in found.values()), strict=True)
        yield from (dict(zip(found, own, strict=True)) for own in each)

    def validation(self, state: ServerState) -> dict[str, Any]:
        """Every training client's validation data under its own model, after a round."""
        memory, each = self.clients.memory, self._ahead or self._validation()
        held = ((self.own(state, memory.get(c, {}), c), own) for c, own in enumerate(each))
        return added(dict(zip(self.names, self.sums_of(held), strict=False)))

    def _validation(self) -> Iterator[Batch]:
        """Of each training client: newcomers are the last."""
        able = len(self.holdings) - self.settings.federation.newcomers
        return (self.clients.shards[c].validation for c in range(able))

    @cached_property
    def _ahead(self) -> list[Batch] | None:
        """The same, as every round meets it again."""
        return self.clients.ahead(self._validation())

    def _recipe(self, round_: int) -> Recipe:
        t, algorithm = self.settings.training, self.algorithm
        rate = rate_of(self.settings, algorithm, round_)
        trains = algorithm.training(list(self.task.model.leaf_shapes()), round_)
        surveys = algorithm.surveys(round_)
        return Recipe(optimiser(t, rate), t.clip, trains, algorithm.corrects, surveys)


def by_folder(adapter: Leaves) -> dict[str, Leaves]:
    """The server's adapter by the names of its folders: one, or one a cluster."""
    clusters = {f"cluster-{k}": own for k, own in parts(adapter).items()}
    return clusters or {"global": adapter}


def added(each: Mapping[str, Sums]) -> dict[str, Any]:
    """Clients' sums together; and the mean of each, by its name."""
    names = dict.fromkeys(k for own in each.values() for k in own)
    total = {k: sum(own[k] for own in each.values()) for k in names}
    return {**total, "clients": {name: s["total"] / s["count"] for name, s in each.items()}}


def build(settings: Settings) -> Experiment:
    """Load the data and the backbone, and fit the one to the other.

    Raises:
        FedGenError: anything in the settings that cannot be carried out.
    """
    check(settings)
    device = machine.device(settings.engine.device)
    settings = fitted(settings, device)
    algorithm = method(settings.method, adapter=settings.adapter)
    beside_it = [
        method(replace(settings.method, name=name), "evaluation.baselines", settings.adapter)
        for name in settings.evaluation.baselines
    ]
    if settings.evaluation.tensorboard and not find_spec("tensorboard"):
        raise MissingExtraError("evaluation.tensorboard=true", "tensorboard")
    _check_workers(settings)
    machine.set_threads(settings.engine.threads)
    federation, seed = settings.federation, settings.federation.seed
    corpus = labelled(sources.read(settings.data), settings.partition, seed)
    settings = named(settings, corpus)
    holdings = partition(corpus, settings.data, settings.partition, federation.clients, seed)
    check_held_out(holdings)
    cohort = cohort_size(federation, len(holdings))
    task = task_of(settings, device)
    _check_judging(settings, task, len(holdings), device)
    _check_candidates(settings)
    schedule.check(federation, settings.devices, (algorithm, *beside_it), len(holdings))
    for each in (algorithm, *beside_it):
        check_method(each, task)
        enough(each.clusters, cohort)
    clients = Clients(task, algorithm, shards(task, corpus, holdings, settings), seed, device)
    experiment = wired(Experiment(settings, task, corpus, holdings, clients))
    experiment = replace(experiment, settings=_resolved(experiment, cohort))
    if settings.engine.name != "ray":
        return experiment
    from fedgen_edge.experiments.workers import staffed

    return staffed(experiment)


def wired(experiment: Experiment) -> Experiment:
    """The same, with its settings' ways for leaves to travel."""
    told = Wire() if experiment.algorithm.pools else wire(experiment.settings, experiment.start)
    return replace(experiment, clients=replace(experiment.clients, wire=told))


def wire(settings: Settings, start: Callable[[], ServerState]) -> Wire:
    """How leaves travel by these settings, from a server that starts so."""
    base = start().adapter if settings.downlink != Downlink() else {}
    return made(settings.uplink, settings.downlink, settings.federation.seed, base)


def drawn(settings: Settings, algorithm: Algorithm, begun: Leaves) -> Leaves:
    """Of the adapter before the first round, what all machines draw for themselves, and alike.

    What is never sent begins so. Where what goes down is a change since then, that is all of it.
    """
    if settings.downlink != Downlink():
        return begun
    sent = algorithm.shared(begun)
    return {k: v for k, v in begun.items() if k not in sent}


def named(settings: Settings, corpus: Corpus) -> Settings:
    """The settings with the pictures' size, and the names of their classes: samples have both."""
    if not isinstance(corpus.examples, Images):
        return settings
    names = corpus.examples.classes
    for asked in settings.evaluation.prompts:
        if asked not in names:
            raise ConfigError(
                f"evaluation.prompts={asked!r} is no class of pictures: {', '.join(names)} are"
            )
    height, width = corpus.examples.pixels.shape[-2:]
    size = settings.data.size or (height if height == width else None)
    return replace(settings, data=replace(settings.data, names=names, size=size))


def task_of(settings: Settings, device: torch.device) -> Learnt:
    """The task of these settings, with the leaves that its method adapts."""
    full = method(settings.method).adapts == "full"
    return TASKS[settings.task](settings, full=full, device=device)


def check_method(algorithm: Algorithm, task: Learnt) -> None:
    """Refuse now what a method would refuse in its first round."""
    algorithm.sends(list(task.model.leaf_shapes()), None)


def _check_workers(settings: Settings) -> None:
    """Workers are Ray's, which is an extra."""
    told = settings.engine
    if told.name == "ray":
        if not find_spec("ray"):
            raise MissingExtraError("engine.name='ray'", "ray")
        return
    asked = {"address": told.address, "workers": told.workers, "sums": told.sums or None}
    for name, value in asked.items():
        if value is not None:
            raise ConfigError(
                f"engine.{name}={value!r} is of workers, and engine.name={told.name!r} has none: "
                "say engine.name='ray', or leave it out"
            )


def _check_candidates(settings: Settings) -> None:
    """Methods in one table see the same batches; each would choose clients by its own losses."""
    alone = settings.method.name != "centralised" and not settings.evaluation.baselines
    if settings.federation.candidates is not None and not alone:
        raise ConfigError(
            f"federation.candidates={settings.federation.candidates} chooses clients by a method's "
            "own losses, so methods beside each other would see other batches, and `centralised` "
            "has but one loss: leave evaluation.baselines out, and run each method by itself"
        )


def _check_judging(settings: Settings, task: Learnt, clients: int, device: torch.device) -> None:
    """Refuse now what judging by samples would refuse after the last round."""
    told = settings.judging
    if told.features is None:
        return
    if not isinstance(task, Pictured):
        raise ConfigError(
            f"judging.features={told.features!r} sees pictures, and task={settings.task!r} makes "
            "none: leave it out"
        )
    if told.samples < 2 * clients:
        raise ConfigError(
            f"judging.samples={told.samples} must be at least {2 * clients}, two for each client"
        )
    extractor(told.features, told.weights, device)


def check_held_out(holdings: Sequence[Holding]) -> None:
    """Refuse holdings on which nothing could be judged."""
    for part in ("validation", "test"):
        lacking = [holding.name for holding in holdings if not getattr(holding, part)]
        if lacking:
            raise ConfigError(
                f"data.{part}=0 leaves {len(lacking)} clients, {lacking[0]!r} first, nothing to be "
                "judged on: give it a share, such as 0.1"
            )


def beside(experiment: Experiment, name: str) -> Experiment:
    """The same data, batches and budget with another method."""
    settings = replace(experiment.settings, method=replace(experiment.settings.method, name=name))
    algorithm = method(settings.method, adapter=settings.adapter)
    task, clients = experiment.task, replace(experiment.clients, algorithm=algorithm, memory={})
    if (algorithm.adapts == "full") == task.model.stackable:
        task = task_of(settings, clients.device)
        clients = replace(clients, task=task)
    return wired(replace(experiment, settings=settings, task=task, clients=clients))


def shards(task: Learnt, corpus: Corpus, holdings: Sequence[Holding], settings: Settings) -> Shards:
    """Every client's examples, encoded and packed, one client after the other."""

    def packed(indices: Sequence[int], most: int = 0) -> Batch:
        return spaced(task.examples(corpus, indices), most)

    e = settings.evaluation
    return Shards(
        Shard(
            h.name, packed(h.train), packed(h.validation, e.blocks), packed(h.test, e.test_blocks)
        )
        for h in holdings
    )


def _resolved(experiment: Experiment, cohort: int) -> Settings:
    """The settings with all that the machine decided written into them."""
    settings, clients = experiment.settings, experiment.clients
    precision = "bf16" if experiment.task.model.dtype == torch.bfloat16 else "float32"
    can_stack = settings.engine.name != "serial" and experiment.task.model.stackable
    step = _largest_step(experiment)
    stack = min(cohort, settings.engine.stack or machine.stack_size(*step)) if can_stack else None
    if settings.engine.threads is None and settings.engine.name != "ray":
        machine.choose_threads(*step, stack)
    return replace(
        settings,
        backbone=replace(
            settings.backbone,
            precision=precision,
            path=_absolute(settings.backbone.path),
            autoencoder=_absolute(settings.backbone.autoencoder),
        ),
        adapter=replace(settings.adapter, initial=_absolute(settings.adapter.initial)),
        data=replace(settings.data, path=_absolute(settings.data.path)),
        judging=replace(settings.judging, weights=_absolute(settings.judging.weights)),
        federation=replace(
            settings.federation, clients=len(experiment.holdings), cohort=cohort, fraction=None
        ),
        engine=replace(
            settings.engine,
            name=_engine(settings.engine.name, can_stack),
            stack=stack,
            device=str(clients.device),
            threads=torch.get_num_threads(),
        ),
    )


def _engine(asked: str, can_stack: bool) -> Literal["serial", "stacked", "ray"]:
    if asked == "ray":
        return "ray"
    return "stacked" if can_stack else "serial"


def _absolute(path: Any) -> Any:
    """A path that is there, from the root; a name as it is."""
    if path in {None, "tiny"} or not Path(path).exists():
        return path
    return type(path)(Path(path).resolve())


def _largest_step(experiment: Experiment) -> tuple[Task, Leaves, Batch]:
    """What one client's step takes: its task and adapter, and the batch of the largest client."""
    clients, batch = experiment.clients, experiment.settings.training.batch
    examples = max((shard.train for shard in clients.shards), key=rows)
    adapter = clients.place(clients.algorithm.own(experiment.start().adapter, {}))
    drawn = experiment.task.draw(spaced(examples, batch), generator(0))
    return experiment.task, adapter, clients.place(drawn)
