"""The proxy: a real nginx, started from a folder's settings before a server that tells what came.

Requests are written byte by byte, since libraries would tidy the paths that matter here.
"""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedgen_edge.config import from_table
from fedgen_edge.deploy.provision import keys, kits

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(
    not NGINX, reason="nginx is not installed (Debian: apt install nginx-light)"
)
WAIT = 30.0
"""Seconds, at most, for anything here."""
RECIPE = from_table({"backbone": {"path": "tiny"}, "data": {"source": "folder"}})


@dataclass
class Came:
    """What reached the server behind: a path, its headers and its body's length, each."""

    calls: list[tuple[str, dict[str, str], int]] = field(default_factory=list)


@dataclass(frozen=True)
class Door:
    """A running proxy, and what came through it."""

    folder: Path
    port: int
    came: Came

    def ask(self, request: bytes) -> tuple[int, str]:
        """Status and body of the answer to bytes that are sent as they are, over TLS."""
        trust = ssl.create_default_context(cafile=str(self.folder / "ca" / "ca.crt"))
        with socket.create_connection(("127.0.0.1", self.port), WAIT) as raw:
            raw.settimeout(WAIT)
            with trust.wrap_socket(raw, server_hostname="127.0.0.1") as secure:
                return answer(secure, request)


def answer(connection: socket.socket, request: bytes) -> tuple[int, str]:
    """What comes back until the other side closes."""
    connection.sendall(request)
    said = b""
    while piece := connection.recv(65536):
        said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"nginx/" not in said
    return int(head.split()[1]), body.decode()


