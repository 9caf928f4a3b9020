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

from fedgen_edge import hardware, leaves
from fedgen_edge.adapters.ranks import mask_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.ifca import check_cohort_size, split_clusters
from fedgen_edge.algorithms.local_corrections import add_proximal_term, keep_gradients
from fedgen_edge.algorithms.methods import check, make_algorithm
from fedgen_edge.compression.wire import Wire, make_wire
from fedgen_edge.config import Compression, Settings
from fedgen_edge.data import sources
from fedgen_edge.data.batches import (
    Budget,
    Shard,
    Shards,
    count_rows,
    stack_examples,
    subsample_evenly,
)
from fedgen_edge.data.corpus import Corpus, Images
from fedgen_edge.data.partition import ClientSplits, assign_labels, partition
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.engines.workers import WorkerPool
from fedgen_edge.errors import ConfigError, MissingExtraError
from fedgen_edge.federation import schedule
from fedgen_edge.federation.client import (
    Patience,
    Recipe,
    get_learning_rate,
    make_optimizer_factory,
)
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.federation.rounds import Engine, sample_clients
from fedgen_edge.federation.schedule import cohort_size
from fedgen_edge.image_metrics.features import make_extractor
from fedgen_edge.planning.fit import fit_ranks
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TASKS, ImageTask, Task, TrainableTask
from fedgen_edge.types import Batch, Leaves, ServerState

Sums = dict[str, float]
"""Held-out statistics, which add up."""


