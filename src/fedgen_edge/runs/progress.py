"""A run, followed: on a terminal a line that moves, elsewhere plain lines of any width.

The line keeps to the terminal's width: what matters least is left out first, and nothing wraps. It
is drawn from a thread of its own, so seconds pass inside a round, however long one takes.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedgen_edge.adapters.full import Full
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.runs.build import Experiment
from fedgen_edge.runs.formatting import number, printable
from fedgen_edge.runs.pace import Pace, count_validations_left
from fedgen_edge.runs.provenance import RunContext
from fedgen_edge.runs.run import Event
from fedgen_edge.tasks.measure import Measure, Number

BAR = 12
"""Letters of a bar."""
NAME = 11
"""Letters of a stage's name, at least, so that the bars of stages stand below each other."""
GAP = 2
"""Letters between two cells."""
MAX_FRACTION = 0.95
"""Most of what is left that a bar fills before it is known to be done."""


class Cell(NamedTuple):
    """A part of a line."""

    rank: int
    """The highest is left out first."""
    text: str
    style: str = ""


@dataclass
class Stage:
    """One part of a run, and how far it is."""

    name: str
    total: int
    pace: Pace
    began: float
    completed: int = 0
    validations_left: int = 0
    """Validations that are still to come."""
    cells: Sequence[Cell] = ()
    """What the last event said."""

    @property
    def is_finished(self) -> bool:
        """Whether it has come to its end."""
        return self.completed >= self.total

    def add_round(self, event: Event, now: float, every: int) -> None:
        """Record a round that ends now; what is left goes by its number, as a run may be resumed.

        Args:
            event: of the round.
            now: by the clock of `began`.
            every: rounds from one validation to the next.
        """
        validation_seconds = (
            event.line.get("evaluate_seconds", 0.0) if event.line.get("validation") else 0.0
        )
        self.pace.add(now, validation_seconds=validation_seconds)
        self.pace.remaining_work = event.total - event.completed
        if "evaluate_seconds" in event.line:
            self.validations_left = count_validations_left(event.completed, event.total, every)


@dataclass
class TerminalBoard:
    """The stage at hand, as a terminal shows it."""

    context: RunContext
    count_work: Callable[[], Mapping[str, int]]
    """Of each client in personalization."""
    stage: Stage
    clock: Callable[[], float] = time.monotonic
    ended_stages: list[Stage] = field(default_factory=list)

    @cached_property
    def work_per_client(self) -> Mapping[str, int]:
        """Asked for once it is needed."""
        return self.count_work()

    def update(self, event: Event) -> None:
        """Take in an event; a stage that it ends is in `ended`."""
        now = self.clock()
        if event.stage != self.stage.name:
            self.stage = self._begin(event)
        stage, every = self.stage, self.context.settings.evaluation.every_rounds
        if event.stage == "personal":
            stage.pace.add(now, self.work_per_client.get(event.line["client"], 1))
        else:
            stage.add_round(event, now, every)
        stage.completed, stage.total = event.completed, event.total
        stage.cells = describe(event, self.context.task.measure)
        if stage.is_finished:
            self.ended_stages.append(stage)

    def _begin(self, event: Event) -> Stage:
        before = self.stage.pace.last
        if event.stage != "personal":
            return Stage(event.stage, event.total, Pace(event.total, before), before)
        total_work = sum(self.work_per_client.values()) or event.total
        remaining_work = total_work * (event.total - event.completed + 1) / event.total
        return Stage(event.stage, event.total, Pace(remaining_work, before, warms_up=False), before)

    def draw(self, width: int) -> Table:
        """The line of the stage at hand, or of what comes after it."""
        stage, now = self.stage, self.clock()
        if stage.is_finished:
            idle_cell = Cell(0, f"working {duration(now - stage.pace.last)}")
            return draw_line([idle_cell], width, None, now)
        seconds_left = stage.pace.estimate_remaining(now, stage.validations_left)
        return draw_line(
            running_cells(stage, now, seconds_left), width, fraction(stage, now, seconds_left), now
        )


