"""A SuperLink and sites on this machine, for `network.py`: keys, processes, and what they weigh."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from fedgen_edge.deploy.provision import keys
from fedgen_edge.network.flower.environment import environment

LONG = 600.0
"""Seconds that nothing here takes unless it is broken."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


@dataclass
class Place:
    """A folder with keys and certificates, and the processes that run in it."""

    folder: Path
    sites: int
    port: int = field(default_factory=free_port)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    @property
    def tls(self) -> tuple[Path, Path, Path]:
        """Files of the CA's certificate, the server's own and its key."""
        return self.folder / "ca.crt", self.folder / "server.crt", self.folder / "server.key"

    @property
    def secret(self) -> Path:
        """By which our processes take tasks."""
        return self.folder / "secret"

    def keys(self) -> dict[str, Path]:
        """Public keys of the sites, by name."""
        return {f"site-{n}": self.folder / f"site-{n}.pub" for n in range(self.sites)}

    def lay(self) -> None:
        """Make the keys and the certificates."""
        now = datetime.now(UTC)
        ca = keys.make_authority(now)
        server = keys.make_server_certificate(ca, ["localhost", "127.0.0.1"], now)
        made = {"ca.crt": ca.public, "server.crt": server.public, "server.key": server.private}
        for name in self.keys():
            pair = keys.make_site_key()
            made |= {name: pair.private, f"{name}.pub": pair.public}
        for name, content in {**made, "secret": keys.make_secret()}.items():
            (self.folder / name).write_bytes(content)
            (self.folder / name).chmod(0o600)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Run a command of this environment; what it says goes to a log."""
        home = environment(self.folder / "home" / name)
        program = Path(sys.executable).parent / command[0]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(program), *command[1:]],
                env={**os.environ, **home},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def end(self) -> None:
        """End what was started, and what that has started."""
        every = [each for process in self.running for each in family(process.pid)]
        for process in reversed(every):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(every, timeout=10)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self.running:
            process.wait(LONG)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that came from it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


class Scale:
    """The most memory that some processes and their children have together, looked at often."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids, self.most, self._stop = pids, 0, threading.Event()
        self._thread = threading.Thread(target=self._weigh, daemon=True)

    def __enter__(self) -> "Scale":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _weigh(self) -> None:
        while not self._stop.wait(0.2):
            total = 0
            for process in {p for pid in self.pids for p in family(pid)}:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self.most = max(self.most, total)


def told(path: Path, rounds: int, watched: Sequence[subprocess.Popen[bytes]]) -> list[float]:
    """Moments that a case's server writes down: its start, and the end of each round."""
    until = time.monotonic() + LONG * (rounds + 1)
    while time.monotonic() < until:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > rounds:
            return [float(line) for line in lines]
        ended = [process for process in watched if process.poll() is not None]
        if ended:
            raise SystemExit(f"{ended[0].args} ended: see {path.parent}")
        time.sleep(0.2)
    raise SystemExit(f"{path} was not finished in time")


def admit(place: Place) -> None:
    """Let the sites in: a SuperNode that is not known yet would end."""
    from flwr.supercore.control import ControlHttpClient

    from fedgen_edge.network.flower.http import FlowerServer
    from fedgen_edge.network.flower.server import NodeRegistry

    link = FlowerServer(place.address, place.tls[0], LONG)
    with link.make_client(ControlHttpClient) as control:
        NodeRegistry(link, control).retain_only(place.keys())
