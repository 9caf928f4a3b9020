"""Make the keys and certificates of one federation: its authority's, the server's, the sites'.

Nothing here is printed or written; `kits` writes it where only the owner can read it.
"""

import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from fedgen_edge.errors import MissingExtraError

try:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise MissingExtraError("a federation on many machines", "flower") from None

VALIDITY = timedelta(days=5 * 365)
"""Of certificates. The server's is stored with the authority's key, so it need not end earlier."""
SKEW = timedelta(days=1)
"""How far a site's clock may be behind."""


@dataclass(frozen=True)
class KeyPair:
    """A private key and its public part."""

    private: bytes = field(repr=False)
    """PEM (PKCS 8), or OpenSSH's format for a site's key."""
    public: bytes
    """A certificate in PEM, or an OpenSSH line for a site's key."""


def make_authority(now: datetime) -> KeyPair:
    """Make a certificate authority that may sign servers, but no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedgen-edge federation")])
    builder = (
        _start_certificate(name, name, key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_make_key_usage(signs_certificates=True), critical=True)
    )
    return _sign_certificate(builder, key, key)


def make_server_certificate(ca: KeyPair, hosts: Sequence[str], now: datetime) -> KeyPair:
    """Make a server certificate that is valid only for these names and IP addresses."""
    key, signer = ec.generate_private_key(ec.SECP256R1()), load_pem_private_key(ca.private, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(ca.public)
    # a common name has at most 64 letters; clients check the alternative names
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedgen-edge server")])
    builder = (
        _start_certificate(name, issuer.subject, key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_make_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([_make_alternative_name(h) for h in hosts]), critical=False
        )
    )
    return _sign_certificate(builder, key, signer)


def make_site_key() -> KeyPair:
    """Make a site's key, which identifies it to the server: ECDSA on P-384, as Flower requires."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return KeyPair(private, public + b"\n")


def make_secret() -> bytes:
    """Make 256 random bits, as text: Flower uses the file's bytes unchanged."""
    return secrets.token_hex(32).encode()


def _start_certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - SKEW,
        not_valid_after=now + VALIDITY,
    ).add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _sign_certificate(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> KeyPair:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(private, builder.sign(signer, SHA384()).public_bytes(Encoding.PEM))


def _make_key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _make_alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
