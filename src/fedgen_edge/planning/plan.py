"""What a run of some settings will take, part by part, and what breaks first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedgen_edge.algorithms.methods import check, method
from fedgen_edge.config import Settings
from fedgen_edge.data.partition import CLIENTS
from fedgen_edge.errors import ConfigError
from fedgen_edge.planning import limits
from fedgen_edge.planning.clock import Time, time_of
from fedgen_edge.planning.limits import Bound, Limits
from fedgen_edge.planning.memory import (
    Precision,
    Step,
    Work,
    dtype_of,
    training_step,
    weights_bytes,
)
from fedgen_edge.planning.speed import Speed
from fedgen_edge.planning.traffic import (
    Road,
    Round,
    road,
    rounds,
    server_bytes,
    timed,
)
from fedgen_edge.schedule import cohort_size
from fedgen_edge.tasks.language import Language, check_length
from fedgen_edge.tasks.loading import describe
from fedgen_edge.tasks.outline import config_of, layers, linear_weights, outlined
from fedgen_edge.uplink.transform import length


@dataclass(frozen=True)
class Memory:
    """Bytes that a client's training takes, libraries not counted."""

    backbone: int
    """Frozen weights, and the matrix that a quantised one writes out."""
    adapter: int
    """As it arrived, and as it is trained."""
    optimiser: int
    gradients: int
    activations: int
    """What the largest moment of a step holds beside."""
    total: int
    checkpointed: int
    """The total where layers are computed again on the way back."""


@dataclass(frozen=True)
class Model:
    """What is known of the backbone and its adapter."""

    path: str
    kind: str
    """Transformers' `model_type`."""
    layers: int
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    """One whole adapter, as it travels without a chain."""
    full_bytes: int
    """The whole model in float32, as full-model FedAvg sends it."""
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Traffic:
    """Bytes that travel; means of rounds where these differ."""

    exact: bool
    """Whether they are what a run will record; with zstd, they are the most."""
    client_down: int
    client_up: int
    round_down: float
    round_up: float
    total_down: int
    total_up: int
    full: int
    """What full-model FedAvg sends in as many payloads, both ways."""


@dataclass(frozen=True)
class Plan:
    """All of it; as JSON these are the keys."""

    model: Model
    clients: int
    cohort: int
    rounds: int
    steps: int | None
    """Of one client in a round."""
    traffic: Traffic
    memory: dict[str, Memory]
    """By precision of the backbone; `stack` is of the settings' engine.stack clients at once."""
    step: Step
    """Bytes and work of one step, beside the backbone."""
    time: Time
    server: dict[str, int]
    """Bytes by part."""
    breaks: list[Bound]
    """The nearest to its limit first."""
    says: str
    """What breaks first, and what would help."""


def plan(settings: Settings, told: Limits, speed: Speed | None) -> Plan:
    """What a run of these settings takes; no weights are read, and no data.

    Args:
        settings: of the run, as `fedgen run` has them.
        told: what there is of memory, links and examples.
        speed: of the clients' machines, where devices.steps_per_second does not say it.

    Raises:
        ConfigError: they cannot be carried out, or too little is said.
    """
    check(settings)
    if settings.task != "language":
        raise ConfigError(f"task={settings.task!r}: `fedgen plan` knows language models so far")
    config = config_of(settings.backbone)
    check_length(settings, config)
    algorithm = method(settings.method, adapter=settings.adapter)
    task = _outline(settings, config, full=algorithm.adapts == "full")
    shapes, leaves = task.model.shapes(), task.model.leaf_shapes()
    algorithm.sends(list(leaves), None)  # refuses what it cannot share
    steps, clients = _steps(settings, told), members(settings)
    step, again = (_trained(settings, config, checkpointing=c) for c in (False, True))
    every = {p: _memory(weights_bytes(shapes, linear_weights(task), p), step, again)
             for p in _precisions(settings)}  # fmt: skip
    if settings.engine.stack:
        stacked = [_trained(settings, config, settings.engine.stack, checkpointing=c)
                   for c in (False, True)]  # fmt: skip
        every["stack"] = _memory(next(iter(every.values())).backbone, *stacked)
    source = (
        "devices.steps_per_second"
        if settings.devices.steps_per_second or not speed
        else speed.source
    )
    devices = timed(settings.devices, speed.seconds(step.cost) if speed and steps else None)
    settings = replace(settings, devices=devices)
    on = road(settings, algorithm, leaves, clients)
    done = [*rounds(settings, on, clients, steps or 0)]
    cohort = cohort_size(settings.federation, clients)
    server = server_bytes(on, algorithm.buffer or cohort)
    model = Model(
        settings.backbone.path, config.model_type, layers(config), _values(shapes),
        _values(leaves), length(leaves), length(shapes), _targets(task),
    )  # fmt: skip
    traffic = _traffic(settings, on, done, model.full_bytes)
    time = time_of(settings, on, done, speed, server["updates"], steps)
    time = replace(time, source=source if time.step else "")
    found = limits.bounds(settings, told, every, server, (traffic, time))
    return Plan(
        model, clients, cohort, len(done), steps, traffic, every, step, time, server,
        found, limits.sentence(found),
    )  # fmt: skip


