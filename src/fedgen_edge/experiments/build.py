"""From settings to the parts of a run; nothing is written, so a mistake costs nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.correct import proximal, unchanged
from fedgen_edge.algorithms.methods import method
from fedgen_edge.client import Clients, Patience, Personalise, Recipe, Train
from fedgen_edge.config import Settings, Training, learning_rate
from fedgen_edge.data import sources
from fedgen_edge.data.batches import Budget, Shard, head, pack
from fedgen_edge.data.partition import Holding, labels_of, partition
from fedgen_edge.data.sources import Corpus
from fedgen_edge.engines.serial import serial
from fedgen_edge.engines.stacked import stacked
from fedgen_edge.errors import ConfigError
from fedgen_edge.experiments import machine
from fedgen_edge.rounds import Engine, cohort_size
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import Language
from fedgen_edge.tasks.language import build as language
from fedgen_edge.types import Leaves, ServerState

TASKS = {"language": language}


@dataclass(frozen=True)
class Experiment:
    """A run, ready to go."""

    settings: Settings
    """Resolved: nothing in them is left to the machine."""
    task: Language
    algorithm: Algorithm
    corpus: Corpus
    holdings: Sequence[Holding]
    labels: Sequence[str] | None
    """Of each example, for the picture of who holds what."""
    clients: Clients

    @property
    def names(self) -> list[str]:
        """The clients' names, in their order."""
        return [holding.name for holding in self.holdings]

    @property
    def engine(self) -> Engine:
        """The engine of the settings; a method whose leaves cannot be stacked runs serially."""
        settings = self.settings.engine
        if settings.name == "serial" or not self.task.stackable:
            return serial
        return stacked(settings.stack or 1)

    @property
    def train(self) -> Train:
        """What clients do in a round."""
        t = self.settings.training
        budget = Budget(t.batch, 1 if t.steps else t.epochs, t.steps)
        return Train(self.clients, self.algorithm, budget, self._recipe)

    @property
    def tune(self) -> Personalise:
        """What clients do after the last round."""
        t, p = self.settings.training, self.settings.personal
        corrects = proximal(p.pull) if p.pull else unchanged
        recipe = Recipe(optimiser(t, p.lr), t.clip, corrects=corrects)
        budget = Budget(t.batch, p.epochs, p.steps)
        return Personalise(self.clients, budget, recipe, Patience(p.patience, p.fallback))

    def start(self) -> ServerState:
        """The server before the first round."""
        rng = generator(self.settings.federation.seed, "init")
        return self.algorithm.init(self.task.init(rng))

    def own(self, state: ServerState, memory: Leaves) -> Leaves:
        """A client's model as the rounds left it: the global adapter and what it has kept."""
        return self.algorithm.receives(state.adapter, memory)

    def _recipe(self, round_: int) -> Recipe:
        t = self.settings.training
        rate = learning_rate(t, round_, self.settings.federation.rounds)
        algorithm = self.algorithm

        def trains(name: str, epoch: int) -> bool:
            return algorithm.trains(name, round_, epoch)

        return Recipe(optimiser(t, rate), t.clip, trains, algorithm.corrects)


def optimiser(settings: Training, rate: float) -> Callable[[Sequence[Tensor]], Optimizer]:
    """A factory of torch's optimisers."""
    if settings.optimiser == "sgd":
        decay, momentum = settings.weight_decay, settings.momentum
        return partial(SGD, lr=rate, momentum=momentum, weight_decay=decay)
    return partial(AdamW, lr=rate, weight_decay=settings.weight_decay)


def build(settings: Settings) -> Experiment:
    """Load the data and the backbone, and fit the one to the other.

    Raises:
        FedGenError: anything in the settings that cannot be carried out.
    """
    algorithm = method(settings.method)
    for name in settings.evaluation.baselines:
        method(replace(settings.method, name=name), "evaluation.baselines")
    device = machine.device(settings.engine.device)
    torch.set_num_threads(settings.engine.threads or torch.get_num_threads())
    corpus = sources.read(settings.data)
    federation, seed = settings.federation, settings.federation.seed
    holdings = partition(corpus, settings.data, settings.partition, federation.clients, seed)
    cohort = cohort_size(federation, len(holdings))
    task = TASKS[settings.task](settings, full=algorithm.adapts == "full", device=device)
    if settings.engine.name == "stacked" and not task.stackable:
        raise ConfigError(
            f"engine.name='stacked' cannot carry method.name={settings.method.name!r}, which "
            "trains a whole model for each client: say serial, or auto"
        )
    clients = Clients(task, shards(task, corpus, holdings, settings), seed, device)
    experiment = Experiment(
        settings,
        task,
        algorithm,
        corpus,
        holdings,
        labels_of(corpus, settings.partition, seed),
        clients,
    )
    return replace(experiment, settings=_resolved(experiment, cohort))


def beside(experiment: Experiment, name: str) -> Experiment:
    """The same data, batches and budget with another method."""
    settings = replace(experiment.settings, method=replace(experiment.settings.method, name=name))
    algorithm = method(settings.method)
    task, clients = experiment.task, experiment.clients
    if (algorithm.adapts == "full") == task.stackable:
        full = algorithm.adapts == "full"
        task = TASKS[settings.task](settings, full=full, device=clients.device)
        clients = replace(clients, task=task)
    return replace(experiment, settings=settings, algorithm=algorithm, task=task, clients=clients)


def shards(
    task: Language, corpus: Corpus, holdings: Sequence[Holding], settings: Settings
) -> list[Shard]:
    """Every client's examples, encoded and packed."""
    coded = task.encode(corpus.texts)

    def packed(indices: Sequence[int], most: int = 0) -> dict[str, Tensor]:
        documents = [coded[i] for i in indices]
        counted = [corpus.words[i] for i in indices]
        return head(pack(documents, counted, settings.data.length), most)

    e = settings.evaluation
    return [
        Shard(
            h.name, packed(h.train), packed(h.validation, e.blocks), packed(h.test, e.test_blocks)
        )
        for h in holdings
    ]


def _resolved(experiment: Experiment, cohort: int) -> Settings:
    """The settings with all that the machine decided written into them."""
    settings, clients = experiment.settings, experiment.clients
    precision = "bf16" if experiment.task.module.dtype == torch.bfloat16 else "float32"
    can_stack = settings.engine.name != "serial" and experiment.task.stackable
    return replace(
        settings,
        backbone=replace(
            settings.backbone, precision=precision, path=_absolute(settings.backbone.path)
        ),
        data=replace(settings.data, path=_absolute(settings.data.path)),
        federation=replace(
            settings.federation, clients=len(experiment.holdings), cohort=cohort, fraction=None
        ),
        engine=replace(
            settings.engine,
            name="stacked" if can_stack else "serial",
            stack=min(cohort, settings.engine.stack or _stack(experiment)) if can_stack else None,
            device=str(clients.device),
            threads=torch.get_num_threads(),
        ),
    )


def _absolute(path: Any) -> Any:
    """A path that is there, from the root; a name as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _stack(experiment: Experiment) -> int:
    """Clients that fit in one stack, by the batch of the largest."""
    clients, rows = experiment.clients, experiment.settings.training.batch
    examples = max((s.train for s in clients.shards), key=lambda e: len(e["words"]))
    adapter = clients.place(experiment.task.init(generator(0)))
    return machine.stack_size(experiment.task, adapter, clients.place(head(examples, rows)))
