"""Estimate the bytes of a client's training: its backbone by precision, and a step's memory.

The step is that of a real run, with loss, gradients and optimizer, on tensors without values. Each
layer of a kind adds the same amount, so a deep model is counted with a few layers and extrapolated
linearly.
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
from fedgen_edge.algorithms.ifca import CLUSTER_KEY
from fedgen_edge.algorithms.methods import make_algorithm
from fedgen_edge.config import Settings
from fedgen_edge.federation.client import Recipe, descend, get_learning_rate, make_optimizer_factory
from fedgen_edge.leaves import select, stack
from fedgen_edge.planning.count import OperationCost, OperationCounter, make_fake_mode
from fedgen_edge.tasks.language.config_only import (
    build_from_config,
    count_layers,
    enable_checkpointing,
    find_layer_period,
    find_linear_weights,
    truncate_layers,
)
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import VARIATE, Batch, Leaves

Precision = Literal["float32", "bf16", "int8", "int4"]
DTYPES = {"float32": torch.float32}
"""Types of the arithmetic; all other precisions use bfloat16."""
COUNTED_PERIODS = 2
"""A deep model is counted with this many layers, or periods of layers, and with one more."""
COST_FIELDS = tuple(field.name for field in fields(OperationCost))
STAGES = ("forward", "backward", "step")


@dataclass(frozen=True)
class StepMemory:
    """The memory of one optimizer step, in addition to the frozen weights."""

    adapter: float
    """Bytes of the received adapter and of the trained one."""
    optimiser: float
    """Bytes of the optimizer's moments."""
    gradients: float
    """Bytes of the gradients, including the clipped ones, which live until the next step."""
    peak: float
    """Peak bytes, including all of these."""
    cost: OperationCost

    @property
    def activations(self) -> float:
        """Return the peak less the named parts."""
        return max(0.0, self.peak - self.adapter - self.optimiser - self.gradients)


@dataclass(frozen=True)
class StepPlan:
    """How a step is carried out."""

    rows: int
    """Blocks of text per client."""
    length: int
    """Tokens per block."""
    clients: int = 0
    """Clients in a stack; 0 means one client without a stack."""
    checkpointing: bool = False
    """Whether layers are recomputed from their inputs in the backward pass."""


def estimate_client_bytes(
    settings: Settings,
    config: Any,
    precision: Precision,
    rank: int | None = None,
    *,
    checkpointing: bool = False,
) -> int:
    """Estimate the peak bytes of one client's training, with the backbone but without libraries.

    Args:
        settings: settings of the run, with the adapter, the method and the training.
        config: transformers' configuration of the backbone.
        precision: precision of the frozen weights.
        rank: rank of the adapter; None means that of the settings.
        checkpointing: recompute layers in the backward pass.
    """
    if rank is not None:
        settings = replace(settings, adapter=replace(settings.adapter, rank=rank, ranks=()))
    step_plan = StepPlan(settings.training.batch, settings.data.length, checkpointing=checkpointing)
    step = count_training_step(settings, config, step_plan, get_dtype(precision))
    return math.ceil(count_backbone_bytes(config, settings, precision) + step.peak)


def get_dtype(precision: Precision) -> torch.dtype:
    """Return the type of the arithmetic and of weights that are not quantized."""
    return DTYPES.get(precision, torch.bfloat16)


def count_backbone_bytes(config: Any, settings: Settings, precision: Precision) -> int:
    """Count the bytes of the frozen weights; tied ones count once.

    int8 has a float32 scale for each row (LLM.int8, arXiv:2208.07339). int4 has an 8-bit scale for
    each 64 values, and a float32 for each 256 of those (QLoRA, arXiv:2305.14314). Both apply to
    the linear layers except the head; the largest of their matrices also exists in bf16, since each
    is dequantized for its product.

    Differs: `fedgen run` uses neither; it knows float32 and bf16.
    """
    with torch.device("meta"):
        task = build_from_config(config, settings.adapter, get_dtype(precision))
    return count_weight_bytes(task.model.shapes(), find_linear_weights(task), precision)


def count_weight_bytes(
    all_shapes: Mapping[str, Sequence[int]],
    linear_shapes: Mapping[str, Sequence[int]],
    precision: Precision,
) -> int:
    """Count the bytes of weights of these shapes; the linear ones are quantized, as above."""
    item_bytes = get_dtype(precision).itemsize
    if precision not in {"int8", "int4"}:
        return item_bytes * sum(map(math.prod, all_shapes.values()))
    other_bytes = item_bytes * sum(
        math.prod(shape) for name, shape in all_shapes.items() if name not in linear_shapes
    )
    largest = max(
        (item_bytes * math.prod(shape[-2:]) for shape in linear_shapes.values()), default=0
    )
    return (
        other_bytes
        + largest
        + sum(_count_quantized_bytes(shape, precision) for shape in linear_shapes.values())
    )


def _count_quantized_bytes(shape: Sequence[int], precision: Precision) -> int:
    count = math.prod(shape)
    if precision == "int8":
        return count + 4 * (count // shape[-1])
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256)


def count_training_step(
    settings: Settings, config: Any, step_plan: StepPlan, dtype: torch.dtype
) -> StepMemory:
    """Count the memory and work of a step with these settings.

    Raises:
        RuntimeError: torch does not know an operation of this model without values, or of this
            type.
    """
    num_layers, layer_period = count_layers(config), find_layer_period(config)
    base_layers = COUNTED_PERIODS * layer_period
    count_config = partial(_count_step, settings, step_plan=step_plan, dtype=dtype)
    if num_layers <= base_layers + layer_period:
        return _make_step_memory(count_config(config))
    base_counts, larger_counts = (
        count_config(truncate_layers(config, n)) for n in (base_layers, base_layers + layer_period)
    )
    extra_periods = (num_layers - base_layers - layer_period) / layer_period
    return _make_step_memory(
        {k: v + extra_periods * (v - base_counts[k]) for k, v in larger_counts.items()}
    )


