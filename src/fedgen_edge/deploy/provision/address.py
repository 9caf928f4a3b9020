"""The address at which sites reach the server: host and port, for sites and for the proxy."""

import ipaddress
import re
from dataclasses import dataclass

from fedgen_edge.errors import ConfigError

ADDRESS = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>[0-9]{1,5})"
)
LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
"""One label of a host name."""


@dataclass(frozen=True)
class ProxyAddress:
    """The address at which sites reach the proxy."""

    host: str
    """A name, or an IP address without brackets."""
    port: int

    @property
    def listen(self) -> str:
        """The address nginx listens on: only this machine's, if the host is a loopback address."""
        ip = parse_ip("127.0.0.1" if self.host == "localhost" else self.host)
        if ip is None or (ip.version == 4 and not ip.is_loopback):
            return f"{self.port} ssl"
        if ip.version == 4:
            return f"{ip}:{self.port} ssl"
        return f"[{ip if ip.is_loopback else '::'}]:{self.port} ssl ipv6only=off"


def parse_address(address: str) -> ProxyAddress:
    """Parse the host and port of an address.

    Raises:
        ConfigError: sites could not reach such an address.
    """
    match = ADDRESS.fullmatch(address)
    host = match["six"] or match["host"] if match else ""
    ip = parse_ip(host)
    labels = host.removesuffix(".").split(".")
    is_host_name = (
        len(host) < 254 and all(map(LABEL.fullmatch, labels)) and not labels[-1].isdecimal()
    )
    is_valid = (ip.version == 6) is bool(match["six"]) if ip and match else is_host_name
    if not match or not is_valid or not 1 <= int(match["port"]) <= 65535:
        raise ConfigError(
            f"address={address!r} must be HOST:PORT as sites reach it, such as "
            "fed.example.org:8443, 192.0.2.7:8443 or [2001:db8::7]:8443"
        )
    if ip and (ip.is_unspecified or ip.is_multicast):
        raise ConfigError(
            f"address={address!r} is no machine's: give the name or IP address by which sites "
            "reach the server"
        )
    return ProxyAddress(host, int(match["port"]))


def parse_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse a host as an IP address; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
