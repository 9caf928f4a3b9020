"""The server's side of Flower: a run of our own at its SuperLink, carried on by this process."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path

import fedgen_edge.engines.flower_guard  # noqa: F401 - says which Flower is needed

# isort: split
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedgen_edge.engines.flower import FlowerCarrier
from fedgen_edge.engines.flower_client import PAUSE, Pulse, Server
from fedgen_edge.engines.flower_link import Link
from fedgen_edge.errors import CarrierError, ConfigError, FedGenError

APP = "fedgen-edge/carrier"
"""What runs of ours are called at the SuperLink."""
FILES = {
    "pyproject.toml": b"""[project]
name = "carrier"
version = "1.0.0"
description = "Stands for a run; holds no code that a site would run"

[tool.flwr.app]
publisher = "fedgen-edge"

[tool.flwr.app.components]
serverapp = "carrier:app"
clientapp = "carrier:app"
""",
    "carrier.py": b'raise RuntimeError("sites of fedgen-edge run installed code alone")\n',
}


@dataclass(frozen=True)
class Registry:
    """The sites that the SuperLink lets in."""

    server: Server
    control: ControlHttpClient
    names: dict[bytes, str] = field(default_factory=dict)
    """Of sites, by their public keys in PEM."""

    def register(self, name: str, pub: Path) -> None:
        """Let a site in.

        Args:
            name: what it is called.
            pub: its public key, as OpenSSH writes it.

        Raises:
            ConfigError: the file holds no such key, or one that was taken back before.
            CarrierError: the SuperLink is away for long.
        """
        self._let_in(name, pub, set(self._nodes()))

    def unregister(self, name: str) -> None:
        """Take a site's key back, for ever; its SuperNode ends.

        Raises:
            CarrierError: the SuperLink is away for long.
        """
        self._drop({key for key, known in self.names.items() if known == name})

    def keep(self, keys: Mapping[str, Path]) -> None:
        """Let these in and no others."""
        known = set(self._nodes())
        for name, pub in keys.items():
            self._let_in(name, pub, known)
        self._drop(known - self.names.keys())

    def online(self) -> dict[int, str]:
        """The nodes that could be asked now, and the name of each one's site."""
        return {
            node: self.names[key]
            for key, (node, status) in self._nodes().items()
            if status == NodeStatus.ONLINE and key in self.names
        }

    def _let_in(self, name: str, pub: Path, known: set[bytes]) -> None:
        key = public_key(pub)
        if key not in known:
            try:
                with self.server.asked():
                    self.control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            except CarrierError as error:
                if "already in use" not in str(error):
                    raise
                raise ConfigError(f"{pub} was taken back before: make a new key") from None
        self.names[key] = name

    def _nodes(self) -> dict[bytes, tuple[int, str]]:
        with self.server.asked():
            found = self.control.ListNodes(ListNodesRequest()).nodes_info
        return {
            node.public_key: (node.node_id, node.status)
            for node in found
            if node.status != NodeStatus.UNREGISTERED
        }

    def _drop(self, keys: set[bytes]) -> None:
        nodes = self._nodes()
        for key in keys:
            if key in nodes:
                with self.server.asked():
                    self.control.UnregisterNode(UnregisterNodeRequest(node_id=nodes[key][0]))
            self.names.pop(key, None)


@dataclass(frozen=True)
class Hub:
    """A run at the SuperLink, while it is open."""

    carrier: FlowerCarrier
    registry: Registry

    def register(self, name: str, pub: Path) -> None:
        """Let a site in, as `Registry.register` says."""
        self.registry.register(name, pub)

    def unregister(self, name: str) -> None:
        """Take a site's key back, as `Registry.unregister` says."""
        self.registry.unregister(name)


@contextmanager
def hub(
    address: str,
    ca: Path,
    secret: Path,
    keys: Mapping[str, Path],
    patience: float = 45.0,
    largest: int = 2**28,
) -> Iterator[Hub]:
    """A run of our own at a SuperLink; one at a time in a process, and at a SuperLink.

    Args:
        address: host and port of the SuperLink.
        ca: certificates that its own must descend from.
        secret: the file that `superlink` names.
        keys: public keys, as OpenSSH writes them, of the sites that are let in, by their names;
            all others are taken back.
        patience: seconds that it may be away before it is given up; it takes a run that nobody
            carries on for lost after 60.
        largest: bytes of an answer's payload, at most.

    Raises:
        ConfigError: a file is missing, or is no key.
        CarrierError: it is away for long, or refuses.
    """
    signing = _read(secret)
    _read(ca)
    server = Server(address, ca, patience)
    with ExitStack() as stack:
        control = stack.enter_context(server.client(ControlHttpClient))
        registry = Registry(server, control)
        registry.keep(keys)
        token = _begun(server, control, signing)
        pulse = stack.enter_context(Pulse(server, token))
        client = stack.enter_context(server.client(RuntimeHttpClient, token=token))
        link = Link(_grid(server, client, token), server, pulse, largest + 2**20)
        stack.push(lambda kind, *_: _ended(server, token, kind is None))

        def online() -> dict[int, str]:
            pulse.check()
            return registry.online()

        yield Hub(FlowerCarrier(link, online), registry)


def public_key(pub: Path) -> bytes:
    """The key in a file of OpenSSH's, in PEM.

    Raises:
        ConfigError: there is none that Flower takes.
    """
    try:
        key = load_ssh_public_key(_read(pub))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise ConfigError(f"{pub} is no public key on a NIST curve: ssh-keygen -t ecdsa -b 384")
    return public_key_to_bytes(key)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


@cache
def _app() -> Fab:
    content, _ = build_fab_from_files(FILES)
    return Fab(sha256(content).hexdigest(), content, {})


def _begun(server: Server, control: ControlHttpClient, signing: bytes) -> str:
    """Stop runs of ours that nobody carries on, start one, take its task; the task's token."""
    with server.asked():
        runs = control.ListRuns(ListRunsRequest(limit=1000)).run_dict.values()
        for old in [r for r in runs if r.fab_id == APP and r.status.status != Status.FINISHED]:
            control.StopRun(StopRunRequest(run_id=old.run_id))
        run = control.StartRun(StartRunRequest(fab=fab_to_proto(_app()))).run_id
        with server.client(RuntimeHttpClient, secret=signing) as client:
            until = time.monotonic() + server.patience
            while time.monotonic() < until:
                found = client.AcquireTask(
                    AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
                )
                if found.token and found.task.run_id == run:
                    return found.token
                time.sleep(PAUSE)
    raise CarrierError(f"Flower's server at {server.address} gave no task for the run it started")


def _grid(server: Server, client: RuntimeHttpClient, token: str) -> HttpGrid:
    with server.asked():
        given = client.PullTaskInput(PullTaskInputRequest())
    # Flower's messages take their sender from here.
    TaskIdentity.task_id = given.task_id
    TaskIdentity.run_id = given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    grid = HttpGrid(server.address, token=token)
    grid._client = client
    grid.set_run(run_from_proto(given.run))
    return grid


def _ended(server: Server, token: str, well: bool) -> None:
    """Say that the task is over, which ends its run; where that fails, the next hub stops it."""
    done = PushTaskOutputRequest(sub_status=SubStatus.COMPLETED if well else SubStatus.FAILED)
    try:
        with server.asked(), server.client(RuntimeHttpClient, token=token, patience=0.0) as client:
            client.PushTaskOutput(done)
    except FedGenError:
        return