@dataclass(frozen=True)
class Experiment:
    """A run, ready to go."""

    settings: Settings
    """Resolved: nothing in them is left to the machine."""
    task: TrainableTask
    corpus: Corpus
    holdings: Sequence[ClientSplits]
    clients: Clients
    worker_pool: WorkerPool | None = None
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
    def has_personal_models(self) -> bool:
        """Whether clients end with models of their own, beside the global one."""
        algorithm, names = self.algorithm, list(self.task.model.leaf_shapes())
        personal_parts = (
            algorithm.beside,
            algorithm.clusters,
            algorithm.ranks,
            self.settings.personal.epochs,
        )
        return any(personal_parts) or algorithm.sends(names, None) != set(names)

    @property
    def names(self) -> list[str]:
        """The clients' names, in their order."""
        return [holding.name for holding in self.holdings]

    @property
    def engine(self) -> Engine:
        """The engine of the settings; a method whose leaves cannot be stacked runs serially."""
        settings, can_stack = self.settings.engine, self.task.model.is_stackable
        if self.worker_pool:
            aggregate_on_workers = (
                settings.aggregate_on_workers and self.algorithm.partial_aggregation is not None
            )
            stack = (settings.stack or 1) if can_stack else None
            return self.worker_pool.engine(
                self.settings.method.name, stack, sums=aggregate_on_workers
            )
        if settings.name == "serial" or not can_stack:
            return run_serially
        return make_stacked_engine(settings.stack or 1)

    @property
    def train(self) -> Train:
        """What clients do in a round."""
        t = self.settings.training
        budget = Budget(t.batch, 1 if t.steps else t.epochs, t.steps)
        return Train(self.clients, budget, self._make_recipe)

    @property
    def tune(self) -> Personalize:
        """What clients do after the last round."""
        t, p = self.settings.training, self.settings.personal
        corrects = add_proximal_term(p.proximal_mu) if p.proximal_mu else keep_gradients
        recipe = Recipe(make_optimizer_factory(t, p.lr), t.clip, corrects=corrects)
        budget = Budget(t.batch, p.epochs, p.steps)
        beside, patience = self.algorithm.beside, Patience(p.patience, p.fallback)
        mixing = p.mixing or (beside.mixing if beside else ())
        return Personalize(self.clients, budget, recipe, patience, mixing)

    def close(self) -> None:
        """Let workers go, if there are some."""
        if self.worker_pool:
            self.worker_pool.close()

    def start(self) -> ServerState:
        """The server before the first round."""
        rng = generator(self.settings.federation.seed, "init")
        return self.algorithm.init(self.task.init(rng))

    def get_shared_adapters(self, state: ServerState) -> dict[str, Leaves]:
        """What clients share, by the names of its folders: one adapter, or one a cluster."""
        return split_by_folder(state.adapter) if self.has_global else {}

    def with_client_states(self, memory: MutableMapping[int, Leaves]) -> "Experiment":
        """The same, with what its clients have kept."""
        return replace(self, clients=replace(self.clients, memory=memory))

    def cohort(self, round_: int, losses: Tensor | None) -> list[int]:
        """Who takes part in a round."""
        settings = self.settings
        return sample_clients(
            settings.federation, len(self.holdings), round_, losses, settings.devices
        )

    def get_client_model(self, state: ServerState, memory: Leaves, client: int) -> Leaves:
        """A client's model as the rounds left it: the global adapter and what it has kept.

        Of the global one it has the terms that its rank has room for; of clusters it chooses one.
        """
        adapter = mask_rank(state.adapter, self.algorithm.get_rank(client))
        return self.algorithm.receives(
            adapter, self.clients.choose_cluster(client, adapter, memory)
        )

    def evaluate_client(self, adapter: Leaves, examples: Batch) -> Sums:
        """A task's statistics of one client's examples under one adapter."""
        clients = self.clients
        statistics = self.task.evaluate(clients.to_device(adapter), clients.to_device(examples))
        return {k: float(v) for k, v in statistics.items()}

    def evaluate_clients(self, model_batches: Iterable[tuple[Leaves, Batch]]) -> Iterator[Sums]:
        """Statistics of several clients' examples, each under its adapter, in their order.

        As many are together as in training, on the same engine, where their adapters are of a kind.
        """
        one_by_one = (
            self.engine is run_serially or not self.task.model.is_stackable
        )  # workers' engine is neither
        stack_size = 1 if one_by_one else self.settings.engine.stack or 1
        for _, same_shapes in groupby(model_batches, lambda own: leaves.shapes(own[0])):
            while group := list(islice(same_shapes, stack_size)):
                yield from self._evaluate_stack(*zip(*group, strict=True))

    def _evaluate_stack(
        self, adapters: Sequence[Leaves], examples: Sequence[Batch]
    ) -> Iterator[Sums]:
        if len(adapters) == 1:
            yield self.evaluate_client(adapters[0], examples[0])
            return
        clients = self.clients
        statistics = self.task.evaluate(
            clients.to_device(leaves.stack(adapters)), clients.to_device(stack_examples(examples))
        )
        per_client = zip(*(v.tolist() for v in statistics.values()), strict=True)
        yield from (dict(zip(statistics, own, strict=True)) for own in per_client)

    def validation(self, state: ServerState) -> dict[str, Any]:
        """Every training client's validation data under its own model, after a round."""
        memory, batches = (
            self.clients.memory,
            self._precomputed_validation or self._iter_validation(),
        )
        model_batches = (
            (self.get_client_model(state, memory.get(c, {}), c), own)
            for c, own in enumerate(batches)
        )
        return sum_statistics(
            dict(zip(self.names, self.evaluate_clients(model_batches), strict=False))
        )

    def _iter_validation(self) -> Iterator[Batch]:
        """Of each training client: newcomers are the last."""
        num_participants = len(self.holdings) - self.settings.federation.unseen_clients
        return (self.clients.shards[c].validation for c in range(num_participants))

    @cached_property
    def _precomputed_validation(self) -> list[Batch] | None:
        """The same, as every round meets it again."""
        return self.clients.precompute(self._iter_validation())

    def _make_recipe(self, round_: int) -> Recipe:
        t, algorithm = self.settings.training, self.algorithm
        rate = get_learning_rate(self.settings, algorithm, round_)
        trains = algorithm.make_trained_filter(list(self.task.model.leaf_shapes()), round_)
        surveys = algorithm.surveys(round_)
        return Recipe(make_optimizer_factory(t, rate), t.clip, trains, algorithm.corrects, surveys)


def split_by_folder(adapter: Leaves) -> dict[str, Leaves]:
    """The server's adapter by the names of its folders: one, or one a cluster."""
    clusters = {f"cluster-{k}": own for k, own in split_clusters(adapter).items()}
    return clusters or {"global": adapter}


def sum_statistics(sums_by_client: Mapping[str, Sums]) -> dict[str, Any]:
    """Clients' sums together; and the mean of each, by its name."""
    names = dict.fromkeys(k for own in sums_by_client.values() for k in own)
    total = {k: sum(own[k] for own in sums_by_client.values()) for k in names}
    return {
        **total,
        "clients": {name: s["total"] / s["count"] for name, s in sums_by_client.items()},
    }


