"""Flower as it really runs: its servers as processes, with TLS and keys, and our ends of them."""

import contextlib
import datetime
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.runtime import RuntimeHttpClient

from fedgen_edge.engines import flower_client
from fedgen_edge.engines.exchange import Reply, Terms, Work, line
from fedgen_edge.engines.flower_guard import FLOWER, check
from fedgen_edge.engines.flower_hub import public_key
from fedgen_edge.engines.flower_runtime import Hub, environment, hub, serve, superlink, supernode
from fedgen_edge.errors import CarrierError, ConfigError, MissingExtraError

SUPERLINK = 1
"""Its number among nodes."""
WORK = Work("train", Terms("r", "s", "b"), 0, 0, 0, None, b"")
LONG = 60.0
"""Seconds that nothing here takes unless it is broken."""


def private(path: Path) -> ec.EllipticCurvePrivateKey:
    """A key pair as OpenSSH writes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public)
    return key


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Files of a CA's certificate, a server's own for this machine, and its key."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])

    def begun(name: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    ca = (
        begun(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    server = (
        begun(name, key.public_key())
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    files = folder / "ca.crt", folder / "server.pem", folder / "server.key"
    files[0].write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(server.public_bytes(serialization.Encoding.PEM))
    files[2].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def until(holds: Callable[[], bool], seconds: float = LONG) -> None:
    """Wait for what must come true."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come true"
        time.sleep(0.1)


@dataclass
class Network:
    """A SuperLink, and sites with a SuperNode and an echo each."""

    folder: Path
    port: int = field(default_factory=free_port)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    keys: dict[str, Path] = field(default_factory=dict)
    ports: dict[str, str] = field(default_factory=dict)
    heard: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Site, line and payload of what was handled."""
    hold: threading.Event = field(default_factory=threading.Event)
    """Handlers wait until this is set."""
    quick: str = ""
    """A site that does not."""
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def secret(self) -> Path:
        return self.folder / "secret"

    def run(self, name: str, command: list[str]) -> None:
        home = self.folder / "home" / name
        program = str(Path(sys.executable).parent / command[0])
        with (self.folder / f"{name}.log").open("ab") as log:
            self.started[name] = subprocess.Popen(
                [program, *command[1:]],
                env={**os.environ, **environment(home)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def begin(self) -> None:
        tls = self.folder / "ca.crt", self.folder / "server.pem", self.folder / "server.key"
        command = superlink(self.port, tls, self.folder / "state.db", self.secret)
        self.run("superlink", command)

    def kill(self, name: str) -> None:
        process = self.started.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LONG)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text("utf-8", "replace")

    def node(self, name: str) -> int:
        """Run a SuperNode; its port."""
        port, key = free_port(), self.folder / name
        if not key.exists():
            private(key)
        command = supernode(self.address, self.folder / "ca.crt", key, port, self.secret)
        self.run(name, command)
        return port

    def site(self, name: str) -> None:
        """Run a SuperNode, and an echo beside it."""
        address = self.ports[name] = f"127.0.0.1:{self.node(name)}"
        self.keys[name] = self.folder / f"{name}.pub"

        def echo(said: str, payload: bytes) -> tuple[str, bytes]:
            self.heard.append((name, said, payload))
            assert name == self.quick or self.hold.wait(LONG)
            if payload == b"fail at " + name.encode():
                raise ValueError("secret of the data")
            return said, payload

        thread = threading.Thread(target=serve, args=(address, self.secret, echo, self.stop))
        thread.start()
        self.threads.append(thread)

    def hub(self, **how: float) -> contextlib.AbstractContextManager:
        ca = self.folder / "ca.crt"
        return hub(self.address, ca, self.secret, self.keys, **how)  # pyright: ignore

    def everyone(self, payload: bytes = b"") -> dict[str, Work]:
        return {name: replace(WORK, client=i, payload=payload) for i, name in enumerate(self.keys)}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    made = Network(tmp_path_factory.mktemp("flower"))
    certificates(made.folder)
    made.secret.write_bytes(secrets.token_bytes(32))
    made.hold.set()
    hurried = pytest.MonkeyPatch()
    hurried.setattr(flower_client, "BEAT", 1.0)
    try:
        made.begin()
        for name in ("north", "south", "west"):
            private(made.folder / name)
            made.keys[name] = made.folder / f"{name}.pub"
        with made.hub():  # which registers their keys
            for name in made.keys:
                made.site(name)
        yield made
    finally:
        hurried.undo()
        made.stop.set()
        made.hold.set()
        for name in list(made.started):
            made.kill(name)
        for thread in made.threads:
            thread.join(LONG)


def answers(replies: Iterator[Reply]) -> dict[str, tuple[str, bytes, str | None]]:
    found = list(replies)
    assert len({r.site for r in found}) == len(found)
    return {r.site: (r.line, r.payload, r.failed) for r in found}


@pytest.fixture
def opened(network: Network) -> Iterator[Hub]:
    with network.hub() as made:
        until(lambda: set(network.keys) <= set(made.carrier.present()))
        network.heard.clear()
        yield made


@contextlib.contextmanager
def held(network: Network, quick: str = "") -> Iterator[None]:
    """No handler ends while the block runs, but for a quick site's."""
    network.quick = quick
    network.hold.clear()
    try:
        yield
    finally:
        network.hold.set()
        network.quick = ""


