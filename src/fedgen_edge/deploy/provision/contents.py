"""Make the content of each file of a deployment, without writing any."""

import json
import os
import pwd
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedgen_edge import __version__
from fedgen_edge.config import Settings, to_toml
from fedgen_edge.deploy.provision import keys
from fedgen_edge.deploy.provision.address import parse_address
from fedgen_edge.deploy.provision.software import PYTHONS, pack_software, torch_version
from fedgen_edge.deploy.settings import DeploymentSettings, SiteSettings, encode_toml

SOURCES_WITHOUT_PATH = frozenset(("docstrings", "digits", "hub"))
"""Sources whose data are not at a path of the site."""


def make_server_files(
    settings: Settings, names: Sequence[str], federation: DeploymentSettings, folder: Path
) -> dict[str, bytes]:
    """Make every file of the server's folder, by its path in it."""
    proxy_address, now = parse_address(federation.address), datetime.now(UTC)
    ca = keys.make_authority(now)
    hosts = list(dict.fromkeys((proxy_address.host, "localhost", "127.0.0.1")))
    tls = keys.make_server_certificate(ca, hosts, now)
    software = pack_software()
    kits = {
        name: make_kit_files(name, federation.address, settings, ca.public, software)
        for name in names
    }
    backbone = settings.backbone.path
    template_values = _make_template_values(settings, federation.address, software) | {
        "names": names,
        "user": _get_account(),
        "owner": os.getuid(),
        "uid": os.getuid() or "${FEDGEN_USER:?see the first lines of compose.yaml}",
        "gid": os.getgid() if os.getuid() else "${FEDGEN_GROUP:?see the first lines}",
        "hidden": [f"-{folder}/{path}" for path in ("ca/ca.key", "secret", "kits")],
        "folder": str(folder),
        "shell": shlex.quote(str(folder)),
        "fedgen": str(Path(sys.executable).with_name("fedgen")),
        "listen": proxy_address.listen,
        "port": federation.port,
        "public": proxy_address.port,
        "low": proxy_address.port < 1024,
        "mounted": backbone if Path(backbone).is_absolute() else None,
    }
    templates = {
        "proxy/nginx.conf": "nginx.conf",
        "systemd/fedgen-server.service": "fedgen-server.service",
        "systemd/fedgen-proxy.service": "fedgen-proxy.service",
        "compose.yaml": "compose.yaml",
        "software/Dockerfile": "Dockerfile",
        "README.md": "README.md",
    }
    return {
        "federation.toml": encode_toml(federation),
        "recipe.toml": to_toml(settings).encode(),
        "ca/ca.crt": ca.public,
        "ca/ca.key": ca.private,
        "tls/server.crt": tls.public,
        "tls/server.key": tls.private,
        "secret": keys.make_secret(),
        **{
            path: _render_template(template, template_values)
            for path, template in templates.items()
        },
        **{f"software/{name}": content for name, content in software.items()},
        **{f"sites/{name}.pub": own["key.pub"] for name, own in kits.items()},
        **{f"kits/{n}/{path}": content for n, own in kits.items() for path, content in own.items()},
    }


def make_kit_files(
    name: str, address: str, settings: Settings, ca: bytes, software: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Make every file of a site's kit, by its path in it, with a new key."""
    key, template_values = (
        keys.make_site_key(),
        _make_template_values(settings, address, software) | {"name": name},
    )
    return {
        "site.toml": encode_toml(SiteSettings(name=name, server=address)),
        "recipe.toml": to_toml(settings).encode(),
        "ca.crt": ca,
        "key": key.private,
        "key.pub": key.public,
        "secret": keys.make_secret(),
        "fedgen-client.service": _render_template("fedgen-client.service", template_values),
        "README.md": _render_template("kit.md", template_values),
        **{f"software/{name}": content for name, content in software.items()},
    }


def _make_template_values(
    settings: Settings, address: str, software: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return the values that the server's and the sites' templates share."""
    return {
        "address": address,
        "version": __version__,
        "wheel": next(name for name in software if name.endswith(".whl")),
        "torch": torch_version(),
        "pythons": f"{PYTHONS[0]} to {PYTHONS[-1]}",
        "source": settings.data.source,
        "own_data": settings.data.source not in SOURCES_WITHOUT_PATH,
        "backbone": settings.backbone.path,
    }


def _render_template(template: str, template_values: Mapping[str, Any]) -> bytes:
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    engine.filters |= {"quoted": _quote_word, "escaped": _escape_specifiers, "yaml": _quote_yaml}
    return engine.get_template(f"{template}.jinja").render(template_values).encode()


def _escape_specifiers(path: str) -> str:
    """Escape a path for a systemd unit, where % starts a specifier."""
    return path.replace("%", "%%")


def _quote_word(path: str) -> str:
    """Quote a path as one word of a command line in a systemd unit."""
    letters = {"\\": r"\\", '"': r"\"", "$": "$$"}
    return f'"{"".join(letters.get(letter, letter) for letter in _escape_specifiers(path))}"'


def _quote_yaml(text: str) -> str:
    """Quote a string for a compose file, where $ starts a variable."""
    return json.dumps(text.replace("$", "$$"))


def _get_account() -> str:
    """Return the user that the service runs as: the current one, but never root."""
    if os.getuid() == 0:
        return "fedgen"
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
