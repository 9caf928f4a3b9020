"""Keys and certificates: judged by OpenSSL, Python's ssl, OpenSSH and Flower itself."""

import argparse
import importlib
import shutil
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from fedgen_edge.deploy.provision import keys
from fedgen_edge.errors import MissingExtraError

NOW = datetime.now(UTC)
HOSTS = ["fed.example.org", "192.0.2.7", "2001:db8::7", "localhost", "127.0.0.1"]
CA = keys.make_authority(NOW)
SERVER = keys.make_server_certificate(CA, HOSTS, NOW)


def shake(server: keys.KeyPair, trusted: bytes, host: str, folder: Path) -> None:
    """A whole TLS handshake in memory, the client as strict as Python can be.

    Raises:
        SSLCertVerificationError: the client does not believe the server.
    """
    (folder / "crt").write_bytes(server.public)
    (folder / "key").write_bytes(server.private)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "crt", folder / "key")
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    asking.load_verify_locations(cadata=trusted.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(down, up, server_hostname=host)
    other = serving.wrap_bio(up, down, server_side=True)
    waiting = [client, other]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert waiting == []


@pytest.mark.parametrize("host", HOSTS)
def test_a_client_that_trusts_the_authority_believes_the_server(host: str, tmp_path: Path) -> None:
    shake(SERVER, CA.public, host, tmp_path)


def test_openssl_believes_it_too_at_its_strictest(tmp_path: Path) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl is not installed")
    (tmp_path / "ca.crt").write_bytes(CA.public)
    (tmp_path / "server.crt").write_bytes(SERVER.public)
    told = [openssl, "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.crt"]
    for how in (["-verify_hostname", HOSTS[0]], ["-verify_ip", HOSTS[1]], ["-verify_ip", HOSTS[2]]):
        done = subprocess.run(
            [*told, *how, "server.crt"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "server.crt: OK\n", "")


YEARS = timedelta(days=6 * 365)
UNBELIEVED = {
    "another authority's": (
        keys.make_server_certificate(keys.make_authority(NOW), HOSTS, NOW),
        HOSTS[0],
    ),
    "one that has expired": (keys.make_server_certificate(CA, HOSTS, NOW - YEARS), HOSTS[0]),
    "one that is not valid yet": (keys.make_server_certificate(CA, HOSTS, NOW + YEARS), HOSTS[0]),
    "one for another name": (SERVER, "fed.example.com"),
    "one for another address": (SERVER, "192.0.2.8"),
    "one that a server's key signed": (keys.make_server_certificate(SERVER, HOSTS, NOW), HOSTS[0]),
}


@pytest.mark.parametrize(("server", "host"), UNBELIEVED.values(), ids=UNBELIEVED)
def test_no_client_believes_another_certificate(
    server: keys.KeyPair, host: str, tmp_path: Path
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, CA.public, host, tmp_path)


def test_a_client_whose_clock_is_half_a_day_behind_believes_the_server(tmp_path: Path) -> None:
    later = NOW + timedelta(hours=12)
    ca = keys.make_authority(later)
    shake(keys.make_server_certificate(ca, HOSTS, later), ca.public, HOSTS[0], tmp_path)


def test_a_sites_key_is_one_that_flower_and_openssh_read(tmp_path: Path) -> None:
    pair, path = keys.make_site_key(), tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(pair.private)
    given = argparse.Namespace(auth_supernode_private_key=str(path), auth_supernode_public_key=None)
    read = _try_setup_client_authentication(given)
    assert read is not None
    assert read[0].curve.name == "secp384r1"
    if not (keygen := shutil.which("ssh-keygen")):
        pytest.skip("ssh-keygen is not installed")
    said = subprocess.run([keygen, "-y", "-f", path], capture_output=True, check=True).stdout
    assert said.split()[:2] == pair.public.split()


def test_a_secret_is_what_flower_takes_and_never_the_same(tmp_path: Path) -> None:
    path, own = tmp_path / "secret", keys.make_secret()
    path.write_bytes(own)
    assert load_superexec_auth_secret(str(path)) == own
    assert len(bytes.fromhex(own.decode())) == 32
    assert len({keys.make_secret() for _ in range(100)}) == 100


def test_a_pair_does_not_print_its_private_half() -> None:
    assert "PRIVATE" in CA.private.decode()
    assert "PRIVATE" not in repr(CA)


def test_where_the_library_is_missing_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "fedgen_edge.deploy.provision.keys")
    with pytest.raises(MissingExtraError, match=r'pip install "cryptography[<>=,0-9]+" "flwr=='):
        importlib.import_module("fedgen_edge.deploy.provision.keys")
