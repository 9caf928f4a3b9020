"""What a deployment's folders say: the server's `federation.toml`, and a kit's `site.toml`.

Both stand beside `recipe.toml`, the settings of a run, which every site has the same copy of.
"""

import hashlib
import json
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedgen_edge.config import (
    RENAMED_SETTINGS,
    STRICT,
    Count,
    Number,
    Positive,
    Settings,
    describe_unknown,
    explain_error,
    from_table,
    iter_settings,
    load,
    read_table,
    to_table,
)
from fedgen_edge.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
"""Of a site: it names folders, keys and clients."""
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]-]+:[0-9]{1,5}$")]
"""Host and port."""
Port = Annotated[int, Number, Field(ge=0, le=65535)]
"""0 is any that is free."""
LOCAL_SETTINGS = frozenset(
    ("data.path", "backbone.path", "backbone.autoencoder", "adapter.initial",
     "image_metrics.weights", "engine.name", "engine.stack", "engine.device", "engine.threads",
     "engine.compile", "engine.address", "engine.workers", "engine.aggregate_on_workers")
)  # fmt: skip
"""Settings that each machine has for itself; all others are shared, and pinned by their digest."""


@dataclass(frozen=True, config=STRICT)
class DeploymentSettings:
    """`federation.toml`: how the server runs the rounds of its recipe."""

    address: Address
    """Where sites reach the proxy."""
    port: Port = 18443
    """Of Flower's SuperLink, on this machine alone; the proxy stands before it."""
    proxy: Literal["nginx", "none"] = "nginx"
    """nginx: `fedgen server` starts it; none: it is run by other means (proxy/ has its settings).
    """
    over_selection: Annotated[float, Number, Field(ge=1)] = 1.3
    """Sites asked in a round, over those whose updates are wanted."""
    quorum: Annotated[float, Number, Field(gt=0, le=1)] = 0.5
    """Share of the wanted updates without which a round is abandoned, and tried again."""
    deadline: Positive = 600.0
    """Seconds that a round waits for its updates."""
    attempts: Count = 6
    """Times that a round is tried before the server stops; `fedgen resume` goes on."""
    gather: Positive = 60.0
    """Seconds that the first round waits for the sites that it wants, and a later one for its
    quorum."""
    back_off: Positive = 5.0
    """Seconds before a second attempt; doubled for each further one, up to ten minutes."""
    offences: Count = 3
    """Refused messages after which a site is left out for the rest of the run."""
    largest_weight: Count = 10_000_000
    """Most training examples that a site may have."""
    spectrum: Positive | None = None
    """Largest singular value that a site's change of a layer's product may have as it arrives,
    where random-k has multiplied the values that it keeps by 1 / density; none is any."""
    gradient: Positive | None = None
    """Norm of the mean step of a site's change over the learning rate, at most, where the recipe is
    of SGD and does not clip; none is any."""


@dataclass(frozen=True, config=STRICT)
class SiteSettings:
    """`site.toml`: who this site is, where the server is, and what is its own."""

    name: Name
    """As the server knows it."""
    server: Address
    """Of the server's proxy."""
    own: dict[str, str | int] = field(default_factory=dict)
    """Settings of the recipe that are this site's own, such as `"data.path"`."""
    port: Port = 0
    """Of Flower's SuperNode, on this machine alone."""


SettingsT = TypeVar("SettingsT", DeploymentSettings, SiteSettings)


def read(kind: type[SettingsT], path: Path) -> SettingsT:
    """The settings in a file.

    Raises:
        ConfigError: it is missing, or says something that cannot be.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing: `fedgen deploy init` makes such a folder")
    try:
        return TypeAdapter(kind).validate_python(read_table(path))
    except ValidationError as error:
        first = error.errors()[0]
        message = explain_error(first["loc"], first["type"], first["msg"], first["input"])
        raise ConfigError(f"{path}: {message}") from None


def encode_toml(settings: DeploymentSettings | SiteSettings) -> bytes:
    """The settings as a file's content."""
    return tomli_w.dumps(to_table(settings)).encode()


def load_site_settings(folder: Path, site: SiteSettings) -> Settings:
    """What a site runs: the recipe, with what is the site's own in its place.

    Raises:
        ConfigError: the site's file changes what all must share.
    """
    table = to_table(load(folder / "recipe.toml"))
    for name, value in site.own.items():
        if name in RENAMED_SETTINGS:
            raise ConfigError(f"{folder / 'site.toml'}: own: {describe_unknown(name)}")
        if name not in LOCAL_SETTINGS:
            raise ConfigError(
                f"{folder / 'site.toml'}: own.{name} is the same at all sites, by recipe.toml: "
                f"a site's own are {', '.join(sorted(LOCAL_SETTINGS))}"
            )
        part, _, key = name.partition(".")
        table[part][key] = value
    return from_table(table)


def hash_settings(settings: Settings) -> str:
    """SHA-256 of the settings that all machines of a deployment share."""
    shared = {
        name: str(value) for name, value in iter_settings(settings) if name not in LOCAL_SETTINGS
    }
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()
