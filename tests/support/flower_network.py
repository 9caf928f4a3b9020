"""A SuperLink and sites of Flower's, as processes on this machine, for tests."""

import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgen_edge.network.flower.runtime import environment, hub, serve, superlink, supernode
from fedgen_edge.network.messages import Terms, WorkRequest

WORK = WorkRequest("train", Terms("r", "s", "b"), 0, 0, 0, None, b"")
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

    def everyone(self, payload: bytes = b"") -> dict[str, WorkRequest]:
        return {name: replace(WORK, client=i, payload=payload) for i, name in enumerate(self.keys)}
