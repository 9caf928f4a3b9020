"""Bytes that a client's training takes: its backbone by precision, and what a step adds to it.

A step is the one of a real run, loss, gradients and optimiser, on tensors without values. Layers of
one kind add the same to it each, so a deep model is counted with few layers and drawn out in a
straight line.
"""

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from fedgen_edge.algorithms.algorithm import Algorithm, Corrects
from fedgen_edge.algorithms.clusters import CHOICE
from fedgen_edge.algorithms.methods import method
from fedgen_edge.client import Recipe, descend, optimiser, rate_of
from fedgen_edge.config import Settings
from fedgen_edge.leaves import select, stack
from fedgen_edge.planning.count import Cost, Counter, unreal
from fedgen_edge.tasks.language import Language
from fedgen_edge.tasks.outline import (
    checkpointed,
    layers,
    linear_weights,
    outlined,
    period,
    shortened,
)
from fedgen_edge.types import VARIATE, Batch, Leaves

Precision = Literal["float32", "bf16", "int8", "int4"]
DTYPES = {"float32": torch.float32}
"""Of the arithmetic; all other precisions have bfloat16."""
FEW = 2
"""Layers, or periods of them, that a deep model is counted with at first, and one more."""
COUNTS = tuple(field.name for field in fields(Cost))
STAGES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Step:
    """What one optimiser step asks for, beside the frozen weights."""

    adapter: float
    """Bytes of the adapter as it arrived, and as it is trained."""
    optimiser: float
    """Bytes of its moments."""
    gradients: float
    """Bytes of the gradients, those that were clipped too, which stay until the next."""
    peak: float
    """Most bytes at once, all of these included."""
    cost: Cost

    @property
    def activations(self) -> float:
        """What the peak holds beside what has a name."""
        return max(0.0, self.peak - self.adapter - self.optimiser - self.gradients)


@dataclass(frozen=True)
class Work:
    """How a step is carried out."""

    rows: int
    """Blocks of text, for each client."""
    length: int
    """Tokens in each."""
    clients: int = 0
    """In a stack; 0 is one client by itself."""
    checkpointing: bool = False
    """Whether layers are computed again on the way back, from their inputs."""


def client_bytes(
    settings: Settings,
    config: Any,
    precision: Precision,
    rank: int | None = None,
    *,
    checkpointing: bool = False,
) -> int:
    """Most bytes that one client's training takes at once, backbone included, libraries not.

    Args:
        settings: of the run; the adapter, the method, and the training are theirs.
        config: of the backbone, transformers'.
        precision: of the frozen weights.
        rank: of the adapter; none is the settings'.
        checkpointing: compute layers again on the way back.
    """
    if rank is not None:
        settings = replace(settings, adapter=replace(settings.adapter, rank=rank, ranks=()))
    work = Work(settings.training.batch, settings.data.length, checkpointing=checkpointing)
    step = training_step(settings, config, work, dtype_of(precision))
    return math.ceil(backbone_bytes(config, settings, precision) + step.peak)


def dtype_of(precision: Precision) -> torch.dtype:
    """Of the arithmetic and of what is not quantised."""
    return DTYPES.get(precision, torch.bfloat16)


def backbone_bytes(config: Any, settings: Settings, precision: Precision) -> int:
    """Bytes of the frozen weights, tied ones once.

    int8 has a float32 scale for each row (LLM.int8, arXiv:2208.07339). int4 has an 8-bit scale for
    each 64 values, and a float32 for each 256 of those (QLoRA, arXiv:2305.14314). Both are of the
    linear layers but the head; and the largest of their matrices is there in bf16 as well, as each
    is written out for its product.

    Differs: neither is how `fedgen run` computes, which knows float32 and bf16.
    """
    with torch.device("meta"):
        task = outlined(config, settings.adapter, dtype_of(precision))
    return weights_bytes(task.model.shapes(), linear_weights(task), precision)


def weights_bytes(
    every: Mapping[str, Sequence[int]], linear: Mapping[str, Sequence[int]], precision: Precision
) -> int:
    """Bytes of weights of these shapes, of which the linear ones are quantised; see above."""
    plain = dtype_of(precision).itemsize
    if precision not in {"int8", "int4"}:
        return plain * sum(map(math.prod, every.values()))
    rest = plain * sum(math.prod(shape) for name, shape in every.items() if name not in linear)
    largest = max((plain * math.prod(shape[-2:]) for shape in linear.values()), default=0)
    return rest + largest + sum(_quantised(shape, precision) for shape in linear.values())


def _quantised(shape: Sequence[int], precision: Precision) -> int:
    count = math.prod(shape)
    if precision == "int8":
        return count + 4 * (count // shape[-1])
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256)