def test_another_flower_or_none_is_one_line_that_says_what_to_install() -> None:
    check(FLOWER)
    with pytest.raises(CarrierError, match=r'^flwr 1\.42\.0 .*: pip install "flwr==1\.41\.0"$'):
        check("1.42.0")
    with pytest.raises(MissingExtraError, match=r"fedgen-edge\[flower\]"):
        check(None)


def test_a_site_loads_no_model_library_to_serve() -> None:
    program = (
        "import sys; from fedgen_edge.engines.flower_runtime import serve; "
        "print(sorted({'torch', 'transformers', 'diffusers', 'ray'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=LONG, check=True
    )
    assert said.stdout == b"[]\n"


def test_each_site_answers_with_its_own_name_and_equal_payloads_go_up_once(
    network: Network, opened: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed, push = [], RuntimeHttpClient.PushObject

    def counted(client: RuntimeHttpClient, request: PushObjectRequest) -> PushObjectResponse:
        if request.node.node_id == SUPERLINK:
            pushed.append(len(request.object_content))
        return push(client, request)

    monkeypatch.setattr(RuntimeHttpClient, "PushObject", counted)
    assert opened.carrier.present() == ["north", "south", "west"]
    payload = secrets.token_bytes(2_000_000)
    work = network.everyone(payload)
    assert answers(opened.carrier.exchange(work, LONG)) == {
        site: (line(each), payload, None) for site, each in work.items()
    }
    assert sorted(network.heard) == [(site, line(work[site]), payload) for site in sorted(work)]
    # Each site's message, its records and its line; and once the array, its record and its chunk.
    assert len(pushed) == 3 * 3 + 3
    assert len(payload) < sum(pushed) < len(payload) + 20_000


def test_of_a_handler_s_error_the_server_learns_its_name_alone(
    network: Network, opened: Hub
) -> None:
    found = answers(opened.carrier.exchange(network.everyone(b"fail at west"), LONG))
    assert found.pop("west") == ("", b"", "ValueError (Flower's error 2)")
    assert [failed for _, _, failed in found.values()] == [None, None]


def test_a_second_hub_ends_the_run_of_the_first_whose_next_call_says_so(
    network: Network, opened: Hub
) -> None:
    with network.hub():
        runs = opened.registry.control.ListRuns(ListRunsRequest()).run_dict.values()
        assert [run.status.status for run in runs].count("running") == 1
    with pytest.raises(CarrierError, match=r"127\.0\.0\.1") as caught:
        list(opened.carrier.exchange(network.everyone(), LONG))
    assert "\n" not in str(caught.value)

    def lost() -> bool:
        with contextlib.suppress(CarrierError):
            opened.carrier.present()
            return False
        return True

    until(lost)


def test_a_new_hub_brings_nothing_of_the_one_before_it(network: Network) -> None:
    with held(network, quick="north"):
        with network.hub() as first:
            until(lambda: len(first.carrier.present()) == 3)
            network.heard.clear()
            replies = first.carrier.exchange(network.everyone(b"old"), LONG)
            assert next(replies).site == "north"
            until(lambda: len(network.heard) == 3)
            replies.close()  # pyright: ignore[reportAttributeAccessIssue]
        with network.hub() as second:
            replies = second.carrier.exchange(network.everyone(b"new"), LONG)
            assert next(replies).payload == b"new"
            network.hold.set()
            assert {(r.site, r.payload) for r in replies} == {("south", b"new"), ("west", b"new")}


def test_a_server_that_is_killed_and_started_again_loses_no_reply(
    network: Network, opened: Hub
) -> None:
    work, found = network.everyone(secrets.token_bytes(100_000)), []
    replies = opened.carrier.exchange(work, LONG)
    asking = threading.Thread(target=lambda: found.append(answers(replies)))
    with held(network):
        asking.start()
        until(lambda: len(network.heard) == 3)
        network.kill("superlink")
        network.begin()
    asking.join(2 * LONG)
    assert found == [{site: (line(each), each.payload, None) for site, each in work.items()}]


def test_a_supernode_is_let_in_by_its_key_and_by_nothing_else(
    network: Network, opened: Hub
) -> None:
    network.node("stranger")
    assert network.started.pop("stranger").wait(LONG) != 0
    assert "Failed to activate SuperNode" in network.log("stranger")
    assert opened.carrier.present() == ["north", "south", "west"]

    pub = network.folder / "stranger.pub"
    opened.register("east", pub)
    network.node("stranger")
    until(lambda: opened.carrier.present() == ["east", "north", "south", "west"])

    opened.unregister("east")
    assert opened.carrier.present() == ["north", "south", "west"]
    network.started.pop("stranger").wait(LONG)
    with pytest.raises(ConfigError, match="taken back"):
        opened.register("east", pub)


def test_a_server_that_is_not_there_or_not_ours_is_one_line(
    network: Network, tmp_path: Path
) -> None:
    ca = network.folder / "ca.crt"
    nowhere = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(CarrierError, match=f"{nowhere} does not answer"),
        hub(nowhere, ca, network.secret, {}, patience=0.5),
    ):
        pass
    certificates(tmp_path)
    with (
        pytest.raises(CarrierError, match="CERTIFICATE_VERIFY_FAILED"),
        hub(network.address, tmp_path / "ca.crt", network.secret, {}, patience=3600.0),
    ):
        pass


