"""The server's side of Flower: a run of our own at its SuperLink, carried on by this process."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path

import fedgen_edge.network.flower.version  # noqa: F401 - says which Flower is needed

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

from fedgen_edge.errors import CarrierError, ConfigError, FedGenError
from fedgen_edge.network.flower.carrier import FlowerCarrier
from fedgen_edge.network.flower.http import RETRY_SECONDS, FlowerServer, Heartbeat
from fedgen_edge.network.flower.link import Link

APP_ID = "fedgen-edge/carrier"
"""What runs of ours are called at the SuperLink."""
APP_FILES = {
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
class NodeRegistry:
    """The sites that the SuperLink lets in."""

    server: FlowerServer
    control: ControlHttpClient
    site_names: dict[bytes, str] = field(default_factory=dict)
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
        self._admit(name, pub, set(self._list_nodes()))

    def unregister(self, name: str) -> None:
        """Take a site's key back, for ever; its SuperNode ends.

        Raises:
            CarrierError: the SuperLink is away for long.
        """
        self._unregister_nodes({key for key, known in self.site_names.items() if known == name})

    def retain_only(self, keys: Mapping[str, Path]) -> None:
        """Let these in and no others."""
        known_keys = set(self._list_nodes())
        for name, pub in keys.items():
            self._admit(name, pub, known_keys)
        self._unregister_nodes(known_keys - self.site_names.keys())

    def find_online_nodes(self) -> dict[int, str]:
        """The nodes that could be asked now, and the name of each one's site."""
        return {
            node: self.site_names[key]
            for key, (node, status) in self._list_nodes().items()
            if status == NodeStatus.ONLINE and key in self.site_names
        }

    def _admit(self, name: str, pub: Path, known_keys: set[bytes]) -> None:
        key = read_public_key(pub)
        if key not in known_keys:
            try:
                with self.server.translate_errors():
                    self.control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            except CarrierError as error:
                if "already in use" not in str(error):
                    raise
                raise ConfigError(f"{pub} was taken back before: make a new key") from None
        self.site_names[key] = name

    def _list_nodes(self) -> dict[bytes, tuple[int, str]]:
        with self.server.translate_errors():
            node_infos = self.control.ListNodes(ListNodesRequest()).nodes_info
        return {
            node.public_key: (node.node_id, node.status)
            for node in node_infos
            if node.status != NodeStatus.UNREGISTERED
        }

    def _unregister_nodes(self, keys: set[bytes]) -> None:
        nodes = self._list_nodes()
        for key in keys:
            if key in nodes:
                with self.server.translate_errors():
                    self.control.UnregisterNode(UnregisterNodeRequest(node_id=nodes[key][0]))
            self.site_names.pop(key, None)


@dataclass(frozen=True)
class Hub:
    """A run at the SuperLink, while it is open."""

    carrier: FlowerCarrier
    registry: NodeRegistry

    def register(self, name: str, pub: Path) -> None:
        """Let a site in, as `NodeRegistry.register` says."""
        self.registry.register(name, pub)

    def unregister(self, name: str) -> None:
        """Take a site's key back, as `NodeRegistry.unregister` says."""
        self.registry.unregister(name)


@contextmanager
def hub(
    address: str,
    ca: Path,
    secret: Path,
    keys: Mapping[str, Path],
    patience: float = 45.0,
    max_payload_bytes: int = 2**28,
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
        max_payload_bytes: bytes of an answer's payload, at most.

    Raises:
        ConfigError: a file is missing, or is no key.
        CarrierError: it is away for long, or refuses.
    """
    secret_bytes = _read(secret)
    _read(ca)
    server = FlowerServer(address, ca, patience)
    with ExitStack() as stack:
        control = stack.enter_context(server.make_client(ControlHttpClient))
        registry = NodeRegistry(server, control)
        registry.retain_only(keys)
        token = _start_run(server, control, secret_bytes)
        heartbeat = stack.enter_context(Heartbeat(server, token))
        client = stack.enter_context(server.make_client(RuntimeHttpClient, token=token))
        link = Link(
            _connect_grid(server, client, token), server, heartbeat, max_payload_bytes + 2**20
        )
        stack.push(lambda kind, *_: _end_task(server, token, kind is None))

        def find_online_nodes() -> dict[int, str]:
            heartbeat.check()
            return registry.find_online_nodes()

        yield Hub(FlowerCarrier(link, find_online_nodes), registry)


def read_public_key(pub: Path) -> bytes:
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
def _build_app() -> Fab:
    content, _ = build_fab_from_files(APP_FILES)
    return Fab(sha256(content).hexdigest(), content, {})


def _start_run(server: FlowerServer, control: ControlHttpClient, secret_bytes: bytes) -> str:
    """Stop runs of ours that nobody carries on, start one, take its task; the task's token."""
    with server.translate_errors():
        runs = control.ListRuns(ListRunsRequest(limit=1000)).run_dict.values()
        for old in [r for r in runs if r.fab_id == APP_ID and r.status.status != Status.FINISHED]:
            control.StopRun(StopRunRequest(run_id=old.run_id))
        run = control.StartRun(StartRunRequest(fab=fab_to_proto(_build_app()))).run_id
        with server.make_client(RuntimeHttpClient, secret=secret_bytes) as client:
            deadline = time.monotonic() + server.patience
            while time.monotonic() < deadline:
                acquired = client.AcquireTask(
                    AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
                )
                if acquired.token and acquired.task.run_id == run:
                    return acquired.token
                time.sleep(RETRY_SECONDS)
    raise CarrierError(f"Flower's server at {server.address} gave no task for the run it started")


def _connect_grid(server: FlowerServer, client: RuntimeHttpClient, token: str) -> HttpGrid:
    with server.translate_errors():
        task_input = client.PullTaskInput(PullTaskInputRequest())
    # Flower's messages take their sender from here.
    TaskIdentity.task_id = task_input.task_id
    TaskIdentity.run_id = task_input.run.run_id
    TaskIdentity.node_id = task_input.context.node_id
    grid = HttpGrid(server.address, token=token)
    grid._client = client
    grid.set_run(run_from_proto(task_input.run))
    return grid


def _end_task(server: FlowerServer, token: str, succeeded: bool) -> None:
    """Say that the task is over, which ends its run; where that fails, the next hub stops it."""
    request = PushTaskOutputRequest(
        sub_status=SubStatus.COMPLETED if succeeded else SubStatus.FAILED
    )
    try:
        with (
            server.translate_errors(),
            server.make_client(RuntimeHttpClient, token=token, patience=0.0) as client,
        ):
            client.PushTaskOutput(request)
    except FedGenError:
        return
