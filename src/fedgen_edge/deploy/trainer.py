"""A site's resident process, which loads the backbone once; and the light side that asks it.

They speak over a Unix socket in the site's state: a line and a payload there, a line and a payload
back. `python -m fedgen_edge.deploy.trainer KIT` is the process; only it imports torch.
"""

import contextlib
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import cast

from fedgen_edge import files
from fedgen_edge.engines.exchange import Handler, Terms, Work, line, read, refusal
from fedgen_edge.errors import FedGenError, RefusedError
from fedgen_edge.experiments import records

SOCKET, KEY = "trainer.sock", "trainer.key"
LONGEST = 100
"""Bytes of a socket's path, at most: the system has room for 108."""
UP = 600.0
"""Seconds in which a trainer must load its backbone."""
DONE = 24 * 3600.0
"""Seconds in which a trainer must have done its work."""
BROKEN = (EOFError, OSError, AuthenticationError)


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name for a socket that the system has room for: its own, or one through a link."""
    if len(os.fsencode(path)) <= LONGEST:
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="fedgen-") as folder:
        link = Path(folder) / "state"
        link.symlink_to(path.parent.resolve())
        yield str(link / path.name)


def make_key(state: Path) -> None:
    """Agree on a fresh key, by which trainer and supervisor know each other."""
    files.write(state / KEY, secrets.token_bytes(32))
    (state / KEY).chmod(0o600)


def _nothing() -> None:
    return


@dataclass(frozen=True)
class Forward:
    """Hands messages to the trainer, and answers itself where that cannot."""

    state: Path
    """Folder of the socket and the key."""
    stop: threading.Event
    """Ends every wait."""
    late: Callable[[], None] = _nothing
    """Called when work took too long: kills the trainer, which nothing else would free."""
    up: float = UP
    done: float = DONE

    def __call__(self, text: str, payload: bytes) -> tuple[str, bytes]:
        """The trainer's answer, or a refusal: `trainer-died`, `trainer-late`, `trainer-not-up`."""
        connection = self._connect()
        if connection is None:
            return _refused(text, payload, "trainer-not-up", "the site's trainer is not up")
        try:
            with connection:
                connection.send_bytes(text.encode())
                connection.send_bytes(payload)
                if self._awaited(connection):
                    return connection.recv_bytes().decode(), connection.recv_bytes()
        except BROKEN:
            self.ready()  # so that who asks again finds it
            return _refused(text, payload, "trainer-died", "the site's trainer died at its work")
        if not self.stop.is_set():
            self.late()
        return _refused(text, payload, "trainer-late", f"it took longer than {self.done:g} s")

    def ready(self) -> bool:
        """Wait until the trainer can be asked; false where it is not, in time or at all."""
        connection = self._connect()
        if connection is not None:
            connection.close()
        return connection is not None

    def _connect(self) -> Connection | None:
        end = time.monotonic() + self.up
        while time.monotonic() < end and not self.stop.is_set():
            with contextlib.suppress(*BROKEN), reachable(self.state / SOCKET) as address:
                key = (self.state / KEY).read_bytes()
                return cast(Connection, Client(address, "AF_UNIX", authkey=key))
            self.stop.wait(0.1)
        return None

    def _awaited(self, connection: Connection) -> bool:
        end = time.monotonic() + self.done
        while not connection.poll(0.2):
            if time.monotonic() > end or self.stop.is_set():
                return False
        return True


def _refused(text: str, payload: bytes, code: str, reason: str) -> tuple[str, bytes]:
    try:
        work = read(Work, text, payload)
    except RefusedError as error:
        work = Work("join", Terms("", "", ""), 0, 0, 0, None)
        return line(refusal(work, error.code, error.reason)), b""
    return line(refusal(work, code, reason)), b""


def attend(state: Path, handle: Handler) -> None:
    """Answer whoever has the key, one message at a time, until the process ends."""
    (state / SOCKET).unlink(missing_ok=True)
    key = (state / KEY).read_bytes()
    with reachable(state / SOCKET) as address:
        door = Listener(address, "AF_UNIX", authkey=key)
    try:
        (state / SOCKET).chmod(0o600)
        while True:
            _answer(door, handle)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it knows the socket by the name it had
            door.close()
        (state / SOCKET).unlink(missing_ok=True)


def _answer(door: Listener, handle: Handler) -> None:
    try:
        with door.accept() as connection:
            text = connection.recv_bytes().decode(errors="replace")
            said, sent = handle(text, connection.recv_bytes())
            connection.send_bytes(said.encode())
            connection.send_bytes(sent)
    except BROKEN:  # who asked has gone; what was done for it is on the disk
        time.sleep(0.01)


def main() -> None:
    """Open the site of a kit, and attend; a user's mistake is one line, and exits with 2."""
    kit = Path(sys.argv[1])
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    state = kit / "state"
    try:
        state.mkdir(mode=0o700, exist_ok=True)
        with records.locked(state):
            from fedgen_edge.deploy.site import open_site
            from fedgen_edge.machine import steady_allocations

            steady_allocations()
            site = open_site(kit)
            print(f"{site.name}: {int(site.experiment.clients.shards[0].weight)} training rows")
            attend(state, site.handle)
    except (FedGenError, OSError) as error:
        print(f"fedgen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