def _make_step_memory(counts: Mapping[str, float]) -> StepMemory:
    peak = max(counts[stage] for stage in STAGES)
    cost = OperationCost(*(counts[name] for name in COST_FIELDS))
    return StepMemory(counts["adapter"], counts["optimiser"], counts["gradients"], peak, cost)


def _count_step(
    settings: Settings, config: Any, *, step_plan: StepPlan, dtype: torch.dtype
) -> dict[str, float]:
    """Return a step's numbers by name; each grows linearly with the layers."""
    algorithm = make_algorithm(settings.method, adapter=settings.adapter)
    with make_fake_mode():
        task = build_from_config(config, settings.adapter, dtype, full=algorithm.adapts == "full")
        task = enable_checkpointing(task) if step_plan.checkpointing else task
        network = task.module.model
        counter = OperationCounter([*network.parameters(), *network.buffers()])
        with counter:
            byte_counts = _count_second_step(settings, algorithm, task, step_plan, counter)
    peaks = {stage: float(counter.stages[stage].peak) for stage in STAGES}
    cost = reduce(OperationCost.add, (counter.stages[stage].cost for stage in STAGES))
    return {**peaks, **asdict(cost), **byte_counts}


def _count_second_step(
    settings: Settings,
    algorithm: Algorithm,
    task: Language,
    step_plan: StepPlan,
    counter: OperationCounter,
) -> dict[str, float]:
    """Train on two batches, and count the second, since the optimizer then has its moments."""

    def corrects(grads: Leaves, current: Leaves, initial: Leaves, memory: Leaves) -> Leaves:
        counter.enter("step")
        return algorithm.corrects(grads, current, initial, memory)

    start, correction_state = make_client_start(algorithm, task, step_plan)
    optimizers: list[Optimizer] = []
    recipe = make_recipe(settings, algorithm, start, corrects, optimizers)
    task.module.register_forward_hook(lambda *_: counter.enter("backward"))
    batch = make_blank_batch(step_plan)
    steps = descend(task, start, correction_state, [batch, batch], recipe)
    next(steps)
    gc.collect()  # recomputed layers leave reference cycles
    counter.stages.clear()
    live_bytes, adapter_bytes = (
        counter.live_bytes,
        2 * _count_bytes(start) + _count_bytes(correction_state),
    )
    moment_bytes = sum(_count_bytes(of) for one in optimizers for of in one.state.values())
    counter.enter("forward")
    next(steps)
    gradient_bytes = live_bytes - adapter_bytes - moment_bytes - _count_bytes(batch)
    return {
        "adapter": float(adapter_bytes),
        "optimiser": float(moment_bytes),
        "gradients": float(gradient_bytes),
    }


def make_client_start(
    algorithm: Algorithm, task: Language, step_plan: StepPlan
) -> tuple[Leaves, Leaves]:
    """Return a client's start and the extra leaves it receives before the first round."""
    fresh = {k: torch.zeros(shape) for k, shape in task.model.leaf_shapes().items()}
    state = algorithm.init(fresh)
    received = algorithm.make_broadcast(state, max(1, step_plan.clients))
    correction_state = select(received, lambda name: name.startswith(VARIATE))
    start = algorithm.receives(
        {**state.adapter, **{k: v for k, v in received.items() if k not in correction_state}},
        {CLUSTER_KEY: torch.tensor(0.0)},
    )
    if not step_plan.clients:
        return start, correction_state
    return stack([start] * step_plan.clients), stack([correction_state] * step_plan.clients)


def make_recipe(
    settings: Settings,
    algorithm: Algorithm,
    start: Leaves,
    corrects: Corrects,
    optimizers: list[Optimizer],
) -> Recipe:
    """Make the recipe of the round, among the first few, in which most is trained."""
    names, first_rounds = list(start), range(min(4, settings.federation.rounds))
    busiest_round = max(first_rounds, key=lambda r: sum(start[k].numel() for k in names
                                      if algorithm.trains(k, r, 0)))  # fmt: skip
    rate = get_learning_rate(settings, algorithm, busiest_round)
    trains = algorithm.make_trained_filter(names, busiest_round)
    make_optimizer = make_optimizer_factory(settings.training, rate)

    def record_optimizer(values: Sequence[Tensor]) -> Optimizer:
        optimizers.append(make_optimizer(values))
        return optimizers[-1]

    return Recipe(
        record_optimizer, settings.training.clip, trains, corrects, algorithm.surveys(busiest_round)
    )


def make_blank_batch(step_plan: StepPlan) -> Batch:
    """Make a batch of blank blocks, each one document."""
    clients = (step_plan.clients,) if step_plan.clients else ()
    shape = (*clients, step_plan.rows, step_plan.length)
    with unset_fake_temporarily():  # the client reads which epoch it is
        marks = {"epoch": torch.zeros(clients, dtype=torch.long)}
        marks["last"] = torch.zeros(clients, dtype=torch.bool)
    zeros = torch.zeros(shape, dtype=torch.int32)
    return {
        "tokens": zeros,
        "labels": zeros.clone(),
        "segment": torch.ones_like(zeros),
        "position": zeros + torch.arange(step_plan.length, dtype=torch.int32),
        "mask": torch.ones(shape, dtype=torch.bool),
        **marks,
    }


def _count_bytes(values: Mapping[str, Any]) -> int:
    tensors = (v for v in values.values() if isinstance(v, Tensor))
    return sum(v.numel() * v.element_size() for v in tensors)