def follow(
    events: Iterable[Event],
    context: RunContext,
    first_line: str,
    stage: str = "federation",
    count_work: Callable[[], Mapping[str, int]] = dict,
) -> None:
    """Show each event as it comes; the run goes on as they are asked for.

    Args:
        events: of a run.
        context: by it.
        first_line: one line on what is about to run.
        stage: the first.
        count_work: how much personalization has to do for each client; without it, alike for all.
    """
    console = Console(markup=False, highlight=False)
    animated = sys.stdout.isatty() and not console.is_dumb_terminal
    console.print(first_line, soft_wrap=not animated)
    now, rounds = time.monotonic(), context.settings.federation.rounds
    board = TerminalBoard(context, count_work, Stage(stage, rounds, Pace(rounds, now), now))
    live = Live(
        get_renderable=lambda: board.draw(console.width),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
    with live if animated else nullcontext():
        try:
            for event in events:
                _show(event, board, console, animated)
        finally:
            if animated and board.stage.cells and not board.stage.is_finished:
                console.print(ended_line(board.stage, console.width))


def _show(event: Event, board: TerminalBoard, console: Console, animated: bool) -> None:
    if message := message_of(event):
        console.print(message, soft_wrap=not animated)
        return
    board.update(event)
    if not animated:
        details = ", ".join(cell.text for cell in board.stage.cells)
        console.print(f"{event.stage} {event.completed}/{event.total} {details}", soft_wrap=True)
        return
    while board.ended_stages:
        console.print(ended_line(board.ended_stages.pop(), console.width))


def message_of(event: Event) -> str:
    """What an event says in words of its own; empty where it is a step."""
    if "refused" in event.line:
        return f"refused {event.line['refused']}; going on from the last good one"
    return event.line.get("said", "")


def describe(event: Event, measure: Measure) -> list[Cell]:
    """One event in a few words."""
    line = event.line
    if event.stage == "personal":
        losses = (line["validation"][at] for at in (0, line["chosen"]))
        start, best = (number(measure.compute(loss, 1)) for loss in losses)
        return [Cell(3, f"{printable(line['client'])} {start} -> {best}")]
    if "loss" not in line:
        return []
    loss = "nobody finished" if line["loss"] is None else f"loss {line['loss']:.3f}"
    cells = [Cell(6, loss)]
    if validation := line["validation"]:
        value = number(measure.compute(validation["total"], validation["count"]))
        cells.append(Cell(3, f"{measure.name} {value}"))
    if "bytes_up" in line:
        cells.append(Cell(7, f"{line['bytes_up'] / 1e6:.1f} MB up"))
    return cells


def running_cells(stage: Stage, now: float, seconds_left: float | None) -> list[Cell]:
    """The cells of a stage at work, its bar aside."""
    return [
        Cell(0, f"{stage.name.removeprefix('baselines/'):<{NAME}}"),
        Cell(1, f"{stage.completed}/{stage.total}", "green"),
        Cell(2, f"left {'?' if seconds_left is None else duration(seconds_left)}", "cyan"),
        Cell(5, f"working {duration(now - stage.pace.last)}"),
        *stage.cells,
    ]


def ended_line(stage: Stage, width: int) -> Table:
    """A stage that is over, or was stopped."""
    cells = [
        Cell(0, f"{stage.name.removeprefix('baselines/'):<{NAME}}"),
        Cell(1, f"{stage.completed}/{stage.total}", "green"),
        Cell(2, duration(stage.pace.last - stage.began), "cyan"),
        *stage.cells,
    ]
    return draw_line(cells, width, stage.completed / max(1, stage.total), stage.pace.last)


def fraction(stage: Stage, now: float, seconds_left: float | None) -> float | None:
    """How much of a stage is done, the step at hand included as time passes; none: unknown."""
    if seconds_left is None:
        return None
    elapsed, completed = now - stage.pace.last, stage.completed / max(1, stage.total)
    return completed + (1 - completed) * min(
        MAX_FRACTION, elapsed / (elapsed + seconds_left) if elapsed + seconds_left else 0.0
    )


def draw_line(cells: Sequence[Cell], width: int, share: float | None, now: float) -> Table:
    """Cells in one line, a bar after the first, as many as there is room for."""
    bar = Cell(4, " " * BAR)
    line = Table.grid(padding=(0, GAP, 0, 0))
    row = []
    for cell in fit([cells[0], bar, *cells[1:]], width):
        line.add_column(no_wrap=True, overflow="ellipsis")
        moves = ProgressBar(1.0, share or 0.0, BAR, pulse=share is None, animation_time=now)
        row.append(moves if cell is bar else Text(cell.text, cell.style))
    line.add_row(*row)
    return line


def fit(cells: Sequence[Cell], width: int, gap: int = GAP) -> list[Cell]:
    """Those that have room in a line, in their order; what ranks last is left out first."""
    fitting = sorted(cells, key=lambda cell: cell.rank)
    while len(fitting) > 1 and sum(len(c.text) + gap for c in fitting) - gap > width:
        fitting.pop()
    return [cell for cell in cells if cell in fitting]


def duration(seconds: Number) -> str:
    """Minutes and seconds, and hours where there are some."""
    minutes, remaining_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}:{remaining_seconds:02}"
        if hours
        else f"{minutes}:{remaining_seconds:02}"
    )


def describe_run(experiment: Experiment) -> str:
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
