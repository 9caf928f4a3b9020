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

LARGEST = 1_000_000
"""Bytes of a log; then it is set aside, in the place of the one before."""
FIRST, MOST = 1.0, 30.0
"""Seconds before a child that ended is started again; doubled each time, up to the most."""
WELL = 60.0
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


class Ended(NamedTuple):
    """The end of a child's life."""

    code: int
    """Exit status; below 0, the signal that killed it."""
    line: str
    """The last that it said."""


def restarts(ended: Ended) -> bool:
    """Start it again, however it ended."""
    del ended
    return True


def unheard(line: str) -> None:
    """Nobody listens."""
    del line


@dataclass
class Kept:
    """A command that runs until it is stopped, in a session of its own.

    It dies with this process, even if that is killed. (The kernel goes by the thread that started
    it, so one thread starts and watches it.)
    """

    command: Sequence[str]
    log: Path
    """What it writes, errors too; for its owner alone."""
    told: Callable[[Ended], bool] = restarts
    """Called at each end, from another thread; says whether to start it again."""
    heard: Callable[[str], None] = unheard
    """Called with each line that it writes, from another thread."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's."""
    first: float = FIRST
    """Seconds before the first restart."""
    orphaned: signal.Signals = signal.SIGKILL
    """What it is sent when this process dies; one with children of its own ends them by SIGTERM."""

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch = threading.Thread(target=self._live, daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._watch.start()

    @property
    def alive(self) -> bool:
        """Whether it runs, or will again."""
        return self._watch.is_alive()

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, and kill it and its like after so many seconds; returns when it is gone.

        Not to be called from `told` or `heard`.
        """
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._watch.ident is not None:
            self._watch.join(seconds)
            self._signal(signal.SIGKILL)
            self._watch.join()

    def kill(self) -> None:
        """End this life of it; it is started again, as after any other end."""
        self._signal(signal.SIGKILL)

    def renew(self) -> None:
        """Ask it to end this life of it; it is started again."""
        self._signal(signal.SIGTERM)

    def _live(self) -> None:
        """Life after life, until it is stopped."""
        wait = self.first
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                ended = self._one()
            except OSError as error:
                ended = Ended(127, f"{self.command[0]} cannot be started: {error.strerror}")
            if self._stopping.is_set() or not self.told(ended):
                return
            if time.monotonic() - began >= WELL:
                wait = self.first
            self._stopping.wait(wait)
            wait = min(2 * wait, MOST)

    def _one(self) -> Ended:
        """One life."""
        with self._lock:
            if self._stopping.is_set():
                return Ended(0, "")
            guard = [GUARD, str(os.getpid()), str(int(self.orphaned))]
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", *guard, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                start_new_session=True,
            )
        said = _Listener(process.stdout, self.log, self.heard)
        # it is left a zombie until its like are killed, so that no other group has its number
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with self._lock:
            code = process.wait()
            self._process = None
        return Ended(code, said.last())

    def _signal(self, number: signal.Signals) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process is not None:
                os.killpg(self._process.pid, number)


class _Listener:
    """Writes down what a child says, and remembers the last of it."""

    def __init__(self, pipe: IO[bytes] | None, log: Path, heard: Callable[[str], None]) -> None:
        assert pipe is not None
        self._pipe, self._log, self._heard, self._last = pipe, log, heard, ""
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def last(self) -> str:
        """The last line that is not blank, once the child has ended."""
        self._thread.join(5.0)  # a child of the child, in a session of its own, may hold the pipe
        return self._last

    def _listen(self) -> None:
        with self._pipe:
            for raw in iter(lambda: self._pipe.readline(LARGEST), b""):
                _append(self._log, raw)
                if line := raw.decode(errors="replace").strip():
                    self._last = line
                    self._heard(line)


def _append(path: Path, content: bytes) -> None:
    """Add to a log; a full one is set aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size + len(content) > LARGEST:
        path.replace(path.with_name(f"{path.name}.1"))
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, content)
    finally:
        os.close(handle)
