"""A site's resident process, which loads the backbone once; and the light side that asks it.

They speak over a Unix socket in the site's state: a line and a payload there, a line and a payload
back. `python -m fedgen_edge.deploy.site.trainer KIT` is the process; only it imports torch.
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
from fedgen_edge.errors import FedGenError, RefusedError
from fedgen_edge.network.messages import (
    Handler,
    Terms,
    WorkRequest,
    decode_message,
    encode_line,
    make_refusal,
)
from fedgen_edge.runs import records

SOCKET, KEY = "trainer.sock", "trainer.key"
MAX_PATH_BYTES = 100
"""Bytes of a socket's path, at most: the system has room for 108."""
START_SECONDS = 600.0
"""Seconds in which a trainer must load its backbone."""
WORK_SECONDS = 24 * 3600.0
"""Seconds in which a trainer must have done its work."""
CONNECTION_ERRORS = (EOFError, OSError, AuthenticationError)


@contextlib.contextmanager
def shorten_socket_path(path: Path) -> Iterator[str]:
    """A name for a socket that the system has room for: its own, or one through a link."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
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


def _do_nothing() -> None:
    return


@dataclass(frozen=True)
class TrainerClient:
    """Hands messages to the trainer, and answers itself where that cannot."""

    state: Path
    """Folder of the socket and the key."""
    stop: threading.Event
    """Ends every wait."""
    on_timeout: Callable[[], None] = _do_nothing
    """Called when work took too long: kills the trainer, which nothing else would free."""
    start_seconds: float = START_SECONDS
    work_seconds: float = WORK_SECONDS

    def __call__(self, text: str, payload: bytes) -> tuple[str, bytes]:
        """The trainer's answer, or a refusal: `trainer-died`, `trainer-late`, `trainer-not-up`."""
        connection = self._connect()
        if connection is None:
            return _make_refusal(text, payload, "trainer-not-up", "the site's trainer is not up")
        try:
            with connection:
                connection.send_bytes(text.encode())
                connection.send_bytes(payload)
                if self._wait_for_answer(connection):
                    return connection.recv_bytes().decode(), connection.recv_bytes()
        except CONNECTION_ERRORS:
            self.wait_until_ready()  # so that who asks again finds it
            return _make_refusal(
                text, payload, "trainer-died", "the site's trainer died at its work"
            )
        if not self.stop.is_set():
            self.on_timeout()
        return _make_refusal(
            text, payload, "trainer-late", f"it took longer than {self.work_seconds:g} s"
        )

    def wait_until_ready(self) -> bool:
        """Wait until the trainer can be asked; false where it is not, in time or at all."""
        connection = self._connect()
        if connection is not None:
            connection.close()
        return connection is not None

    def _connect(self) -> Connection | None:
        end = time.monotonic() + self.start_seconds
        while time.monotonic() < end and not self.stop.is_set():
            with (
                contextlib.suppress(*CONNECTION_ERRORS),
                shorten_socket_path(self.state / SOCKET) as address,
            ):
                key = (self.state / KEY).read_bytes()
                return cast(Connection, Client(address, "AF_UNIX", authkey=key))
            self.stop.wait(0.1)
        return None

    def _wait_for_answer(self, connection: Connection) -> bool:
        end = time.monotonic() + self.work_seconds
        while not connection.poll(0.2):
            if time.monotonic() > end or self.stop.is_set():
                return False
        return True


def _make_refusal(text: str, payload: bytes, code: str, reason: str) -> tuple[str, bytes]:
    try:
        work = decode_message(WorkRequest, text, payload)
    except RefusedError as error:
        work = WorkRequest("join", Terms("", "", ""), 0, 0, 0, None)
        return encode_line(make_refusal(work, error.code, error.reason)), b""
    return encode_line(make_refusal(work, code, reason)), b""


def serve_requests(state: Path, handle: Handler) -> None:
    """Answer whoever has the key, one message at a time, until the process ends."""
    (state / SOCKET).unlink(missing_ok=True)
    key = (state / KEY).read_bytes()
    with shorten_socket_path(state / SOCKET) as address:
        listener = Listener(address, "AF_UNIX", authkey=key)
    try:
        (state / SOCKET).chmod(0o600)
        while True:
            _answer(listener, handle)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it knows the socket by the name it had
            listener.close()
        (state / SOCKET).unlink(missing_ok=True)


def _answer(listener: Listener, handle: Handler) -> None:
    try:
        with listener.accept() as connection:
            text = connection.recv_bytes().decode(errors="replace")
            answer_line, answer_payload = handle(text, connection.recv_bytes())
            connection.send_bytes(answer_line.encode())
            connection.send_bytes(answer_payload)
    except CONNECTION_ERRORS:  # who asked has gone; what was done for it is on the disk
        time.sleep(0.01)


def main() -> None:
    """Open the site of a kit, and attend; a user's mistake is one line, and exits with 2."""
    kit = Path(sys.argv[1])
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    state = kit / "state"
    try:
        state.mkdir(mode=0o700, exist_ok=True)
        with records.lock_run(state):
            from fedgen_edge.deploy.site.site import open_site
            from fedgen_edge.hardware import steady_allocations

            steady_allocations()
            site = open_site(kit)
            print(f"{site.name}: {int(site.experiment.clients.shards[0].weight)} training rows")
            serve_requests(state, site.handle)
    except (FedGenError, OSError) as error:
        print(f"fedgen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