def members(settings: Settings) -> int:
    """How many clients there are, as far as that is known without data."""
    by, said = settings.partition, settings.federation.clients
    if said is not None:
        return said
    if by.by == "group" and settings.data.source != "docstrings":
        raise ConfigError(
            "federation.clients is not said, and `fedgen plan` reads no data to count them: say "
            "how many there are"
        )
    known = {
        "group": len(settings.data.packages),
        "pooled": 1,
        "size": len(by.sizes) or CLIENTS,
    }
    return known.get(by.by, CLIENTS)


def _steps(settings: Settings, told: Limits) -> int | None:
    t = settings.training
    if t.steps or not told.examples:
        return t.steps
    return t.epochs * -(-told.examples // t.batch)


def _precisions(settings: Settings) -> tuple[Precision, ...]:
    """The settings' own first; `auto` is bf16, which devices of today have."""
    if settings.backbone.precision == "float32":
        return ("float32", "int8", "int4")
    return ("bf16", "int8", "int4")


def _outline(settings: Settings, config: Any, *, full: bool) -> Language:
    try:
        with torch.device("meta"):
            return outlined(config, settings.adapter, torch.bfloat16, full=full)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(
            f"backbone.path={settings.backbone.path!r}, a {config.model_type}, cannot be made of "
            f"its config.json ({describe(error, 120)}): correct it, or take another"
        ) from None


def _trained(settings: Settings, config: Any, clients: int = 0, *, checkpointing: bool) -> Step:
    t = settings.training
    work = Work(t.batch, settings.data.length, clients, checkpointing)
    try:
        return training_step(settings, config, work, dtype_of(_precisions(settings)[0]))
    except RuntimeError as error:
        raise ConfigError(
            f"backbone.path={settings.backbone.path!r}, a {config.model_type}, cannot be counted "
            f"without its weights ({describe(error, 120)}): take another"
        ) from None


def _memory(backbone: int, step: Step, again: Step) -> Memory:
    return Memory(
        backbone,
        adapter=round(step.adapter),
        optimiser=round(step.optimiser),
        gradients=round(step.gradients),
        activations=round(step.activations),
        total=backbone + math.ceil(step.peak),
        checkpointed=backbone + math.ceil(again.peak),
    )


def _values(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _targets(task: Any) -> tuple[str, ...]:
    return getattr(task.model.adapter, "targets", ("every weight",))


def _traffic(settings: Settings, on: Road, done: Sequence[Round], full: int) -> Traffic:
    down, up = sum(r.down for r in done), sum(r.up for r in done)
    payloads = sum(r.asked + r.counted for r in done)
    chains = bool(settings.uplink.zstd or settings.downlink.zstd)
    first = next((r for r in range(len(done)) if on.up(0, r)), 0)
    return Traffic(
        exact=not chains and settings.federation.candidates is None,
        client_down=on.down(0),
        client_up=on.up(0, first),
        round_down=down / len(done),
        round_up=up / len(done),
        total_down=down,
        total_up=up,
        full=payloads * full,
    )
