"""Show a plan as one table that fits in 80 columns."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from fedgen_edge.planning.plan import MemoryEstimate, Plan

TableRow = tuple[str, str]


def make_table(plan: Plan) -> Table:
    """Make the table of needs, part by part."""
    grid = Table(title=f"{plan.model.path}: what it takes", title_justify="left", box=None)
    grid.add_column("", no_wrap=True)
    grid.add_column("", overflow="fold")
    for section in (
        _describe_model(plan),
        _describe_traffic(plan),
        _describe_memory(plan),
        _describe_time(plan),
        _describe_server(plan),
    ):
        for name, value in section:
            grid.add_row(escape(name), escape(value))
        grid.add_section()
        grid.add_row("", "")
    grid.add_row("breaks first", escape(plan.says))
    return grid


def _describe_model(plan: Plan) -> Iterator[TableRow]:
    model = plan.model
    yield "backbone", f"{model.kind}, {model.layers} layers, {model.parameters:,} parameters"
    adapter_size = f"{model.adapter_parameters:,} parameters, {format_bytes(model.adapter_bytes)}"
    yield "adapter", f"{adapter_size} ({', '.join(model.targets)})"
    yield "clients", f"{plan.clients}, {plan.cohort} a round, {plan.rounds} rounds"


def _describe_traffic(plan: Plan) -> Iterator[TableRow]:
    traffic = plan.traffic
    qualifier = "" if traffic.exact else ", at most"
    yield (
        "a payload",
        f"{format_bytes(traffic.client_down)} down, {format_bytes(traffic.client_up)} "
        f"up{qualifier}",
    )
    yield (
        "a round",
        f"{format_bytes(traffic.round_down)} down, {format_bytes(traffic.round_up)} up{qualifier}",
    )
    yield (
        "all rounds",
        f"{format_bytes(traffic.total_down)} down, {format_bytes(traffic.total_up)} up{qualifier}",
    )
    saved_share = (
        1 - (traffic.total_down + traffic.total_up) / traffic.full if traffic.full else 0.0
    )
    yield "full FedAvg", f"{format_bytes(traffic.full)} both ways; {saved_share:.2%} of it saved"


def _describe_memory(plan: Plan) -> Iterator[TableRow]:
    run_estimate: MemoryEstimate = next(iter(plan.memory.values()))
    yield "a client holds", f"{format_bytes(run_estimate.adapter)} of adapter, received and trained"
    yield (
        "",
        f"{format_bytes(run_estimate.gradients)} of gradients, "
        f"{format_bytes(run_estimate.optimiser)} of moments",
    )
    yield "", f"{format_bytes(run_estimate.activations)} of activations"
    for name, memory in plan.memory.items():
        checkpointed_text = f"{format_bytes(memory.checkpointed)} with checkpointing"
        total_text = f"{format_bytes(memory.total)} in all, {checkpointed_text}"
        yield f"  {name}", f"backbone {format_bytes(memory.backbone)}; {total_text}"
    yield "", "int8, int4 and checkpointing are not built yet: what they would take"


def _describe_time(plan: Plan) -> Iterator[TableRow]:
    yield "a step", f"{plan.step.cost.flops:.3g} FLOPs, {plan.step.cost.ops:,.0f} operations"
    time = plan.time
    if time.step is not None:
        yield "", f"{format_seconds(time.step)} ({time.source})"
    seconds_by_part = {"down": time.down, "train": time.train, "up": time.up, "merge": time.merge}
    descriptions = [
        f"{name} {format_seconds(value)}"
        for name, value in seconds_by_part.items()
        if value is not None
    ]
    if descriptions:
        yield "slowest client", ", ".join(descriptions)
    if time.round is not None and time.total is not None:
        yield (
            "a round lasts",
            f"{format_seconds(time.round)}; all rounds {format_seconds(time.total)}",
        )
    elif plan.steps is None:
        yield "a round lasts", "not known: say training.steps, or --examples"
    else:
        yield "a round lasts", "not known: say --calibrate, --flops or devices.steps_per_second"


def _describe_server(plan: Plan) -> Iterator[TableRow]:
    server_bytes = plan.server
    description = ", ".join(
        f"{name} {format_bytes(server_bytes[name])}" for name in ("adapter", "state", "updates")
    )
    yield "server holds", description
    yield "server's disk", f"{format_bytes(server_bytes['checkpoint'])} a checkpoint"


def format_bytes(count: float | int) -> str:
    """Format bytes with a unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:,.0f} {unit}"
            )
    return f"{count:.0f} bytes"


def format_seconds(value: float) -> str:
    """Format seconds with a unit."""
    if value >= 7200:
        return f"{value / 3600:.3g} h"
    return f"{value:.3g} s"