def build(settings: Settings) -> Experiment:
    """Load the data and the backbone, and fit the one to the other.

    Raises:
        FedGenError: anything in the settings that cannot be carried out.
    """
    check(settings)
    device = hardware.device(settings.engine.device)
    settings = fit_ranks(settings, device)
    algorithm = make_algorithm(settings.method, adapter=settings.adapter)
    baselines = [
        make_algorithm(
            replace(settings.method, name=name), "evaluation.baselines", settings.adapter
        )
        for name in settings.evaluation.baselines
    ]
    if settings.evaluation.tensorboard and not find_spec("tensorboard"):
        raise MissingExtraError("evaluation.tensorboard=true", "tensorboard")
    _check_workers(settings)
    hardware.set_threads(settings.engine.threads)
    federation, seed = settings.federation, settings.federation.seed
    corpus = assign_labels(sources.read(settings.data), settings.partition, seed)
    settings = with_image_metadata(settings, corpus)
    holdings = partition(corpus, settings.data, settings.partition, federation.clients, seed)
    check_held_out(holdings)
    cohort = cohort_size(federation, len(holdings))
    task = make_task(settings, device)
    _check_judging(settings, task, len(holdings), device)
    _check_candidates(settings)
    schedule.check(federation, settings.devices, (algorithm, *baselines), len(holdings))
    for method_algorithm in (algorithm, *baselines):
        check_method(method_algorithm, task)
        check_cohort_size(method_algorithm.clusters, cohort)
    clients = Clients(task, algorithm, make_shards(task, corpus, holdings, settings), seed, device)
    experiment = with_wire(Experiment(settings, task, corpus, holdings, clients))
    experiment = replace(experiment, settings=_resolve_settings(experiment, cohort))
    if settings.engine.name != "ray":
        return experiment
    from fedgen_edge.runs.ray_workers import connect_workers

    return connect_workers(experiment)


def with_wire(experiment: Experiment) -> Experiment:
    """The same, with its settings' ways for leaves to travel."""
    new_wire = (
        Wire()
        if experiment.algorithm.pools_data
        else build_wire(experiment.settings, experiment.start)
    )
    return replace(experiment, clients=replace(experiment.clients, wire=new_wire))


def build_wire(settings: Settings, start: Callable[[], ServerState]) -> Wire:
    """How leaves travel by these settings, from a server that starts so."""
    base = start().adapter if settings.downlink != Compression() else {}
    return make_wire(settings.uplink, settings.downlink, settings.federation.seed, base)


def select_drawn_leaves(settings: Settings, algorithm: Algorithm, start_adapter: Leaves) -> Leaves:
    """Of the adapter before the first round, what all machines draw for themselves, and alike.

    What is never sent begins so. Where what goes down is a change since then, that is all of it.
    """
    if settings.downlink != Compression():
        return start_adapter
    shared_leaves = algorithm.select_shared(start_adapter)
    return {k: v for k, v in start_adapter.items() if k not in shared_leaves}


def with_image_metadata(settings: Settings, corpus: Corpus) -> Settings:
    """The settings with the pictures' size, and the names of their classes: samples have both."""
    if not isinstance(corpus.examples, Images):
        return settings
    names = corpus.examples.classes
    for prompt in settings.evaluation.prompts:
        if prompt not in names:
            raise ConfigError(
                f"evaluation.prompts={prompt!r} is no class of pictures: {', '.join(names)} are"
            )
    height, width = corpus.examples.pixels.shape[-2:]
    size = settings.data.size or (height if height == width else None)
    return replace(settings, data=replace(settings.data, names=names, size=size))


def make_task(settings: Settings, device: torch.device) -> TrainableTask:
    """The task of these settings, with the leaves that its method adapts."""
    full = make_algorithm(settings.method).adapts == "full"
    return TASKS[settings.task](settings, full=full, device=device)


def check_method(algorithm: Algorithm, task: TrainableTask) -> None:
    """Refuse now what a method would refuse in its first round."""
    algorithm.sends(list(task.model.leaf_shapes()), None)


def _check_workers(settings: Settings) -> None:
    """Workers are Ray's, which is an extra."""
    engine = settings.engine
    if engine.name == "ray":
        if not find_spec("ray"):
            raise MissingExtraError("engine.name='ray'", "ray")
        return
    worker_settings = {
        "address": engine.address,
        "workers": engine.workers,
        "aggregate_on_workers": engine.aggregate_on_workers or None,
    }
    for name, value in worker_settings.items():
        if value is not None:
            raise ConfigError(
                f"engine.{name}={value!r} is of workers, and engine.name={engine.name!r} has none: "
                "say engine.name='ray', or leave it out"
            )


def _check_candidates(settings: Settings) -> None:
    """Methods in one table see the same batches; each would choose clients by its own losses."""
    is_only_method = settings.method.name != "centralised" and not settings.evaluation.baselines
    if settings.federation.power_of_choice is not None and not is_only_method:
        raise ConfigError(
            f"federation.power_of_choice={settings.federation.power_of_choice} chooses clients by "
            "a method's own losses, so methods beside each other would see other batches, and "
            "`centralised` has but one loss: leave evaluation.baselines out, and run each "
            "method by itself"
        )


