"""A run, followed on the terminal: a bar, the time left, loss, held-out quality and bytes."""

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedgen_edge.adapters.full import Full
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.experiments.build import Experiment
from fedgen_edge.experiments.provenance import Made
from fedgen_edge.experiments.run import Event
from fedgen_edge.experiments.summary import number, printable
from fedgen_edge.measure import Measure


def follow(events: Iterable[Event], made: Made, told_first: str, stage: str = "federation") -> None:
    """Show each event as it comes; the run goes on as they are asked for.

    Args:
        events: of a run.
        made: by it.
        told_first: one line on what is about to run.
        stage: the first.
    """
    console = Console(markup=False)
    console.print(told_first)
    bars = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    tasks = {}
    with Progress(*bars, console=console) as progress:
        total = made.settings.federation.rounds
        tasks[stage] = progress.add_task(stage, total=total, said="")
        measure = made.task.measure
        for event in events:
            if "refused" in event.line:
                console.print(f"refused {event.line['refused']}; going on from the last good one")
                continue
            if "said" in event.line:
                console.print(event.line["said"], soft_wrap=True)
                continue
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(event.stage, total=event.total, said="")
            said = told(event, measure)
            progress.update(tasks[event.stage], completed=event.done, total=event.total, said=said)
            if not console.is_terminal:
                console.print(f"{event.stage} {event.done}/{event.total} {said}")


def told(event: Event, measure: Measure) -> str:
    """One event in a few words."""
    line = event.line
    if event.stage == "personal":
        judged = (line["validation"][at] for at in (0, line["chosen"]))
        start, best = (number(measure.shown(loss, 1)) for loss in judged)
        return f"{printable(line['client'])} {start} -> {best}"
    if "loss" not in line:
        return ""
    said = "nobody finished" if line["loss"] is None else f"loss {line['loss']:.3f}"
    if line["validation"]:
        held = line["validation"]
        said += f", {measure.name} {number(measure.shown(held['total'], held['count']))}"
    return f"{said}, {line['bytes_up'] / 1e6:.1f} MB up"


def heading(experiment: Experiment) -> str:
    """One line on what is about to run."""
    s = experiment.settings
    shared = sum(v.numel() for v in experiment.start().adapter.values())
    return (
        f"{s.method.name}: {len(experiment.holdings)} clients, {s.federation.cohort} a round, "
        f"{s.federation.rounds} rounds; {shared:,} trained parameters; "
        f"{s.engine.name} engine on {s.engine.device}, {s.backbone.precision}"
        f"{_note_experts(experiment.task.model.adapter)}"
    )


def _note_experts(adapter: Lora | Full) -> str:
    """A line on what `all-linear` does not adapt, where there is something."""
    share = adapter.experts if isinstance(adapter, Lora) else 0.0
    if not share:
        return ""
    return f"\nall-linear leaves routed experts frozen, {share:.0%} of the backbone's weights"
