"""A plan for the eye: one table that 80 columns hold."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from fedgen_edge.planning.plan import Memory, Plan

Row = tuple[str, str]


def table(of: Plan) -> Table:
    """What is needed, part by part."""
    found = Table(title=f"{of.model.path}: what it takes", title_justify="left", box=None)
    found.add_column("", no_wrap=True)
    found.add_column("", overflow="fold")
    for section in (_model(of), _bytes(of), _memory(of), _time(of), _server(of)):
        for name, value in section:
            found.add_row(escape(name), escape(value))
        found.add_section()
        found.add_row("", "")
    found.add_row("breaks first", escape(of.says))
    return found


def _model(of: Plan) -> Iterator[Row]:
    model = of.model
    yield "backbone", f"{model.kind}, {model.layers} layers, {model.parameters:,} parameters"
    whole = f"{model.adapter_parameters:,} parameters, {amount(model.adapter_bytes)}"
    yield "adapter", f"{whole} ({', '.join(model.targets)})"
    yield "clients", f"{of.clients}, {of.cohort} a round, {of.rounds} rounds"


def _bytes(of: Plan) -> Iterator[Row]:
    t = of.traffic
    most = "" if t.exact else ", at most"
    yield "a payload", f"{amount(t.client_down)} down, {amount(t.client_up)} up{most}"
    yield "a round", f"{amount(t.round_down)} down, {amount(t.round_up)} up{most}"
    yield "all rounds", f"{amount(t.total_down)} down, {amount(t.total_up)} up{most}"
    saved = 1 - (t.total_down + t.total_up) / t.full if t.full else 0.0
    yield "full FedAvg", f"{amount(t.full)} both ways; {saved:.2%} of it saved"


def _memory(of: Plan) -> Iterator[Row]:
    own: Memory = next(iter(of.memory.values()))
    yield "a client holds", f"{amount(own.adapter)} of adapter, received and trained"
    yield "", f"{amount(own.gradients)} of gradients, {amount(own.optimiser)} of moments"
    yield "", f"{amount(own.activations)} of activations"
    for name, memory in of.memory.items():
        again = f"{amount(memory.checkpointed)} with checkpointing"
        whole = f"{amount(memory.total)} in all, {again}"
        yield f"  {name}", f"backbone {amount(memory.backbone)}; {whole}"
    yield "", "int8, int4 and checkpointing are not built yet: what they would take"


def _time(of: Plan) -> Iterator[Row]:
    yield "a step", f"{of.step.cost.flops:.3g} FLOPs, {of.step.cost.ops:,.0f} operations"
    t = of.time
    if t.step is not None:
        yield "", f"{seconds(t.step)} ({t.source})"
    spent = {"down": t.down, "train": t.train, "up": t.up, "merge": t.merge}
    known = [f"{name} {seconds(value)}" for name, value in spent.items() if value is not None]
    if known:
        yield "slowest client", ", ".join(known)
    if t.round is not None and t.total is not None:
        yield "a round lasts", f"{seconds(t.round)}; all rounds {seconds(t.total)}"
    elif of.steps is None:
        yield "a round lasts", "not known: say training.steps, or --examples"
    else:
        yield "a round lasts", "not known: say --calibrate, --flops or devices.steps_per_second"


def _server(of: Plan) -> Iterator[Row]:
    held = of.server
    told = ", ".join(f"{name} {amount(held[name])}" for name in ("adapter", "state", "updates"))
    yield "server holds", told
    yield "server's disk", f"{amount(held['checkpoint'])} a checkpoint"


def amount(count: float | int) -> str:
    """Bytes in words."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:,.0f} {unit}"
            )
    return f"{count:.0f} bytes"


def seconds(value: float) -> str:
    """Seconds in words."""
    if value >= 7200:
        return f"{value / 3600:.3g} h"
    return f"{value:.3g} s"
