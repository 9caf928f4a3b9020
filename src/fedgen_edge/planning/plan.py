"""Plan the cost of a run with some settings, part by part, and what breaks first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedgen_edge.algorithms.methods import check, make_algorithm
from fedgen_edge.compression.serialize import count_encoded_bytes
from fedgen_edge.config import Settings
from fedgen_edge.data.partition import DEFAULT_CLIENTS
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.schedule import cohort_size
from fedgen_edge.planning import limits
from fedgen_edge.planning.clock import TimeEstimate, estimate_time
from fedgen_edge.planning.limits import ResourceLimit, Resources
from fedgen_edge.planning.memory import (
    Precision,
    StepMemory,
    StepPlan,
    count_training_step,
    count_weight_bytes,
    get_dtype,
)
from fedgen_edge.planning.speed import Speed
from fedgen_edge.planning.traffic import (
    ClientTraffic,
    RoundTraffic,
    estimate_rounds,
    estimate_server_bytes,
    make_client_traffic,
    set_step_time,
)
from fedgen_edge.tasks.backbones.loading import describe
from fedgen_edge.tasks.language.config_only import (
    build_from_config,
    count_layers,
    find_linear_weights,
    load_config,
)
from fedgen_edge.tasks.language.task import Language, check_length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a client's training, without libraries."""

    backbone: int
    """Frozen weights, and one dequantized matrix if they are quantized."""
    adapter: int
    """The received adapter and the trained one."""
    optimiser: int
    gradients: int
    activations: int
    """The rest of a step's peak."""
    total: int
    checkpointed: int
    """The total if layers are recomputed in the backward pass."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the backbone and its adapter."""

    path: str
    kind: str
    """Transformers' `model_type`."""
    layers: int
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    """One whole adapter, as it is sent without compression."""
    full_bytes: int
    """The whole model in float32, as full-model FedAvg sends it."""
    targets: tuple[str, ...]


@dataclass(frozen=True)
class TrafficEstimate:
    """Bytes sent; means over rounds if these differ."""

    exact: bool
    """Whether a run will record exactly these; with zstd they are upper bounds."""
    client_down: int
    client_up: int
    round_down: float
    round_up: float
    total_down: int
    total_up: int
    full: int
    """Bytes that full-model FedAvg sends in as many payloads, in both directions."""


@dataclass(frozen=True)
class Plan:
    """The whole plan; these fields are the keys of its JSON."""

    model: ModelFacts
    clients: int
    cohort: int
    rounds: int
    steps: int | None
    """Steps of one client in a round."""
    traffic: TrafficEstimate
    memory: dict[str, MemoryEstimate]
    """By precision of the backbone; `stack` is for engine.stack clients at once."""
    step: StepMemory
    """Bytes and work of one step, without the backbone."""
    time: TimeEstimate
    server: dict[str, int]
    """Bytes by part."""
    breaks: list[ResourceLimit]
    """Limits, the tightest first."""
    says: str
    """What breaks first, and what would help."""


def make_plan(settings: Settings, resources: Resources, speed: Speed | None) -> Plan:
    """Plan a run with these settings, without reading weights or data.

    Args:
        settings: settings of the run, as `fedgen run` has them.
        resources: available memory, links and examples.
        speed: speed of the clients' machines, if devices.steps_per_second does not set it.

    Raises:
        ConfigError: the settings cannot be carried out, or are not enough for a plan.
    """
    check(settings)
    if settings.task != "language":
        raise ConfigError(f"task={settings.task!r}: `fedgen plan` knows language models so far")
    config = load_config(settings.backbone)
    check_length(settings, config)
    algorithm = make_algorithm(settings.method, adapter=settings.adapter)
    task = _build_outline(settings, config, full=algorithm.adapts == "full")
    shapes, leaves = task.model.shapes(), task.model.leaf_shapes()
    algorithm.sends(list(leaves), None)  # raises if it cannot share these
    steps, clients = _count_steps(settings, resources), count_clients(settings)
    step, checkpointed_step = (
        _count_step(settings, config, checkpointing=c) for c in (False, True)
    )
    linear_weights = find_linear_weights(task)
    memory = {
        precision: _make_memory_estimate(
            count_weight_bytes(shapes, linear_weights, precision), step, checkpointed_step
        )
        for precision in _list_precisions(settings)
    }
    if settings.engine.stack:
        stack_steps = [
            _count_step(settings, config, settings.engine.stack, checkpointing=c)
            for c in (False, True)
        ]
        memory["stack"] = _make_memory_estimate(next(iter(memory.values())).backbone, *stack_steps)
    source = (
        "devices.steps_per_second"
        if settings.devices.steps_per_second or not speed
        else speed.source
    )
    devices = set_step_time(
        settings.devices, speed.estimate_seconds(step.cost) if speed and steps else None
    )
    settings = replace(settings, devices=devices)
    client_traffic = make_client_traffic(settings, algorithm, leaves, clients)
    round_traffic = [*estimate_rounds(settings, client_traffic, clients, steps or 0)]
    cohort = cohort_size(settings.federation, clients)
    server = estimate_server_bytes(client_traffic, algorithm.buffer or cohort)
    model = ModelFacts(
        settings.backbone.path, config.model_type, count_layers(config), _count_values(shapes),
        _count_values(leaves), count_encoded_bytes(leaves), count_encoded_bytes(shapes),
        _list_targets(task),
    )  # fmt: skip
    traffic = _make_traffic_estimate(settings, client_traffic, round_traffic, model.full_bytes)
    time = estimate_time(settings, client_traffic, round_traffic, speed, server["updates"], steps)
    time = replace(time, source=source if time.step else "")
    resource_limits = limits.find_limits(settings, resources, memory, server, (traffic, time))
    return Plan(
        model, clients, cohort, len(round_traffic), steps, traffic, memory, step, time, server,
        resource_limits, limits.describe_nearest_limit(resource_limits),
    )  # fmt: skip


