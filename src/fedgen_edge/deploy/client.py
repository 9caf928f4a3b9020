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

from fedgen_edge.deploy.processes import Ended, Kept
from fedgen_edge.deploy.settings import Site, read, settings_of
from fedgen_edge.deploy.trainer import Forward, make_key
from fedgen_edge.engines import exchange
from fedgen_edge.engines.exchange import Answer, Handler, Work
from fedgen_edge.engines.flower_environment import environment
from fedgen_edge.errors import ConfigError, RefusedError
from fedgen_edge.experiments import records

NEEDED = ("site.toml", "recipe.toml", "ca.crt", "key", "key.pub", "secret")
PRIVATE = ("key", "secret")
MISTAKE = 2
"""How the trainer exits where its user has something to mend."""
CONNECTED = "SuperNode ID:"
"""What Flower's SuperNode says when the server has let it in."""
BROKEN = "_ssl.c"
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


def checked(kit: Path) -> Site:
    """Who the site of a kit is.

    Raises:
        ConfigError: the kit is not whole, or others could read its key.
    """
    if not kit.is_dir():
        raise ConfigError(f"{kit} is no folder: give the kit that `fedgen deploy` made for a site")
    for name in NEEDED:
        if not (kit / name).is_file():
            raise ConfigError(f"{kit / name} is missing: fetch the kit from the server again")
    for name in PRIVATE:
        mode = stat.S_IMODE((kit / name).stat().st_mode)
        if mode & 0o077:
            path = kit / name
            raise ConfigError(f"{path} can be read by others (mode {mode:o}): chmod 600 {path}")
    site = read(Site, kit / "site.toml")
    settings_of(kit, site)
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
    site, stop, state = checked(kit), threading.Event(), kit / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    state.chmod(0o700)
    with records.locked(kit), _stopped_by_signals(stop):
        make_key(state)
        watch = Watch(site, kit, stop)
        trainer = Kept(
            [sys.executable, "-m", "fedgen_edge.deploy.trainer", str(kit)],
            state / "trainer.log",
            watch.trainer_ended,
        )
        forward = Forward(state, stop, late=trainer.kill)
        trainer.start()
        try:
            if forward.ready():
                watch.up = True
                say(f"{site.name}: data read, backbone loaded; joining {site.server}")
                _serve(site, watch, runtime, forward)
            elif not stop.is_set():
                watch.failed = f"the trainer was not ready in {forward.up:g} seconds"
        finally:
            trainer.stop()
    watch.end()


def _serve(site: Site, watch: "Watch", runtime: Runtime, forward: Forward) -> None:
    port, kit = site.port or _free_port(), watch.kit.resolve()
    ca, key, secret = kit / "ca.crt", kit / "key", kit / "secret"

    def heard(line: str) -> None:
        watch.node_said(line)
        if BROKEN in line:
            node.kill()

    node = Kept(
        runtime.supernode(site.server, ca, key, port, secret),
        watch.kit / "state" / "supernode.log",
        watch.node_ended,
        heard,
        environment(kit / "state" / "flower"),
    )
    node.start()
    try:
        runtime.serve(f"127.0.0.1:{port}", secret, Told(forward, watch, node.renew), watch.stop)
    finally:
        node.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    def stops(number: int, frame: Any) -> None:
        del number, frame
        stop.set()

    before = {number: signal.signal(number, stops) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Watch:
    """Tells the user what the two children say, and stops all where that is the user's to mend."""

    site: Site
    kit: Path
    stop: threading.Event
    up: bool = False
    """Whether the trainer was ever ready."""
    failed: str | None = None
    """Why all was stopped."""
    last: str | None = None
    """What was said last of the connection: it is not said twice."""

    def trainer_ended(self, ended: Ended) -> bool:
        """A mistake, or a start that fails, is for the user; any other end is mended by a start."""
        if self.up and ended.code != MISTAKE:
            say(f"the trainer ended ({_how(ended)}): starting it again")
            return True
        if ended.code == MISTAKE:
            self.failed = ended.line.removeprefix("fedgen: ")
        else:
            log = self.kit / "state" / "trainer.log"
            self.failed = f"the trainer cannot start ({_how(ended)}): see {log}"
        self.stop.set()
        return False

    def node_said(self, line: str) -> None:
        """Tell whether the server lets the site in."""
        if CONNECTED in line:
            self._once(f"connected to {self.site.server}")
        else:
            for pattern, advice in ADVICE:
                if re.search(pattern, line):
                    self._once(advice.format(server=self.site.server, name=self.site.name))
                    return

    def node_ended(self, ended: Ended) -> bool:
        """It is always started again: whatever the server has against the site may be mended."""
        if self.last is None:
            log = self.kit / "state" / "supernode.log"
            self._once(f"the SuperNode ended ({_how(ended)}), trying again: see {log}")
        return True

    def end(self) -> None:
        """Raise what the user is to mend.

        Raises:
            ConfigError: there is something.
        """
        if self.failed:
            raise ConfigError(self.failed)

    def _once(self, text: str) -> None:
        if text != self.last:
            say(text)
            self.last = text


def _how(ended: Ended) -> str:
    if ended.code < 0:
        return f"killed by {signal.Signals(-ended.code).name}"
    return f"status {ended.code}: {ended.line[:200]}" if ended.line else f"status {ended.code}"


@dataclass
class Told:
    """The trainer's answers, with a line for the user about each that matters."""

    forward: Handler
    watch: Watch
    renew: Callable[[], None]
    """Starts the SuperNode again."""
    served: bool = False
    """Whether it carried anything since it was started."""
    sent: dict[str, int] = field(default_factory=dict)
    """Round of the last update, by its SHA-256, until it is known to count."""

    def __call__(self, text: str, payload: bytes) -> tuple[str, bytes]:
        """Answer a message."""
        said, sent = self.forward(text, payload)
        try:
            work, answer = exchange.read(Work, text, b""), exchange.read(Answer, said, b"")
        except RefusedError as error:
            say(f"refused a message ({error})")
        else:
            self._tell(work, answer, exchange.digest(sent))
            self._clear(work)
        return said, sent

    def _clear(self, work: Work) -> None:
        """Begin anew with a SuperNode that may hold an answer which nobody waits for any more.

        It sends one answer for each message that it gets: an old one takes the place of the next,
        for ever. A server that asks to join anew is another than before, and asks again.
        """
        if work.kind == "join" and self.served:
            self.renew()
        self.served = work.kind != "join"

    def _tell(self, work: Work, answer: Answer, sent: str) -> None:
        if work.accepted in self.sent:
            say(f"round {self.sent[work.accepted] + 1}: accepted")
            self.sent = {}
        if answer.refused:
            reason = answer.said.get("reason", "")
            say(f"round {work.round + 1}: {work.kind} refused, {answer.refused}: {reason}")
        elif work.kind == "join":
            say(f"run {work.terms.run[:8]}: joined with {answer.said['weight']} training rows")
        elif work.kind == "train":
            say(f"round {work.round + 1}: trained, loss {answer.said['loss']:.4f}")
            self.sent = {sent: work.round}
        elif work.kind == "personalise":
            state = self.watch.kit / "state"
            say(f"personal adapter at {state / 'runs' / work.terms.run / 'personal'}")
