import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest
from rich.console import Console

from fedgen_edge.runs.pace import Pace
from fedgen_edge.runs.progress import (
    Cell,
    Stage,
    describe,
    draw_line,
    duration,
    fit,
    fraction,
    running_cells,
)
from fedgen_edge.runs.run import Event
from fedgen_edge.tasks.language.task import MEASURE

LINE = {
    "loss": 3.25,
    "validation": {"total": 300.0, "count": 100.0},
    "bytes_up": 4_000_000,
    "evaluate_seconds": 1.0,
}
RUN = (
    "run --backbone.path tiny --data.packages json logging --data.length 32 --adapter.rank 2 "
    "--federation.rounds 2 --training.steps 1 --evaluation.blocks 2 --evaluation.test-blocks 2 "
    "--evaluation.baselines local-only --personal.epochs 1 --personal.steps 1 "
    "--evaluation.sample-tokens 1 --engine.threads 1"
)


def stage_after(name: str, done: int, total: int) -> Stage:
    pace = Pace(total, 0.0)
    for number in range(done):
        pace.add(40.0 * (number + 1))
    cells = describe(Event(name, done, total, LINE), MEASURE) if done else []
    return Stage(name, total, pace, 0.0, done, 0, cells)


def drawn(stage: Stage, width: int, now: float) -> str:
    """A line as a terminal of a width gets it."""
    file = io.StringIO()
    left = stage.pace.estimate_remaining(now)
    line = draw_line(running_cells(stage, now, left), width, fraction(stage, now, left), now)
    Console(file=file, width=width, force_terminal=True, color_system=None).print(line)
    return file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("name", ["federation", "baselines/fedavg-full", "x" * 100])
def test_a_stage_is_one_line_that_no_terminal_wraps(width: int, name: str) -> None:
    for done in (0, 1, 3):
        text = drawn(stage_after(name, done, 100), width, 40.0 * done + 10)
        assert text.count("\n") == 1
        assert len(text.rstrip("\n")) <= width


def test_what_matters_least_is_left_out_first() -> None:
    stage = stage_after("federation", 30, 100)
    wide, usual, narrow = (drawn(stage, width, 1210.0) for width in (120, 80, 60))
    assert all("30/100" in text and "left 46:30" in text for text in (wide, usual, narrow))
    assert "4.0 MB up" in wide
    assert "4.0 MB up" not in usual
    assert "perplexity 20.1" in usual  # e^3
    assert "━" in usual
    assert "loss" not in narrow
    cells = [Cell(1, "ab"), Cell(0, "cd")]
    assert fit(cells, 6) == cells
    assert fit(cells, 5) == [Cell(0, "cd")]


def test_seconds_pass_and_the_bar_moves_inside_a_round() -> None:
    stage = stage_after("federation", 1, 2)  # 40 s a round: half is done, 20 s are half of the rest
    assert fraction(stage, 60.0, stage.pace.estimate_remaining(60.0)) == pytest.approx(0.75)
    assert fraction(stage, 1000.0, stage.pace.estimate_remaining(1000.0)) == pytest.approx(0.975)
    assert "working 0:20" in drawn(stage, 120, 60.0)
    first = stage_after("federation", 0, 2)
    assert "left ?  working 0:07" in drawn(first, 120, 7.0)


def test_of_a_resumed_run_only_the_rounds_that_are_left_count() -> None:
    # the sixth of ten rounds takes 40 s, 1 of them for validation; every second is validated
    stage = Stage("federation", 10, Pace(10, 0.0), 0.0)
    stage.add_round(Event("federation", 6, 10, LINE), 40.0, 2)
    assert stage.pace.estimate_remaining(40.0, stage.validations_left) == pytest.approx(
        4 * 39 + 2 * 1
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations_are_clocks(seconds: int | float, text: str) -> None:
    assert duration(seconds) == text


def run_on_terminal(arguments: list[str], width: int, cwd: os.PathLike) -> str:
    """What a command writes to a real terminal of this width."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    environment |= {"TERM": "xterm", "NO_COLOR": "1"}
    code = f"from fedgen_edge.cli.main import main; main({arguments!r})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environment
    ) as process:
        os.close(slave)
        written = b""
        try:
            while part := os.read(master, 65536):
                written += part
        except OSError:  # how Linux says that nobody has the other end any more
            pass
        os.close(master)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_a_run_asks_the_terminal_for_its_width(tmp_path: os.PathLike) -> None:
    text = run_on_terminal([*RUN.split(), "--out", "out"], 60, tmp_path)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    bars = [line for line in lines if "━" in line]
    assert any(line.startswith("federation") and "2/2" in line for line in bars)
    assert all(len(line) <= 60 for line in bars), max(bars, key=len)
    assert "\x1b[?25h" in text  # the cursor is shown again


def test_a_stage_that_sends_nothing_shows_no_bytes() -> None:
    alone = {k: v for k, v in LINE.items() if k != "bytes_up"}
    shown, silent = (
        " ".join(cell.text for cell in describe(Event("pretraining", 1, 2, line), MEASURE))
        for line in (LINE, alone)
    )
    assert "MB up" in shown
    assert "MB up" not in silent
