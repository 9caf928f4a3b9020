"""A site's way to the server, in the hands of a test: it can be cut, and held in an upload."""

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field

BOUND = 300.0
"""Seconds after which what is held goes on, whatever a test has forgotten."""


@dataclass
class Wire:
    """Hands what comes at a port of the loopback on to another, and back."""

    target: int
    """Port of the proxy."""
    held: threading.Event = field(default_factory=threading.Event)
    """Set once an upload is held."""

    def __post_init__(self) -> None:
        self._door = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._free = threading.Event()
        self._free.set()
        self._up, self._most = 0, 0
        self._cut = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """What the site calls."""
        return self._door.getsockname()[1]

    def hold(self, most: int) -> None:
        """Let so many bytes go up from now on, and hold those after them."""
        with self._lock:
            self.held.clear()
            self._free.clear()
            self._up, self._most = 0, most

    def release(self) -> None:
        """Let all go on."""
        with self._lock:
            self._most = 0
            self._free.set()

    def cut(self) -> None:
        """End every connection, and take no other; what was held is lost."""
        with self._lock:
            self._cut = True
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self.release()

    def mend(self) -> None:
        """Take connections again."""
        with self._lock:
            self._cut = False

    def close(self) -> None:
        """End it."""
        self.cut()
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self._thread.join(BOUND)

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._door.accept()
            except OSError:
                return
            # What is closed unserved is reset, as by a machine where nobody listens.
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if not self._cut:
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()
            else:
                near.close()

    def _carry(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self.target), BOUND)
        except OSError:
            near.close()
            return
        with near, far:
            with self._lock:
                self._open |= {near, far}
            down = threading.Thread(target=self._pump, args=(far, near, False), daemon=True)
            down.start()
            self._pump(near, far, True)
            down.join()
            with self._lock:
                self._open -= {near, far}

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(4096):
                if up and self._over(len(piece)):
                    self.held.set()
                    self._free.wait(BOUND)
                sink.sendall(piece)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _over(self, count: int) -> bool:
        with self._lock:
            self._up += count
            return 0 < self._most < self._up
