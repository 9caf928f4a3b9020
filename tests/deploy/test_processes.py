"""Children are started again, heard, and never left behind."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedgen_edge.deploy import processes
from fedgen_edge.deploy.processes import ProcessExit, Supervisor

BOUND = 30.0
"""Seconds that a test waits at most for what must happen."""


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def running(kept: Supervisor, seconds: float = 10.0) -> Iterator[Supervisor]:
    kept.start()
    try:
        yield kept
    finally:
        kept.stop(seconds)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody reaped yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


class Waits(threading.Event):
    """Does not wait, and remembers for how long it should have."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout)
        return self.is_set()


def lives(tmp_path: Path, count: int) -> tuple[list[ProcessExit], list[float | None]]:
    """So many lives of a child that fails at once, and the waits between them."""
    ends: list[ProcessExit] = []

    def told(ended: ProcessExit) -> bool:
        ends.append(ended)
        return len(ends) < count

    kept = Supervisor(shell("echo first; echo; echo why >&2; exit 3"), tmp_path / "log", told)
    kept._stopping = waits = Waits()
    with running(kept):
        until(lambda: not kept.is_alive)
    return ends, waits.asked


def test_a_child_that_ends_is_started_again_and_its_last_words_are_told(tmp_path: Path) -> None:
    ends, _ = lives(tmp_path, 3)
    assert ends == [ProcessExit(3, "why")] * 3
    assert (tmp_path / "log").read_text() == "first\n\nwhy\n" * 3


def test_the_wait_before_a_restart_doubles_up_to_half_a_minute(tmp_path: Path) -> None:
    assert lives(tmp_path, 8)[1] == [1, 2, 4, 8, 16, 30, 30]


def test_after_a_long_life_the_wait_is_the_first_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STABLE_SECONDS", 0.0)
    assert lives(tmp_path, 4)[1] == [1, 1, 1]


def test_a_command_that_is_not_there_is_told_like_any_other_end(tmp_path: Path) -> None:
    ends: list[ProcessExit] = []
    kept = Supervisor(["/nowhere/command"], tmp_path / "log", lambda e: bool(ends.append(e)))
    with running(kept):
        until(lambda: not kept.is_alive)
    assert ends[0].code != 0
    assert "No such file" in ends[0].last_line


def test_what_it_says_is_heard_line_by_line_with_its_environment(tmp_path: Path) -> None:
    heard: list[str] = []
    kept = Supervisor(
        shell('echo "$WORD"; sleep 60'),
        tmp_path / "log",
        on_line=heard.append,
        environment={"WORD": "connected"},
    )
    with running(kept):
        until(lambda: heard)
        assert kept.is_alive
    assert heard == ["connected"]
    assert not kept.is_alive


def test_stopping_kills_the_whole_group_though_it_will_not_listen(tmp_path: Path) -> None:
    pids: list[str] = []
    deaf = "trap '' TERM; (trap '' TERM; sleep 600) & echo $$ $!; wait; sleep 600"
    kept = Supervisor(shell(deaf), tmp_path / "log", on_line=lambda said: pids.extend(said.split()))
    with running(kept, 0.1):
        until(lambda: len(pids) == 2)
    for pid in map(int, pids):
        until(lambda pid=pid: gone(pid))


def test_stopping_lets_a_child_end_by_itself(tmp_path: Path) -> None:
    heard: list[str] = []
    polite = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    with running(Supervisor(shell(polite), tmp_path / "log", on_line=heard.append)):
        until(lambda: heard)
    assert (heard[0], heard[-1]) == ("up", "bye")


def test_what_a_dead_child_left_in_its_group_is_killed(tmp_path: Path) -> None:
    pids: list[int] = []
    leaving = Supervisor(
        shell("sleep 600 >/dev/null 2>&1 & echo $!"),
        tmp_path / "log",
        lambda _: False,
        lambda said: pids.append(int(said)),
    )
    with running(leaving):
        until(lambda: not leaving.is_alive)
    until(lambda: gone(pids[0]))


WITH_ITS_OWN = 'sleep 600 >/dev/null 2>&1 & trap "kill $!; exit" TERM; echo $$ $!; wait'


@pytest.mark.parametrize(
    ("command", "orphaned"),
    [("echo $$; exec sleep 600", signal.SIGKILL), (WITH_ITS_OWN, signal.SIGTERM)],
)
def test_a_child_dies_with_its_parent_even_by_kill_9_and_its_own_with_it(
    tmp_path: Path, command: str, orphaned: signal.Signals
) -> None:
    script = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from fedgen_edge.deploy.processes import Supervisor\n"
        "say = lambda line: print(line, flush=True)\n"
        "command = ['/bin/sh', '-c', sys.argv[2]]\n"
        "dies = signal.Signals(int(sys.argv[3]))\n"
        "Supervisor(command, Path(sys.argv[1]), on_line=say, orphan_signal=dies).start()\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log"), command, str(int(orphaned))],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    try:
        family = [*map(int, parent.stdout.readline().split())]
        assert not any(map(gone, family))
        assert os.getpgid(family[0]) == family[0]  # a group, and a session, of its own
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    until(lambda: all(map(gone, family)))


def test_an_orphan_may_end_its_own_children_first(tmp_path: Path) -> None:
    # as nginx does, whose workers are no children of ours, and would keep its port
    script = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from fedgen_edge.deploy.processes import Supervisor\n"
        "say = lambda line: print(line, flush=True)\n"
        "told = 'sleep 600 & trap \"kill $!; exit\" TERM; echo $!; wait'\n"
        "log = Path(sys.argv[1])\n"
        "Supervisor(['/bin/sh', '-c', told], log, on_line=say, "
        "orphan_signal=signal.SIGTERM).start()\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    try:
        grandchild = int(parent.stdout.readline())
        assert not gone(grandchild)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    until(lambda: gone(grandchild))


def test_a_log_is_its_owners_and_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 1000)
    log = tmp_path / "logs" / "child.log"
    talking = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i + 1)); done"
    kept = Supervisor(shell(talking), log, lambda _: False)
    with running(kept):
        until(lambda: not kept.is_alive)
    there = sorted(log.parent.iterdir())
    assert [p.name for p in there] == ["child.log", "child.log.1"]
    assert all(0 < p.stat().st_size <= 1000 for p in there)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in there)
    assert log.read_text().splitlines()[-1] == "line 299"


def test_stopping_before_the_start_is_no_harm(tmp_path: Path) -> None:
    Supervisor(shell("exit 0"), tmp_path / "log").stop()


def test_a_command_that_is_not_there_is_told_by_its_name(tmp_path: Path) -> None:
    said: list[ProcessExit] = []

    def ended(how: ProcessExit) -> bool:
        said.append(how)
        return False

    with running(Supervisor(["no-such-command"], tmp_path / "log", ended)):
        until(lambda: said)
    assert said == [ProcessExit(1, "no-such-command cannot be started: No such file or directory")]
