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
from fedgen_edge.experiments.build import Experiment
from fedgen_edge.experiments.pace import Pace, judgings_left
from fedgen_edge.experiments.provenance import Made
from fedgen_edge.experiments.run import Event
from fedgen_edge.experiments.summary import number, printable
from fedgen_edge.measure import Measure, Number

BAR = 12
"""Letters of a bar."""
NAME = 11
"""Letters of a stage's name, at least, so that the bars of stages stand below each other."""
GAP = 2
"""Letters between two cells."""
MOST = 0.95
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
    done: int = 0
    judgings: int = 0
    """Validations that are still to come."""
    cells: Sequence[Cell] = ()
    """What the last event said."""

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return self.done >= self.total

    def add_round(self, event: Event, now: float, every: int) -> None:
        """Record a round that ends now; what is left goes by its number, as a run may be resumed.

        Args:
            event: of the round.
            now: by the clock of `began`.
            every: rounds from one validation to the next.
        """
        judging = event.line.get("evaluate_seconds", 0.0) if event.line.get("validation") else 0.0
        self.pace.add(now, judging=judging)
        self.pace.rest = event.total - event.done
        if "evaluate_seconds" in event.line:
            self.judgings = judgings_left(event.done, event.total, every)


@dataclass
class Board:
    """The stage at hand, as a terminal shows it."""

    made: Made
    work: Callable[[], Mapping[str, int]]
    """Of each client in personalization."""
    stage: Stage
    clock: Callable[[], float] = time.monotonic
    ended: list[Stage] = field(default_factory=list)

    @cached_property
    def works(self) -> Mapping[str, int]:
        """Asked for once it is needed."""
        return self.work()

    def update(self, event: Event) -> None:
        """Take in an event; a stage that it ends is in `ended`."""
        now = self.clock()
        if event.stage != self.stage.name:
            self.stage = self._begin(event)
        stage, every = self.stage, self.made.settings.evaluation.every
        if event.stage == "personal":
            stage.pace.add(now, self.works.get(event.line["client"], 1))
        else:
            stage.add_round(event, now, every)
        stage.done, stage.total = event.done, event.total
        stage.cells = describe(event, self.made.task.measure)
        if stage.finished:
            self.ended.append(stage)

    def _begin(self, event: Event) -> Stage:
        before = self.stage.pace.last
        if event.stage != "personal":
            return Stage(event.stage, event.total, Pace(event.total, before), before)
        whole = sum(self.works.values()) or event.total
        left = whole * (event.total - event.done + 1) / event.total
        return Stage(event.stage, event.total, Pace(left, before, warms_up=False), before)

    def draw(self, width: int) -> Table:
        """The line of the stage at hand, or of what comes after it."""
        stage, now = self.stage, self.clock()
        if stage.finished:
            waited = Cell(0, f"working {duration(now - stage.pace.last)}")
            return draw_line([waited], width, None, now)
        left = stage.pace.left(now, stage.judgings)
        return draw_line(running_cells(stage, now, left), width, fraction(stage, now, left), now)


def follow(
    events: Iterable[Event],
    made: Made,
    told_first: str,
    stage: str = "federation",
    work: Callable[[], Mapping[str, int]] = dict,
) -> None:
    """Show each event as it comes; the run goes on as they are asked for.

    Args:
        events: of a run.
        made: by it.
        told_first: one line on what is about to run.
        stage: the first.
        work: how much personalization has to do for each client; without it, alike for all.
    """
    console = Console(markup=False, highlight=False)
    moving = sys.stdout.isatty() and not console.is_dumb_terminal
    console.print(told_first, soft_wrap=not moving)
    now, rounds = time.monotonic(), made.settings.federation.rounds
    board = Board(made, work, Stage(stage, rounds, Pace(rounds, now), now))
    live = Live(
        get_renderable=lambda: board.draw(console.width),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
    with live if moving else nullcontext():
        try:
            for event in events:
                _show(event, board, console, moving)
        finally:
            if moving and board.stage.cells and not board.stage.finished:
                console.print(ended_line(board.stage, console.width))


def _show(event: Event, board: Board, console: Console, moving: bool) -> None:
    if message := message_of(event):
        console.print(message, soft_wrap=not moving)
        return
    board.update(event)
    if not moving:
        said = ", ".join(cell.text for cell in board.stage.cells)
        console.print(f"{event.stage} {event.done}/{event.total} {said}", soft_wrap=True)
        return
    while board.ended:
        console.print(ended_line(board.ended.pop(), console.width))


def message_of(event: Event) -> str:
    """What an event says in words of its own; empty where it is a step."""
    if "refused" in event.line:
        return f"refused {event.line['refused']}; going on from the last good one"
    return event.line.get("said", "")


def describe(event: Event, measure: Measure) -> list[Cell]:
    """One event in a few words."""
    line = event.line
    if event.stage == "personal":
        judged = (line["validation"][at] for at in (0, line["chosen"]))
        start, best = (number(measure.shown(loss, 1)) for loss in judged)
        return [Cell(3, f"{printable(line['client'])} {start} -> {best}")]
    if "loss" not in line:
        return []
    loss = "nobody finished" if line["loss"] is None else f"loss {line['loss']:.3f}"
    cells = [Cell(6, loss)]
    if held := line["validation"]:
        shown = number(measure.shown(held["total"], held["count"]))
        cells.append(Cell(3, f"{measure.name} {shown}"))
    if "bytes_up" in line:
        cells.append(Cell(7, f"{line['bytes_up'] / 1e6:.1f} MB up"))
    return cells


def running_cells(stage: Stage, now: float, left: float | None) -> list[Cell]:
    """The cells of a stage at work, its bar aside."""
    return [
        Cell(0, f"{stage.name.removeprefix('baselines/'):<{NAME}}"),
        Cell(1, f"{stage.done}/{stage.total}", "green"),
        Cell(2, f"left {'?' if left is None else duration(left)}", "cyan"),
        Cell(5, f"working {duration(now - stage.pace.last)}"),
        *stage.cells,
    ]


def ended_line(stage: Stage, width: int) -> Table:
    """A stage that is over, or was stopped."""
    cells = [
        Cell(0, f"{stage.name.removeprefix('baselines/'):<{NAME}}"),
        Cell(1, f"{stage.done}/{stage.total}", "green"),
        Cell(2, duration(stage.pace.last - stage.began), "cyan"),
        *stage.cells,
    ]
    return draw_line(cells, width, stage.done / max(1, stage.total), stage.pace.last)


def fraction(stage: Stage, now: float, left: float | None) -> float | None:
    """How much of a stage is done, the step at hand included as time passes; none: unknown."""
    if left is None:
        return None
    since, done = now - stage.pace.last, stage.done / max(1, stage.total)
    return done + (1 - done) * min(MOST, since / (since + left) if since + left else 0.0)


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
    kept = sorted(cells, key=lambda cell: cell.rank)
    while len(kept) > 1 and sum(len(c.text) + gap for c in kept) - gap > width:
        kept.pop()
    return [cell for cell in cells if cell in kept]


def duration(seconds: Number) -> str:
    """Minutes and seconds, and hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