def request(path: str, method: str = "POST", body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def behind(came: Came) -> type[BaseHTTPRequestHandler]:
    """A server's handler that answers anything with its path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            headers = {name.lower(): value for name, value in self.headers.items()}
            came.calls.append((self.path, headers, length))
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.path)))
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(came: Came) -> Iterator[ThreadingHTTPServer]:
    """A server on a free port of the loopback; its certificate is given later."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), behind(came))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(WAIT)


def secured(server: ThreadingHTTPServer, pair: keys.KeyPair, folder: Path) -> None:
    """Have the server speak TLS with this certificate; nobody has called it yet."""
    folder.mkdir()
    (folder / "crt").write_bytes(pair.public)
    (folder / "key").write_bytes(pair.private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    # a handshake belongs to the thread of its own connection
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )


def own(folder: Path) -> keys.KeyPair:
    """The certificate that the folder's server has."""
    tls = folder / "tls"
    return keys.KeyPair((tls / "server.key").read_bytes(), (tls / "server.crt").read_bytes())


@contextmanager
def proxy(upstream: int, at: Path) -> Iterator[tuple[Path, int]]:
    """A folder whose nginx runs, and the port that it listens on.

    The port was free when it was chosen; if another process was quicker, another one is tried.
    """
    for attempt in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = at / f"fed{attempt}"
        kits.init(RECIPE, ["north"], f"127.0.0.1:{port}", folder, upstream)
        told = [str(NGINX), "-e", "stderr", "-p", str(folder / "proxy"), "-c", "nginx.conf"]
        with (at / f"nginx{attempt}.log").open("wb") as log:
            nginx = subprocess.Popen(told, stderr=log, stdout=log, start_new_session=True)
        try:
            if listens(nginx, port):
                yield folder, port
                return
        finally:
            ended(nginx)
    pytest.fail(f"nginx did not start: {(at / 'nginx4.log').read_text()}")


def listens(nginx: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it takes connections; not, where it ended instead."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end and nginx.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), WAIT).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return nginx.poll() is None
    return False


def ended(nginx: subprocess.Popen[bytes]) -> None:
    """Stop it, its workers with it."""
    nginx.terminate()
    try:
        nginx.wait(WAIT)
    except subprocess.TimeoutExpired:
        os.killpg(nginx.pid, signal.SIGKILL)
        nginx.wait(WAIT)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A proxy before a server that it believes."""
    at, came = tmp_path_factory.mktemp("proxy"), Came()
    with serving(came) as server, proxy(server.server_address[1], at) as (folder, port):
        secured(server, own(folder), at / "behind")
        yield Door(folder, port, came)


def test_nginx_takes_the_settings_without_a_word_of_warning(tmp_path: Path) -> None:
    for address in ("fed.example.org:8443", "127.0.0.1:8443"):
        folder = tmp_path / address.partition(":")[0]
        kits.init(RECIPE, ["north"], address, folder)
        done = subprocess.run(
            [str(NGINX), "-t", "-q", "-e", "stderr", "-p", folder / "proxy", "-c", "nginx.conf"],
            capture_output=True, text=True, timeout=WAIT, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_sites_calls_pass_as_they_are(door: Door) -> None:
    path = "/v1/fleet/pull-messages"
    assert door.ask(request(path, body=b"12345")) == (200, path)
    came, headers, length = door.came.calls[-1]
    assert (came, length) == (path, 5)
    assert headers["x-forwarded-for"] == "127.0.0.1"


def test_the_address_that_a_caller_claims_is_not_believed(door: Door) -> None:
    claim = b"X-Forwarded-For: 192.0.2.1\r\nConnection"
    door.ask(request("/v1/fleet/get-run").replace(b"Connection", claim, 1))
    assert door.came.calls[-1][1]["x-forwarded-for"] == "127.0.0.1"


def test_a_piece_of_five_mebibytes_passes_and_a_much_larger_one_does_not(door: Door) -> None:
    piece = b"x" * (5 * 2**20 + 4096)
    assert door.ask(request("/v1/fleet/push-object", body=piece))[0] == 200
    assert door.came.calls[-1][2] == len(piece)
    before = len(door.came.calls)
    # only announced: nginx answers before a byte of the body
    huge = request("/v1/fleet/push-object").replace(b"Length: 0", b"Length: 9000000")
    assert door.ask(huge)[0] == 413
    assert len(door.came.calls) == before


REFUSED = [
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleetx/pull-messages",
    "/V1/FLEET/pull-messages",
    "/v1/fleet/../runtime/acquire-task",
    "/v1/fleet/%2e%2e/runtime/acquire-task",
    "/v1/fleet/..%2fruntime/acquire-task",
    "/v1/fleet/..%2fruntime%2facquire-task",
    "/v1/fleet/..%5cruntime/acquire-task",
    "/v1/fleet/..;/runtime/acquire-task",
    "/v1/fleet/%252e%252e/runtime/acquire-task",
    "/v1/fleet/./pull-messages",
    "/v1/fleet//pull-messages",
    "//v1/fleet/pull-messages",
    "//v1/runtime/acquire-task",
    "/v1/./runtime/acquire-task",
    "/v1/runtime/acquire-task/../../fleet/pull-messages",
    "/v1/runtime/acquire-task#/../../fleet/pull-messages",
    "/v1/runtime/acquire-task?/v1/fleet/pull-messages",
    "/v1/runtime/acquire-task%3f/../../fleet/pull-messages",
    "/v1/runtime/acquire-task%00/v1/fleet/pull-messages",
    "/v1/fleet/pull-messages?x=/v1/runtime/acquire-task",
    "/v1/fleet/pull-messages#x",
    "/v1/fleet/pull-messages%0a",
    "/v1/%66leet/pull-messages",
    "/%76%31/runtime/acquire-task",
    "v1/fleet/pull-messages",
    "*",
    "https://elsewhere/v1/runtime/acquire-task",
]


@pytest.mark.parametrize("path", REFUSED)
def test_everything_else_is_refused_and_reaches_nothing(path: str, door: Door) -> None:
    before = len(door.came.calls)
    status, _ = door.ask(request(path))
    assert status in {400, 403}
    assert len(door.came.calls) == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(method: str, door: Door) -> None:
    before = len(door.came.calls)
    status, _ = door.ask(request("/v1/fleet/pull-messages", method))
    assert status in {400, 403, 405}
    assert len(door.came.calls) == before


SMUGGLED = "POST /v1/runtime/acquire-task HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 0\r\nContent-Length: {length}",
        "Transfer-Encoding: chunked\r\nContent-Length: {length}",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding : chunked",
        "Content-Length: {length}",
    ],
)
def test_a_call_hidden_in_another_does_not_come_through(head: str, door: Door) -> None:
    before = len(door.came.calls)
    told = head.format(length=len(SMUGGLED))
    call = f"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{told}\r\n\r\n"
    door.ask((call + ("0\r\n\r\n" if "chunked" in head else "") + SMUGGLED).encode())
    assert {path for path, *_ in door.came.calls[before:]} <= {"/v1/fleet/get-run"}


def test_who_is_refused_is_told_what_to_do_in_one_line(door: Door) -> None:
    status, said = door.ask(request("/"))
    assert (status, said.count("\n")) == (403, 1)
    assert "fedgen client KIT" in said
    assert "fedgen status FOLDER" in said


def test_who_speaks_no_tls_is_told_so_in_one_line(door: Door) -> None:
    with socket.create_connection(("127.0.0.1", door.port), WAIT) as plain:
        plain.settimeout(WAIT)
        status, said = answer(plain, request("/v1/fleet/pull-messages"))
    assert (status, said.count("\n")) == (400, 1)
    assert "https://" in said
    assert "ca.crt" in said


def test_old_tls_is_refused(door: Door) -> None:
    trust = ssl.create_default_context(cafile=str(door.folder / "ca" / "ca.crt"))
    trust.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        trust.minimum_version = trust.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", door.port), WAIT) as raw,
        pytest.raises(ssl.SSLError),
    ):
        trust.wrap_socket(raw, server_hostname="127.0.0.1")


def test_a_client_that_does_not_trust_the_authority_gives_up(door: Door) -> None:
    trust = ssl.create_default_context()
    with (
        socket.create_connection(("127.0.0.1", door.port), WAIT) as raw,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        trust.wrap_socket(raw, server_hostname="127.0.0.1")


def test_a_server_behind_with_another_certificate_is_not_believed(tmp_path: Path) -> None:
    came, now = Came(), datetime.now(UTC)
    other = keys.make_server_certificate(keys.make_authority(now), ["localhost", "127.0.0.1"], now)
    with serving(came) as server, proxy(server.server_address[1], tmp_path) as (folder, port):
        secured(server, other, tmp_path / "behind")
        status, said = Door(folder, port, came).ask(request("/v1/fleet/pull-messages"))
    assert (status, came.calls) == (502, [])
    assert "fedgen server FOLDER" in said


def test_a_server_that_is_down_is_told_with_a_status_after_which_flower_tries_again(
    tmp_path: Path,
) -> None:
    with serving(Came()) as server:
        gone = server.server_address[1]
    with proxy(gone, tmp_path) as (folder, port):
        status, said = Door(folder, port, Came()).ask(request("/v1/fleet/pull-messages"))
    assert status == 502
    assert said.count("\n") == 1
    assert "fedgen server FOLDER" in said
