"""What `fedgen client KIT` runs: it starts and watches the trainer and Flower's SuperNode.

It imports neither torch nor Flower, and says in few lines what happens.
"""

import re
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedgen_edge.deploy.processes import ProcessExit, Supervisor
from fedgen_edge.deploy.settings import SiteSettings, load_site_settings, read
from fedgen_edge.deploy.site.trainer import TrainerClient, make_key
from fedgen_edge.errors import ConfigError, RefusedError
from fedgen_edge.network import messages
from fedgen_edge.network.flower.environment import environment
from fedgen_edge.network.messages import Answer, Handler, WorkRequest
from fedgen_edge.runs import records

REQUIRED_FILES = ("site.toml", "recipe.toml", "ca.crt", "key", "key.pub", "secret")
PRIVATE_FILES = ("key", "secret")
USER_ERROR_STATUS = 2
"""How the trainer exits where its user has something to mend."""
CONNECTED_TEXT = "SuperNode ID:"
"""What Flower's SuperNode says when the server has let it in."""
TLS_FAULT_TEXT = "_ssl.c"
"""In what Flower's SuperNode says of any fault of TLS, such as a handshake that was cut off; then
it neither tries again nor ends."""
ADVICE = (
    (
        r"code: 2004|Failed to activate SuperNode",
        "{server} does not let this site in: trying again, as it may take a minute after a crash; "
        "if it stays so, have its operator register {name}'s key.pub, or stop the other process "
        "that uses this kit's key",
    ),
    (
        r"code: 2001|must be registered",
        "{server} did not get this site's key, and wants one: fetch a new kit from its operator",
    ),
    (
        r"certificate verify failed.*mismatch",
        "{server} is not a name in the server's certificate: mend `server` in site.toml",
    ),
    (
        r"certificate has expired|certificate is not yet valid",
        "{server}'s certificate is not valid today: set this machine's clock, or have the "
        "server's operator renew it",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "{server}'s certificate is not signed by this kit's ca.crt: fetch a new kit from its "
        "operator",
    ),
    (
        r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|Server disconnected without sending",
        "{server} speaks no TLS where this site does, or the other way round: mend `server` in "
        "site.toml",
    ),
    (
        r"TLS is not enabled",
        "the SuperNode was started without TLS, which a key needs: fetch a new kit",
    ),
    (
        r"Connection refused|connection attempts failed|[Nn]ame or service not known|"
        r"[Nn]ame resolution|No route to host|timed out|UNEXPECTED_EOF",
        "{server} does not answer: trying again",
    ),
)
"""What Flower's SuperNode says when it is not let in, and the way out."""


@runtime_checkable
class Runtime(Protocol):
    """Flower at a site: `engines.flower_runtime` is one."""

    def supernode(self, address: str, ca: Path, key: Path, port: int, secret: Path) -> list[str]:
        """The command of a SuperNode, whose apps' side listens at a port of this machine."""
        ...

    def serve(self, address: str, secret: Path, handler: Handler, stop: threading.Event) -> None:
        """Have the handler answer every message that the SuperNode gets, until it is stopped."""
        ...


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def read_kit(kit: Path) -> SiteSettings:
    """Who the site of a kit is.

    Raises:
        ConfigError: the kit is not whole, or others could read its key.
    """
    if not kit.is_dir():
        raise ConfigError(f"{kit} is no folder: give the kit that `fedgen deploy` made for a site")
    for name in REQUIRED_FILES:
        if not (kit / name).is_file():
            raise ConfigError(f"{kit / name} is missing: fetch the kit from the server again")
    for name in PRIVATE_FILES:
        mode = stat.S_IMODE((kit / name).stat().st_mode)
        if mode & 0o077:
            path = kit / name
            raise ConfigError(f"{path} can be read by others (mode {mode:o}): chmod 600 {path}")
    site = read(SiteSettings, kit / "site.toml")
    load_site_settings(kit, site)
    return site


def join(kit: Path, runtime: Runtime) -> None:
    """Take part with a site's kit, until SIGINT or SIGTERM.

    Args:
        kit: the folder that the server's operator gave this site.
        runtime: `engines.flower_runtime`.

    Raises:
        FedGenError: the kit, its settings or its data are not as they must be.
        CheckpointError: another process uses the kit.
    """
    site, stop, state = read_kit(kit), threading.Event(), kit / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    state.chmod(0o700)
    with records.lock_run(kit), _stop_on_signals(stop):
        make_key(state)
        monitor = ProcessMonitor(site, kit, stop)
        trainer = Supervisor(
            [sys.executable, "-m", "fedgen_edge.deploy.site.trainer", str(kit)],
            state / "trainer.log",
            monitor.on_trainer_exit,
        )
        trainer_client = TrainerClient(state, stop, on_timeout=trainer.kill)
        trainer.start()
        try:
            if trainer_client.wait_until_ready():
                monitor.was_ready = True
                say(f"{site.name}: data read, backbone loaded; joining {site.server}")
                _serve(site, monitor, runtime, trainer_client)
            elif not stop.is_set():
                monitor.failure = (
                    f"the trainer was not ready in {trainer_client.start_seconds:g} seconds"
                )
        finally:
            trainer.stop()
    monitor.raise_failure()


