"""Children that are kept alive: started, heard, started again, and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

MAX_LOG_BYTES = 1_000_000
"""Bytes of a log; then it is set aside, in the place of the one before."""
FIRST_DELAY, MAX_DELAY = 1.0, 30.0
"""Seconds before a child that ended is started again; doubled each time, up to the most."""
STABLE_SECONDS = 60.0
"""Seconds of life after which a child's next end is its first again."""
GUARD = (
    "import ctypes, os, sys\n"
    "try:\n"
    "    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))\n"
    "except (OSError, AttributeError):\n"
    "    pass\n"
    "if os.getppid() == int(sys.argv[1]):\n"
    "    try:\n"
    "        os.execvp(sys.argv[3], sys.argv[3:])\n"
    "    except OSError as error:\n"
    "        sys.exit(f'{sys.argv[3]} cannot be started: {error.strerror}')\n"
)
"""Has the kernel signal this process when its parent dies (1 is PR_SET_PDEATHSIG), and becomes the
command. Where there is no prctl, an orphan is left to find out for itself."""


class ProcessExit(NamedTuple):
    """The end of a child's life."""

    code: int
    """Exit status; below 0, the signal that killed it."""
    last_line: str
    """The last that it said."""


def always_restart(process_exit: ProcessExit) -> bool:
    """Start it again, however it ended."""
    del process_exit
    return True


def ignore_line(line: str) -> None:
    """Nobody listens."""
    del line


@dataclass
class Supervisor:
    """A command that runs until it is stopped, in a session of its own.

    It dies with this process, even if that is killed. (The kernel goes by the thread that started
    it, so one thread starts and watches it.)
    """

    command: Sequence[str]
    log: Path
    """What it writes, errors too; for its owner alone."""
    on_exit: Callable[[ProcessExit], bool] = always_restart
    """Called at each end, from another thread; says whether to start it again."""
    on_line: Callable[[str], None] = ignore_line
    """Called with each line that it writes, from another thread."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's."""
    first_delay: float = FIRST_DELAY
    """Seconds before the first restart."""
    orphan_signal: signal.Signals = signal.SIGKILL
    """What it is sent when this process dies; one with children of its own ends them by SIGTERM."""

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or will again."""
        return self._thread.is_alive()

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, and kill it and its like after so many seconds; returns when it is gone.

        Not to be called from `told` or `heard`.
        """
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._thread.ident is not None:
            self._thread.join(seconds)
            self._signal(signal.SIGKILL)
            self._thread.join()

    def kill(self) -> None:
        """End this life of it; it is started again, as after any other end."""
        self._signal(signal.SIGKILL)

    def restart(self) -> None:
        """Ask it to end this life of it; it is started again."""
        self._signal(signal.SIGTERM)

    def _run(self) -> None:
        """Life after life, until it is stopped."""
        delay = self.first_delay
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                process_exit = self._run_once()
            except OSError as error:
                process_exit = ProcessExit(
                    127, f"{self.command[0]} cannot be started: {error.strerror}"
                )
            if self._stopping.is_set() or not self.on_exit(process_exit):
                return
            if time.monotonic() - started >= STABLE_SECONDS:
                delay = self.first_delay
            self._stopping.wait(delay)
            delay = min(2 * delay, MAX_DELAY)

    def _run_once(self) -> ProcessExit:
        """One life."""
        with self._lock:
            if self._stopping.is_set():
                return ProcessExit(0, "")
            guard = [GUARD, str(os.getpid()), str(int(self.orphan_signal))]
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", *guard, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                start_new_session=True,
            )
        listener = _Listener(process.stdout, self.log, self.on_line)
        # it is left a zombie until its like are killed, so that no other group has its number
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with self._lock:
            code = process.wait()
            self._process = None
        return ProcessExit(code, listener.get_last_line())

    def _signal(self, number: signal.Signals) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process is not None:
                os.killpg(self._process.pid, number)


class _Listener:
    """Writes down what a child says, and remembers the last of it."""

    def __init__(self, pipe: IO[bytes] | None, log: Path, on_line: Callable[[str], None]) -> None:
        assert pipe is not None
        self._pipe, self._log, self._on_line, self._last_line = pipe, log, on_line, ""
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def get_last_line(self) -> str:
        """The last line that is not blank, once the child has ended."""
        self._thread.join(5.0)  # a child of the child, in a session of its own, may hold the pipe
        return self._last_line

    def _listen(self) -> None:
        with self._pipe:
            for raw in iter(lambda: self._pipe.readline(MAX_LOG_BYTES), b""):
                _append_to_log(self._log, raw)
                if line := raw.decode(errors="replace").strip():
                    self._last_line = line
                    self._on_line(line)


def _append_to_log(path: Path, content: bytes) -> None:
    """Add to a log; a full one is set aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size + len(content) > MAX_LOG_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, content)
    finally:
        os.close(handle)
