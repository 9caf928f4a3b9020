"""From settings to the parts of a run; nothing is written, so a mistake costs nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
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
from fedgen_edge.leaves import stack
from fedgen_edge.rounds import Engine, cohort_size
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import Language
from fedgen_edge.tasks.language import build as language
from fedgen_edge.types import Leaves, ServerState

TASKS = {"language": language}

CPU_TOKENS = 2048
"""Tokens in one step beyond which a CPU gains nothing from a larger stack."""


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
        method(replace(settings.method, name=name))
    device = resolve_device(settings)
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


def resolve_device(settings: Settings) -> torch.device:
    """The device of the settings.

    Raises:
        ConfigError: there is none such.
    """
    name = settings.engine.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"engine.device={name!r} is not on this machine: say cpu, or auto"
        ) from None
    return device


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
            stack=(settings.engine.stack or _stack(experiment, cohort)) if can_stack else None,
            device=str(clients.device),
            threads=torch.get_num_threads(),
        ),
    )


def _absolute(path: Any) -> Any:
    """A path that is there, from the root; a name as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _stack(experiment: Experiment, cohort: int) -> int:
    """Clients in one stack: what half of the free memory holds, measured on one client's batch."""
    settings, clients = experiment.settings, experiment.clients
    budget = Budget(settings.training.batch, steps=1)
    examples = max((s.train for s in clients.shards), key=lambda e: len(e["words"]))
    batch = {k: v[: budget.batch].to(clients.device) for k, v in examples.items()}
    adapter = experiment.task.init(generator(0))
    kept = saved_bytes(experiment.task, clients.place(adapter), batch)
    own = sum(v.numel() * v.element_size() for v in adapter.values())
    each = int(1.5 * kept) + 6 * own
    free = (
        torch.cuda.mem_get_info(clients.device)[0]
        if clients.device.type == "cuda"
        else psutil.virtual_memory().available
    )
    most = free // 2 // each
    if clients.device.type == "cpu":
        most = min(most, CPU_TOKENS // max(1, batch["mask"].numel()))
    return int(min(cohort, max(1, most)))


def saved_bytes(task: Language, adapter: Leaves, batch: dict[str, Tensor]) -> int:
    """Bytes that one client's forward pass keeps for its backward pass."""
    seen: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in task.module.parameters()}

    def pack_(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    one = {k: v.requires_grad_() for k, v in stack([adapter]).items()}
    rows = {k: v.unsqueeze(0) for k, v in batch.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
        task.loss(one, rows, task.phases[0].prefix)
    return sum(seen.values())