def count_clients(settings: Settings) -> int:
    """Count the clients, as far as that is known without data."""
    partition, num_clients = settings.partition, settings.federation.clients
    if num_clients is not None:
        return num_clients
    if partition.by == "group" and settings.data.source != "docstrings":
        raise ConfigError(
            "federation.clients is not said, and `fedgen plan` reads no data to count them: say "
            "how many there are"
        )
    default_counts = {
        "group": len(settings.data.packages),
        "pooled": 1,
        "size": len(partition.sizes) or DEFAULT_CLIENTS,
    }
    return default_counts.get(partition.by, DEFAULT_CLIENTS)


def _count_steps(settings: Settings, resources: Resources) -> int | None:
    training = settings.training
    if training.steps or not resources.examples:
        return training.steps
    return training.epochs * -(-resources.examples // training.batch)


def _list_precisions(settings: Settings) -> tuple[Precision, ...]:
    """List the precisions, that of the settings first; `auto` is bf16, as on today's devices."""
    if settings.backbone.precision == "float32":
        return ("float32", "int8", "int4")
    return ("bf16", "int8", "int4")


def _build_outline(settings: Settings, config: Any, *, full: bool) -> Language:
    try:
        with torch.device("meta"):
            return build_from_config(config, settings.adapter, torch.bfloat16, full=full)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(
            f"backbone.path={settings.backbone.path!r}, a {config.model_type}, cannot be made of "
            f"its config.json ({describe(error, 120)}): correct it, or take another"
        ) from None


def _count_step(
    settings: Settings, config: Any, clients: int = 0, *, checkpointing: bool
) -> StepMemory:
    training = settings.training
    step_plan = StepPlan(training.batch, settings.data.length, clients, checkpointing)
    try:
        return count_training_step(
            settings, config, step_plan, get_dtype(_list_precisions(settings)[0])
        )
    except RuntimeError as error:
        raise ConfigError(
            f"backbone.path={settings.backbone.path!r}, a {config.model_type}, cannot be counted "
            f"without its weights ({describe(error, 120)}): take another"
        ) from None


def _make_memory_estimate(
    backbone: int, step: StepMemory, checkpointed_step: StepMemory
) -> MemoryEstimate:
    return MemoryEstimate(
        backbone,
        adapter=round(step.adapter),
        optimiser=round(step.optimiser),
        gradients=round(step.gradients),
        activations=round(step.activations),
        total=backbone + math.ceil(step.peak),
        checkpointed=backbone + math.ceil(checkpointed_step.peak),
    )


def _count_values(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _list_targets(task: Any) -> tuple[str, ...]:
    return getattr(task.model.adapter, "targets", ("every weight",))


def _make_traffic_estimate(
    settings: Settings,
    client_traffic: ClientTraffic,
    round_traffic: Sequence[RoundTraffic],
    full: int,
) -> TrafficEstimate:
    down, up = sum(r.bytes_down for r in round_traffic), sum(r.bytes_up for r in round_traffic)
    payloads = sum(r.started + r.merged for r in round_traffic)
    has_zstd = bool(settings.uplink.zstd or settings.downlink.zstd)
    first_sending_round = next(
        (r for r in range(len(round_traffic)) if client_traffic.count_up_bytes(0, r)), 0
    )
    return TrafficEstimate(
        exact=not has_zstd and settings.federation.power_of_choice is None,
        client_down=client_traffic.count_down_bytes(0),
        client_up=client_traffic.count_up_bytes(0, first_sending_round),
        round_down=down / len(round_traffic),
        round_up=up / len(round_traffic),
        total_down=down,
        total_up=up,
        full=payloads * full,
    )