def _serve(
    site: SiteSettings, monitor: "ProcessMonitor", runtime: Runtime, trainer_client: TrainerClient
) -> None:
    port, kit = site.port or _find_free_port(), monitor.kit.resolve()
    ca, key, secret = kit / "ca.crt", kit / "key", kit / "secret"

    def handle_line(line: str) -> None:
        monitor.on_node_line(line)
        if TLS_FAULT_TEXT in line:
            node.kill()

    node = Supervisor(
        runtime.supernode(site.server, ca, key, port, secret),
        monitor.kit / "state" / "supernode.log",
        monitor.on_node_exit,
        handle_line,
        environment(kit / "state" / "flower"),
    )
    node.start()
    try:
        runtime.serve(
            f"127.0.0.1:{port}",
            secret,
            ReportingHandler(trainer_client, monitor, node.restart),
            monitor.stop,
        )
    finally:
        node.stop()


def _find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[None]:
    def handle_signal(number: int, frame: Any) -> None:
        del number, frame
        stop.set()

    previous_handlers = {
        number: signal.signal(number, handle_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@dataclass
class ProcessMonitor:
    """Tells the user what the two children say, and stops all where that is the user's to mend."""

    site: SiteSettings
    kit: Path
    stop: threading.Event
    was_ready: bool = False
    """Whether the trainer was ever ready."""
    failure: str | None = None
    """Why all was stopped."""
    last_message: str | None = None
    """What was said last of the connection: it is not said twice."""

    def on_trainer_exit(self, process_exit: ProcessExit) -> bool:
        """A mistake, or a start that fails, is for the user; any other end is mended by a start."""
        if self.was_ready and process_exit.code != USER_ERROR_STATUS:
            say(f"the trainer ended ({_describe_exit(process_exit)}): starting it again")
            return True
        if process_exit.code == USER_ERROR_STATUS:
            self.failure = process_exit.last_line.removeprefix("fedgen: ")
        else:
            log = self.kit / "state" / "trainer.log"
            self.failure = f"the trainer cannot start ({_describe_exit(process_exit)}): see {log}"
        self.stop.set()
        return False

    def on_node_line(self, line: str) -> None:
        """Tell whether the server lets the site in."""
        if CONNECTED_TEXT in line:
            self._say_once(f"connected to {self.site.server}")
        else:
            for pattern, advice in ADVICE:
                if re.search(pattern, line):
                    self._say_once(advice.format(server=self.site.server, name=self.site.name))
                    return

    def on_node_exit(self, process_exit: ProcessExit) -> bool:
        """It is always started again: whatever the server has against the site may be mended."""
        if self.last_message is None:
            log = self.kit / "state" / "supernode.log"
            self._say_once(
                f"the SuperNode ended ({_describe_exit(process_exit)}), trying again: see {log}"
            )
        return True

    def raise_failure(self) -> None:
        """Raise what the user is to mend.

        Raises:
            ConfigError: there is something.
        """
        if self.failure:
            raise ConfigError(self.failure)

    def _say_once(self, text: str) -> None:
        if text != self.last_message:
            say(text)
            self.last_message = text


def _describe_exit(process_exit: ProcessExit) -> str:
    if process_exit.code < 0:
        return f"killed by {signal.Signals(-process_exit.code).name}"
    return (
        f"status {process_exit.code}: {process_exit.last_line[:200]}"
        if process_exit.last_line
        else f"status {process_exit.code}"
    )


@dataclass
class ReportingHandler:
    """The trainer's answers, with a line for the user about each that matters."""

    handler: Handler
    monitor: ProcessMonitor
    renew: Callable[[], None]
    """Starts the SuperNode again."""
    has_served: bool = False
    """Whether it carried anything since it was started."""
    sent_rounds: dict[str, int] = field(default_factory=dict)
    """Round of the last update, by its SHA-256, until it is known to count."""

    def __call__(self, text: str, payload: bytes) -> tuple[str, bytes]:
        """Answer a message."""
        answer_line, answer_payload = self.handler(text, payload)
        try:
            work, answer = (
                messages.decode_message(WorkRequest, text, b""),
                messages.decode_message(Answer, answer_line, b""),
            )
        except RefusedError as error:
            say(f"refused a message ({error})")
        else:
            self._report_answer(work, answer, messages.digest(answer_payload))
            self._discard_stale_answer(work)
        return answer_line, answer_payload

    def _discard_stale_answer(self, work: WorkRequest) -> None:
        """Begin anew with a SuperNode that may hold an answer which nobody waits for any more.

        It sends one answer for each message that it gets: an old one takes the place of the next,
        for ever. A server that asks to join anew is another than before, and asks again.
        """
        if work.kind == "join" and self.has_served:
            self.renew()
        self.has_served = work.kind != "join"

    def _report_answer(self, work: WorkRequest, answer: Answer, update_digest: str) -> None:
        if work.accepted in self.sent_rounds:
            say(f"round {self.sent_rounds[work.accepted] + 1}: accepted")
            self.sent_rounds = {}
        if answer.refused:
            reason = answer.said.get("reason", "")
            say(f"round {work.round + 1}: {work.kind} refused, {answer.refused}: {reason}")
        elif work.kind == "join":
            say(f"run {work.terms.run[:8]}: joined with {answer.said['weight']} training rows")
        elif work.kind == "train":
            say(f"round {work.round + 1}: trained, loss {answer.said['loss']:.4f}")
            self.sent_rounds = {update_digest: work.round}
        elif work.kind == "personalise":
            state = self.monitor.kit / "state"
            say(f"personal adapter at {state / 'runs' / work.terms.run / 'personal'}")
