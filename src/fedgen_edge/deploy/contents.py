"""What each file of a deployment says; nothing is written here."""

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
from fedgen_edge.deploy import keys
from fedgen_edge.deploy.address import reached
from fedgen_edge.deploy.settings import Federation, Site, told
from fedgen_edge.deploy.software import PYTHONS, pack_software, torch_version

PATHLESS = frozenset(("docstrings", "digits", "hub"))
"""Sources whose data do not lie in a place of the site's own."""


def server(
    settings: Settings, names: Sequence[str], federation: Federation, folder: Path
) -> dict[str, bytes]:
    """Every file of the server's folder, by its path in it."""
    place, now = reached(federation.address), datetime.now(UTC)
    ca = keys.authority(now)
    hosts = list(dict.fromkeys((place.host, "localhost", "127.0.0.1")))
    tls = keys.certificate(ca, hosts, now)
    software = pack_software()
    kits = {name: kit(name, federation.address, settings, ca.public, software) for name in names}
    backbone = settings.backbone.path
    about = _about(settings, federation.address, software) | {
        "names": names,
        "user": _account(),
        "owner": os.getuid(),
        "uid": os.getuid() or "${FEDGEN_USER:?see the first lines of compose.yaml}",
        "gid": os.getgid() if os.getuid() else "${FEDGEN_GROUP:?see the first lines}",
        "hidden": [f"-{folder}/{path}" for path in ("ca/ca.key", "secret", "kits")],
        "folder": str(folder),
        "shell": shlex.quote(str(folder)),
        "fedgen": str(Path(sys.executable).with_name("fedgen")),
        "listen": place.listen,
        "port": federation.port,
        "public": place.port,
        "low": place.port < 1024,
        "mounted": backbone if Path(backbone).is_absolute() else None,
    }
    made = {
        "proxy/nginx.conf": "nginx.conf",
        "systemd/fedgen-server.service": "fedgen-server.service",
        "systemd/fedgen-proxy.service": "fedgen-proxy.service",
        "compose.yaml": "compose.yaml",
        "software/Dockerfile": "Dockerfile",
        "README.md": "README.md",
    }
    return {
        "federation.toml": told(federation),
        "recipe.toml": to_toml(settings).encode(),
        "ca/ca.crt": ca.public,
        "ca/ca.key": ca.private,
        "tls/server.crt": tls.public,
        "tls/server.key": tls.private,
        "secret": keys.secret(),
        **{path: _rendered(template, about) for path, template in made.items()},
        **{f"software/{name}": content for name, content in software.items()},
        **{f"sites/{name}.pub": own["key.pub"] for name, own in kits.items()},
        **{f"kits/{n}/{path}": content for n, own in kits.items() for path, content in own.items()},
    }


def kit(
    name: str, address: str, settings: Settings, ca: bytes, software: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Every file of a site's kit, by its path in it; with a key that is made here."""
    key, about = keys.site(), _about(settings, address, software) | {"name": name}
    return {
        "site.toml": told(Site(name=name, server=address)),
        "recipe.toml": to_toml(settings).encode(),
        "ca.crt": ca,
        "key": key.private,
        "key.pub": key.public,
        "secret": keys.secret(),
        "fedgen-client.service": _rendered("fedgen-client.service", about),
        "README.md": _rendered("kit.md", about),
        **{f"software/{name}": content for name, content in software.items()},
    }


def _about(settings: Settings, address: str, software: Mapping[str, bytes]) -> dict[str, Any]:
    """What the pages of the server and of a site both speak of."""
    return {
        "address": address,
        "version": __version__,
        "wheel": next(name for name in software if name.endswith(".whl")),
        "torch": torch_version(),
        "pythons": f"{PYTHONS[0]} to {PYTHONS[-1]}",
        "source": settings.data.source,
        "own_data": settings.data.source not in PATHLESS,
        "backbone": settings.backbone.path,
    }


def _rendered(template: str, about: Mapping[str, Any]) -> bytes:
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    engine.filters |= {"quoted": _quoted, "escaped": _escaped, "yaml": _yaml}
    return engine.get_template(f"{template}.jinja").render(about).encode()


def _escaped(path: str) -> str:
    """A path in a unit of systemd's, where % begins a specifier."""
    return path.replace("%", "%%")


def _quoted(path: str) -> str:
    """The same as one word of a line of words."""
    letters = {"\\": r"\\", '"': r"\"", "$": "$$"}
    return f'"{"".join(letters.get(letter, letter) for letter in _escaped(path))}"'


def _yaml(text: str) -> str:
    """A string of compose's, where $ begins a variable."""
    return json.dumps(text.replace("$", "$$"))


def _account() -> str:
    """Who runs this, as a service's user; root makes services, and runs none."""
    if os.getuid() == 0:
        return "fedgen"
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