def training_step(settings: Settings, config: Any, work: Work, dtype: torch.dtype) -> Step:
    """What a step of these settings asks for.

    Raises:
        RuntimeError: torch does not know an operation of this model without values, or of this
            type.
    """
    whole, each = layers(config), period(config)
    few = FEW * each
    counted = partial(_counted, settings, work=work, dtype=dtype)
    if whole <= few + each:
        return _step(counted(config))
    less, more = (counted(shortened(config, n)) for n in (few, few + each))
    times = (whole - few - each) / each
    return _step({k: v + times * (v - less[k]) for k, v in more.items()})


def _step(found: Mapping[str, float]) -> Step:
    peak = max(found[stage] for stage in STAGES)
    cost = Cost(*(found[name] for name in COUNTS))
    return Step(found["adapter"], found["optimiser"], found["gradients"], peak, cost)


def _counted(
    settings: Settings, config: Any, *, work: Work, dtype: torch.dtype
) -> dict[str, float]:
    """A step's numbers, by name: each grows in a straight line with the layers."""
    algorithm = method(settings.method, adapter=settings.adapter)
    with unreal():
        task = outlined(config, settings.adapter, dtype, full=algorithm.adapts == "full")
        task = checkpointed(task) if work.checkpointing else task
        network = task.module.model
        counter = Counter([*network.parameters(), *network.buffers()])
        with counter:
            found = _second_step(settings, algorithm, task, work, counter)
    peaks = {stage: float(counter.stages[stage].peak) for stage in STAGES}
    cost = reduce(Cost.plus, (counter.stages[stage].cost for stage in STAGES))
    return {**peaks, **asdict(cost), **found}


def _second_step(
    settings: Settings, algorithm: Algorithm, task: Language, work: Work, counter: Counter
) -> dict[str, float]:
    """Train on two batches, and count the second, before which the optimiser has its moments."""

    def corrects(grads: Leaves, now: Leaves, begun: Leaves, memory: Leaves) -> Leaves:
        counter.enter("step")
        return algorithm.corrects(grads, now, begun, memory)

    start, told = begun(algorithm, task, work)
    made: list[Optimizer] = []
    recipe = recipe_of(settings, algorithm, start, corrects, made)
    task.module.register_forward_hook(lambda *_: counter.enter("backward"))
    batch = blank(work)
    steps = descend(task, start, told, [batch, batch], recipe)
    next(steps)
    gc.collect()  # what layers were computed again with is in cycles
    counter.stages.clear()
    held, own = counter.live, 2 * _bytes(start) + _bytes(told)
    moments = sum(_bytes(of) for one in made for of in one.state.values())
    counter.enter("forward")
    next(steps)
    rest = held - own - moments - _bytes(batch)
    return {"adapter": float(own), "optimiser": float(moments), "gradients": float(rest)}


def begun(algorithm: Algorithm, task: Language, work: Work) -> tuple[Leaves, Leaves]:
    """What a client begins from, and what it is told beside it, before the first round."""
    fresh = {k: torch.zeros(shape) for k, shape in task.model.leaf_shapes().items()}
    state = algorithm.init(fresh)
    received = algorithm.worded(state, max(1, work.clients))
    told = select(received, lambda name: name.startswith(VARIATE))
    start = algorithm.receives(
        {**state.adapter, **{k: v for k, v in received.items() if k not in told}},
        {CHOICE: torch.tensor(0.0)},
    )
    if not work.clients:
        return start, told
    return stack([start] * work.clients), stack([told] * work.clients)


def recipe_of(
    settings: Settings,
    algorithm: Algorithm,
    start: Leaves,
    corrects: Corrects,
    made: list[Optimizer],
) -> Recipe:
    """The one of that round, of the first few, in which most is trained; and what it makes."""
    names, few = list(start), range(min(4, settings.federation.rounds))
    most = max(few, key=lambda r: sum(start[k].numel() for k in names
                                      if algorithm.trains(k, r, 0)))  # fmt: skip
    rate = rate_of(settings, algorithm, most)
    trains = algorithm.training(names, most)
    torch_s = optimiser(settings.training, rate)

    def factory(values: Sequence[Tensor]) -> Optimizer:
        made.append(torch_s(values))
        return made[-1]

    return Recipe(factory, settings.training.clip, trains, corrects, algorithm.surveys(most))


def blank(work: Work) -> Batch:
    """Blocks of nothing, each one document."""
    clients = (work.clients,) if work.clients else ()
    shape = (*clients, work.rows, work.length)
    with unset_fake_temporarily():  # which epoch it is, the client looks at
        marks = {"epoch": torch.zeros(clients, dtype=torch.long)}
        marks["last"] = torch.zeros(clients, dtype=torch.bool)
    zeros = torch.zeros(shape, dtype=torch.int32)
    return {
        "tokens": zeros,
        "labels": zeros.clone(),
        "segment": torch.ones_like(zeros),
        "position": zeros + torch.arange(work.length, dtype=torch.int32),
        "mask": torch.ones(shape, dtype=torch.bool),
        **marks,
    }


def _bytes(values: Mapping[str, Any]) -> int:
    tensors = (v for v in values.values() if isinstance(v, Tensor))
    return sum(v.numel() * v.element_size() for v in tensors)
