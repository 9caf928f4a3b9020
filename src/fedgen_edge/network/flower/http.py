"""Talks to Flower's servers: clients that give up after a while, and a heartbeat that only tells.

Flower's own clients try again for ever, and end their process where they are refused.
"""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fedgen_edge.network.flower.version  # noqa: F401 - says which Flower is needed

# isort: split
import httpx
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, constant
from flwr.supercore.runtime import RuntimeHttpClient

from fedgen_edge.errors import CarrierError

REQUEST_TIMEOUT = 15.0
"""Seconds that one request may wait for an answer."""
HEARTBEAT_SECONDS = 10.0
"""Seconds between heartbeats; Flower gives a task up after 60 without one."""
RETRY_SECONDS = 0.5
"""Seconds before a request is tried again."""
ACQUIRE_METHODS = frozenset({"/flwr.proto.Runtime/AcquireTask"})

ClientT = TypeVar("ClientT", bound=ProtobufClient)


def make_retry_invoker(patience: float) -> RetryInvoker:
    """Tries again while a server is away, for so many seconds."""
    return RetryInvoker(
        lambda: constant(RETRY_SECONDS),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=patience,
        jitter=None,
        should_giveup=_is_final,
    )


def _is_final(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR
    return "CERTIFICATE" in str(error)


class FlowerServer:
    """One of Flower's servers, and how to reach it."""

    def __init__(self, address: str, ca: Path | None, patience: float) -> None:
        """Without a CA's file it is on this machine, and speaks plainly.

        Args:
            address: host and port.
            ca: certificates that its own must descend from.
            patience: seconds that it may be away before a request is given up.
        """
        self.address, self.ca, self.patience = address, ca, patience

    def make_client(
        self,
        kind: type[ClientT],
        *,
        token: str = "",
        secret: bytes = b"",
        patience: float | None = None,
    ) -> ClientT:
        """A client for one part of it: as a task's owner, or as one who may take tasks.

        Args:
            kind: Flower's class for the part.
            token: the task's, that it speaks for.
            secret: by which tasks may be taken.
            patience: seconds, where they are not the server's.
        """
        tls = ssl.create_default_context(cafile=str(self.ca)) if self.ca else None
        interceptors: list[ProtobufClientInterceptor] = []
        if token:
            interceptors.append(RuntimeTokenHttpInterceptor(token))
        if secret:
            interceptors.append(
                SuperExecAuthHttpInterceptor(
                    master_secret=secret, protected_methods=ACQUIRE_METHODS
                )
            )
        client = kind(
            f"{'https' if tls else 'http'}://{self.address}",
            interceptors=interceptors,
            verify=tls or False,
            retry_invoker=make_retry_invoker(self.patience if patience is None else patience),
        )
        client.close()
        # One that no proxy named in the environment stands before.
        client._client = httpx.Client(verify=tls or False, timeout=REQUEST_TIMEOUT, trust_env=False)
        return client

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn what goes wrong in talking to it into one line.

        Raises:
            CarrierError: it is away, or refuses.
        """
        try:
            yield
        except httpx.HTTPStatusError as error:
            status, body = error.response.status_code, error.response.text[:200]
            raise CarrierError(
                f"Flower's server at {self.address} refuses: {status} {body!r}"
            ) from None
        except httpx.HTTPError as error:
            raise CarrierError(
                f"Flower's server at {self.address} does not answer: "
                f"{str(error) or type(error).__name__}"
            ) from None
        except (ObjectPullError, ObjectPushError, ValueError) as error:
            raise CarrierError(
                f"Flower's server at {self.address} lost a message: {error}"
            ) from None


class Heartbeat:
    """Keeps a task alive at its server, in a thread, while the block runs."""

    def __init__(self, server: FlowerServer, token: str) -> None:
        self._client = server.make_client(RuntimeHttpClient, token=token, patience=0.0)
        self._server, self._stop = server, threading.Event()
        self._thread = threading.Thread(
            target=self._send_heartbeats, name="flower-pulse", daemon=True
        )
        self._lost = threading.Event()

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()

    def check(self) -> None:
        """See that the task is still ours.

        Raises:
            CarrierError: it is not.
        """
        if self._lost.is_set():
            raise CarrierError(
                f"Flower's server at {self._server.address} has given this task up: start it anew"
            )

    def _send_heartbeats(self) -> None:
        wait_seconds = 0.0
        while not self._stop.wait(wait_seconds):
            try:
                alive = self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
            except httpx.TransportError:
                wait_seconds = RETRY_SECONDS
                continue
            except httpx.HTTPStatusError as error:
                alive = not _is_final(error)
            if not alive:
                self._lost.set()
                return
            wait_seconds = HEARTBEAT_SECONDS