def _check_judging(
    settings: Settings, task: TrainableTask, clients: int, device: torch.device
) -> None:
    """Refuse now what judging by samples would refuse after the last round."""
    image_metrics = settings.image_metrics
    if image_metrics.features is None:
        return
    if not isinstance(task, ImageTask):
        raise ConfigError(
            f"image_metrics.features={image_metrics.features!r} sees pictures, and "
            f"task={settings.task!r} makes "
            "none: leave it out"
        )
    if image_metrics.samples < 2 * clients:
        raise ConfigError(
            f"image_metrics.samples={image_metrics.samples} must be at least {2 * clients}, two "
            "for each client"
        )
    make_extractor(image_metrics.features, image_metrics.weights, device)


def check_held_out(holdings: Sequence[ClientSplits]) -> None:
    """Refuse holdings on which nothing could be judged."""
    for part in ("validation", "test"):
        lacking = [holding.name for holding in holdings if not getattr(holding, part)]
        if lacking:
            raise ConfigError(
                f"data.{part}=0 leaves {len(lacking)} clients, {lacking[0]!r} first, nothing to be "
                "judged on: give it a share, such as 0.1"
            )


def with_method(experiment: Experiment, name: str) -> Experiment:
    """The same data, batches and budget with another method."""
    settings = replace(experiment.settings, method=replace(experiment.settings.method, name=name))
    algorithm = make_algorithm(settings.method, adapter=settings.adapter)
    task, clients = experiment.task, replace(experiment.clients, algorithm=algorithm, memory={})
    if (algorithm.adapts == "full") == task.model.is_stackable:
        task = make_task(settings, clients.device)
        clients = replace(clients, task=task)
    return with_wire(replace(experiment, settings=settings, task=task, clients=clients))


def make_shards(
    task: TrainableTask, corpus: Corpus, holdings: Sequence[ClientSplits], settings: Settings
) -> Shards:
    """Every client's examples, encoded and packed, one client after the other."""

    def pack(indices: Sequence[int], max_rows: int = 0) -> Batch:
        return subsample_evenly(task.examples(corpus, indices), max_rows)

    e = settings.evaluation
    return Shards(
        Shard(h.name, pack(h.train), pack(h.validation, e.blocks), pack(h.test, e.test_blocks))
        for h in holdings
    )


def _resolve_settings(experiment: Experiment, cohort: int) -> Settings:
    """The settings with all that the machine decided written into them."""
    settings, clients = experiment.settings, experiment.clients
    precision = "bf16" if experiment.task.model.dtype == torch.bfloat16 else "float32"
    can_stack = settings.engine.name != "serial" and experiment.task.model.is_stackable
    step = _get_largest_step(experiment)
    stack = min(cohort, settings.engine.stack or hardware.stack_size(*step)) if can_stack else None
    if settings.engine.threads is None and settings.engine.name != "ray":
        hardware.choose_threads(*step, stack)
    return replace(
        settings,
        backbone=replace(
            settings.backbone,
            precision=precision,
            path=_make_absolute(settings.backbone.path),
            autoencoder=_make_absolute(settings.backbone.autoencoder),
        ),
        adapter=replace(settings.adapter, initial=_make_absolute(settings.adapter.initial)),
        data=replace(settings.data, path=_make_absolute(settings.data.path)),
        image_metrics=replace(
            settings.image_metrics, weights=_make_absolute(settings.image_metrics.weights)
        ),
        federation=replace(
            settings.federation, clients=len(experiment.holdings), cohort=cohort, fraction=None
        ),
        engine=replace(
            settings.engine,
            name=_choose_engine(settings.engine.name, can_stack),
            stack=stack,
            device=str(clients.device),
            threads=torch.get_num_threads(),
        ),
    )


def _choose_engine(requested: str, can_stack: bool) -> Literal["serial", "stacked", "ray"]:
    if requested == "ray":
        return "ray"
    return "stacked" if can_stack else "serial"


def _make_absolute(path: Any) -> Any:
    """A path that is there, from the root; a name as it is."""
    if path in {None, "tiny"} or not Path(path).exists():
        return path
    return type(path)(Path(path).resolve())


def _get_largest_step(experiment: Experiment) -> tuple[Task, Leaves, Batch]:
    """What one client's step takes: its task and adapter, and the batch of the largest client."""
    clients, batch = experiment.clients, experiment.settings.training.batch
    examples = max((shard.train for shard in clients.shards), key=count_rows)
    adapter = clients.to_device(
        clients.algorithm.get_personal_model(experiment.start().adapter, {})
    )
    step_batch = experiment.task.draw(subsample_evenly(examples, batch), generator(0))
    return experiment.task, adapter, clients.to_device(step_batch)
