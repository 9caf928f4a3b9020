"""A federation of real processes on this machine, for tests: `fedgen server`, `fedgen client`.

Every process is in a session of its own, and none outlives the test that started it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGCONT, SIGTERM

import psutil

from fedgen_edge.config import Settings, to_toml
from fedgen_edge.deploy import settings as deployed
from fedgen_edge.deploy.processes import GUARD
from fedgen_edge.deploy.server import audit
from support.flower_network import free_port
from support.sites import NAMES, recipe, rows, write_rows
from support.wire import Wire

LONG = 240.0
"""Seconds that nothing here takes unless it is broken."""
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
GLANCE = 0.02
PARTS = ("q", "k", "v", "o", "gate", "up", "down")


def until(holds: Callable[[], object], seconds: float = LONG) -> None:
    """Wait for what must come true."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come true"
        time.sleep(GLANCE)


def fedgen(*arguments: object) -> list[str]:
    """The command, with the interpreter that runs the tests."""
    return [
        sys.executable,
        "-c",
        "from fedgen_edge.cli.main import main; main()",
        *map(str, arguments),
    ]


def said(*arguments: object) -> str:
    """What the command says to its end, which must be a good one."""
    done = subprocess.run(
        fedgen(*arguments), capture_output=True, text=True, timeout=LONG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass
class Running:
    """A command that was started; what it says is in a file."""

    log: Path
    process: subprocess.Popen[bytes]
    family: set[psutil.Process] = field(default_factory=set)
    """All that it has started so far, as far as we looked."""

    @property
    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def says(self, part: str, times: int = 1, seconds: float = LONG) -> None:
        """Wait until it has said something so often."""

        def holds() -> bool:
            assert self.process.poll() is None or self.text.count(part) >= times, self.text
            return self.text.count(part) >= times

        until(holds, seconds)

    def child(self, part: str) -> psutil.Process:
        """The process below it whose command line has a part."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = [each for each in self._look() if part in command_of(each)]
            return bool(found)

        until(there)
        return found[0]

    def ended(self, seconds: float = LONG) -> int:
        """Its exit status."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Kill the command itself, and see that what it started is gone with it."""
        self._look()
        self.process.kill()
        self.process.wait(LONG)
        until(lambda: not any(lives(each) for each in self.family), 30)

    def ask(self) -> None:
        """Ask it to end, as a user would."""
        self._look()
        self.process.send_signal(SIGCONT)
        self.process.terminate()

    def stop(self) -> None:
        """See that it has ended, and all of its own; what has not is killed, and was wrong."""
        late = []
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            late.append("the command")
            self.process.kill()
            self.process.wait(LONG)
        for each in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()
        with contextlib.suppress(AssertionError):
            until(lambda: not any(lives(each) for each in self.family), 30)
        for each in filter(lives, self.family):
            late.append(command_of(each))
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        assert not late, late

    def _look(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.family |= set(found)
        return found


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass
class Federation:
    """A server's folder, kits with data of their own, and what runs of it."""

    folder: Path
    backbone: str = "tiny"
    wires: dict[str, Wire] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)

    @property
    def server(self) -> Path:
        return self.folder / "fed"

    @property
    def run(self) -> Path:
        return self.server / "run"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    def kit(self, name: str) -> Path:
        return self.folder / "at" / name

    def make(self, settings: Settings, **plan: float | str) -> None:
        """Make the server's folder by the command, and bring each site its kit and its data."""
        everybody = write_rows(self.folder / "all.jsonl", rows())
        settings = replace(
            settings,
            data=replace(settings.data, path=str(everybody)),
            backbone=replace(settings.backbone, path=self.backbone),
        )
        self.recipe.write_text(to_toml(settings))
        public, port = free_port(), free_port()
        said("deploy", "init", self.recipe, "--sites", ",".join(NAMES), "--address",
             f"localhost:{public}", "--port", port, "--out", self.server)  # fmt: skip
        self.plan(**plan)
        for name in NAMES:
            self.bring(self.server / "kits" / name, name, public)

    def bring(self, kit: Path, name: str, port: int) -> Path:
        """Carry a kit to its site, which has data and reaches the server over a wire."""
        to = self.kit(name)
        shutil.copytree(kit, to)
        self.wires[name] = Wire(port)
        own = {"data.path": str(write_rows(to / "texts.jsonl", rows([kit.name])))}
        told = deployed.read(deployed.SiteSettings, to / "site.toml")
        told = replace(told, server=f"localhost:{self.wires[name].port}", own=own)
        (to / "site.toml").write_bytes(deployed.encode_toml(told))
        return to

    def plan(self, **changed: float | str) -> None:
        """Change how patient the server is, as its operator may."""
        path = self.server / "federation.toml"
        told = deployed.read(deployed.DeploymentSettings, path)
        path.write_bytes(deployed.encode_toml(replace(told, **changed)))

    def start(self, name: str, command: list[str], **environment: str) -> Running:
        """Start a command; it is ended with the test, even if that is killed."""
        guard = [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), str(int(SIGTERM))]
        log = self.folder / f"{name}-{len(self.running)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
            )
        self.running.append(Running(log, process))
        return self.running[-1]

    def serve(self, command: str = "server") -> Running:
        """`fedgen server FOLDER`."""
        return self.start(command, fedgen(command, self.server))

    def join(self, name: str) -> Running:
        """`fedgen client KIT`."""
        return self.start(name, fedgen("client", self.kit(name)))

    def audit(self, event: str) -> list[audit.Line]:
        """Lines of the audit log, of one kind."""
        return [
            line for line in audit.read_lines(self.run / "audit.jsonl") if line["event"] == event
        ]


@contextlib.contextmanager
def federation(folder: Path, backbone: str = "tiny") -> Iterator[Federation]:
    """A federation that is taken down at the end, whatever happened."""
    made = Federation(folder, backbone)
    try:
        yield made
    finally:
        errors = []
        for each in made.running:
            each.ask()
        for each in made.running:
            try:
                each.stop()
            except AssertionError as error:
                errors.append(str(error))
        for wire in made.wires.values():
            wire.close()
        assert not errors, errors


def personal(kit: Path) -> Path:
    """The folder of a site's own adapter."""
    (found,) = kit.glob("state/runs/*/personal")
    return found


def rounds(count: int, **training: float) -> Settings:
    """Of three sites, all of them in each round; what a site keeps counts too."""
    return recipe(
        None,
        adapter={"rank": 16, "target_modules": [f"{part}_proj" for part in PARTS]},
        federation={"rounds": count, "cohort": 3},
        training={"lr": 1e-2, **training},
        personal={"epochs": 1, "lr": 1e-2, "fallback": False},
        evaluation={"every_rounds": count, "sample_tokens": 4},
    )