def test_files_that_are_missing_or_no_keys_are_named(network: Network, tmp_path: Path) -> None:
    ca, missing = network.folder / "ca.crt", tmp_path / "missing"
    with pytest.raises(ConfigError, match="missing"), hub(network.address, ca, missing, {}):
        pass
    with pytest.raises(ConfigError, match="missing"):
        serve(network.address, missing, lambda *message: message, network.stop)
    with pytest.raises(ConfigError, match=r"ca\.crt is no public key"):
        public_key(ca)


def test_a_supernode_with_another_secret_is_told_of(network: Network, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(secrets.token_bytes(32))
    with pytest.raises(CarrierError, match="other"):
        serve(network.ports["north"], tmp_path / "other", lambda *message: message, network.stop)


def test_a_site_whose_supernode_dies_is_missed_and_the_others_are_not(
    network: Network, opened: Hub
) -> None:
    started = time.monotonic()
    with held(network):
        replies = opened.carrier.exchange(network.everyone(), 15.0)
        asking = threading.Thread(target=lambda: found.append(answers(replies)))
        found: list[dict[str, tuple[str, bytes, str | None]]] = []
        asking.start()
        until(lambda: len(network.heard) == 3)
        network.kill("west")
    asking.join(LONG)
    assert set(found[0]) == {"north", "south"}
    assert 15 <= time.monotonic() - started < LONG
