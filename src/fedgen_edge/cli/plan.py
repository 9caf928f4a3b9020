"""`fedgen plan`: parse, call, print, as `cli` does."""

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from fedgen_edge.cli.arguments import parse, pop_recipe
from fedgen_edge.config import Settings
from fedgen_edge.errors import ConfigError

if TYPE_CHECKING:
    from fedgen_edge.planning.speed import Speed

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Say what a run will take, before anything is bought: bytes, memory and time.

    `fedgen plan RECIPE.toml` takes its settings from a file; every one can be overridden here.
    Of the backbone its config.json is enough, or a well-known model's name, such as
    `--backbone.path Llama-3.1-8B`. Links and speeds are those of `--devices`.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    memory: float | None = None
    """GB of a client's device."""
    server_memory: float | None = None
    """GB of the server."""
    server_link: float | None = None
    """Bytes a second of the server, both ways together."""
    examples: int | None = None
    """Blocks of text that a client trains on, where training.steps does not say how long."""
    calibrate: bool = False
    """Time small models on this machine first, for a minute at most; it is remembered."""
    flops: float | None = None
    """FLOPs a second of a client's device, instead of this machine's calibration."""
    json: bool = False
    """Print JSON."""


def plan(args: list[str]) -> None:
    """`fedgen plan [RECIPE] [--memory GB] [--json] [--part.setting value ...]`."""
    _, settings = pop_recipe(args)
    options = parse(Plan, args, "plan", Plan(settings))
    for name in ("memory", "server_memory", "server_link", "examples", "flops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be above 0, and finite")
    from rich.console import Console

    from fedgen_edge.planning.limits import Resources
    from fedgen_edge.planning.plan import make_plan as planned
    from fedgen_edge.planning.table import make_table

    limits = Resources(
        options.memory and GB * options.memory,
        options.server_memory and GB * options.server_memory,
        options.server_link,
        options.examples,
    )
    estimate = planned(options.settings, limits, _choose_speed(options))
    if options.json:
        print(json.dumps(dataclasses.asdict(estimate), indent=1))
        return
    Console().print(make_table(estimate))


def _choose_speed(options: Plan) -> "Speed | None":
    from fedgen_edge import hardware
    from fedgen_edge.planning import speed
    from fedgen_edge.tasks.backbones.pretrained import choose_dtype

    if options.flops:
        return speed.Speed(0.0, 0.0, 1 / options.flops, 0.0, "--flops")
    engine = options.settings.engine
    device = hardware.device(engine.device)
    hardware.set_threads(engine.threads)
    dtype = choose_dtype(options.settings.backbone, device)
    if options.calibrate:
        return speed.calibrate(options.settings, dtype, device)
    return speed.load_speed(dtype, device)
