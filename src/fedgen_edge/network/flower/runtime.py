"""Flower's two servers as we run them, and our processes at their sides.

Both run in isolation: they start no process and run no code that arrives. The work is done by
processes of ours, `hub` beside the SuperLink and `serve` beside each SuperNode, which take tasks by
a secret that each shares with its neighbour.
"""

import sys
from pathlib import Path

from fedgen_edge.network.flower.environment import environment
from fedgen_edge.network.flower.server import Hub, hub
from fedgen_edge.network.flower.site import serve

__all__ = ["Hub", "environment", "hub", "serve", "superlink", "supernode"]


def superlink(port: int, tls: tuple[Path, Path, Path], database: Path, secret: Path) -> list[str]:
    """The command that runs Flower's server, for this machine alone.

    Args:
        port: where it listens, at 127.0.0.1.
        tls: files of the CA's certificate, the server's own and its key; the server's must be for
            127.0.0.1 too.
        database: the file that it keeps its state in, by which it can be killed and go on.
        secret: a file of random bytes; who has them may carry on its runs.
    """
    ca, certificate, key = tls
    return [
        _program("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(ca)),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
        "--enable-supernode-auth",
        *("--database", str(database)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        "--disable-runtime-dependency-installation",
    ]


def supernode(address: str, ca: Path, key: Path, port: int, secret: Path) -> list[str]:
    """The command that runs Flower's client, at a site.

    Args:
        address: host and port of the server, or of the proxy before it.
        ca: certificates that the server's must descend from.
        key: the site's private key, as OpenSSH writes it.
        port: where the site's own process finds it, at 127.0.0.1.
        secret: a file of random bytes; who has them may answer for the site.
    """
    return [
        _program("flower-supernode"),
        *("--superlink", address, "--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
    ]


def _program(name: str) -> str:
    """Flower's program beside this interpreter, whose folder a service has not in its PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name
