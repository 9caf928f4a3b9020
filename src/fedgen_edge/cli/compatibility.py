"""Compute which method works with which feature, using the checks that refuse settings."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from fedgen_edge.algorithms.methods import METHODS, check
from fedgen_edge.config import Compression, Devices, Settings
from fedgen_edge.deploy.provision.kits import check_deployable
from fedgen_edge.errors import ConfigError


class Feature(NamedTuple):
    """A feature that settings can enable in addition to a method."""

    about: str
    enable: Callable[[Settings], Settings]
    """Returns the settings with the feature enabled."""
    validate: Callable[[Settings], None] = check
    """Checks the settings."""


def _check_sites(settings: Settings) -> None:
    check_deployable(replace(settings, federation=replace(settings.federation, clients=2)), 2)


FEATURES: dict[str, Feature] = {
    "top-k": Feature(
        "uplink.sparsify: top-k or random-k, with uplink.feedback",
        lambda s: replace(s, uplink=Compression(sparsify="top-k", feedback=True)),
    ),
    "bits": Feature(
        "uplink.dtype: fp16, bf16, int8 or int4",
        lambda s: replace(s, uplink=Compression(dtype="int8")),
    ),
    "thin": Feature("uplink.low_rank", lambda s: replace(s, uplink=Compression(low_rank=1))),
    "down": Feature(
        "downlink.dtype: fp16, bf16, int8 or int4",
        lambda s: replace(s, downlink=Compression(dtype="int8")),
    ),
    "down top-k": Feature(
        "downlink.sparsify: top-k", lambda s: replace(s, downlink=Compression(sparsify="top-k"))
    ),
    "ranks": Feature(
        "adapter.ranks: clients of unequal rank",
        lambda s: replace(s, adapter=replace(s.adapter, ranks=(4, 8))),
    ),
    "stacked": Feature(
        "engine.name: stacked, many clients in one pass",
        lambda s: replace(s, engine=replace(s.engine, name="stacked")),
    ),
    "devices": Feature(
        "devices: a virtual clock",
        lambda s: replace(s, devices=Devices(steps_per_second=(1.0,))),
    ),
    "mixing": Feature(
        "personal.mixing: the tuned adapter and the global one mixed",
        lambda s: replace(s, personal=replace(s.personal, mixing=(0.5, 1.0))),
    ),
    "sites": Feature("fedgen server and client: many machines", lambda s: s, _check_sites),
}
"""Features by the heading of a column."""


def find_settings(name: str) -> Settings:
    """Return settings with which a method works, the defaults if possible.

    Raises:
        ConfigError: there are none; the method's requirements and this table disagree.
    """
    defaults = Settings()
    with_method = replace(defaults, method=replace(defaults.method, name=name))
    sgd = replace(defaults.training, optimizer="sgd", clip=0.0)
    two_epochs = replace(defaults.training, epochs=2)
    for training in (defaults.training, sgd, two_epochs):
        try:
            check(candidate := replace(with_method, training=training))
        except ConfigError:
            continue
        return candidate
    raise ConfigError(f"method.name={name!r} works with none of the settings that were tried")


def find_objection(name: str, feature: str) -> str | None:
    """Say why a method does not work with a feature, and what would; None if it does."""
    requested = FEATURES[feature]
    try:
        requested.validate(requested.enable(find_settings(name)))
    except ConfigError as error:
        return str(error)
    return None


def make_row(name: str) -> dict[str, str | None]:
    """Return a method's objections by feature, including features that no setting enables yet."""
    entry = METHODS[name]
    objections = {feature: find_objection(name, feature) for feature in FEATURES}
    algorithm = entry.make(Settings().method)
    sums_objection = None
    if not entry.properties.sums:
        sums_objection = "the server looks at each client's update by itself"
    freezes_backbone = algorithm.adapts == "lora"
    return {
        **objections,
        "secure sums": sums_objection,
        "4-bit": None if freezes_backbone else "it trains the backbone's own weights",
    }


PLANNED = {
    "secure sums": "secure summation, which is not built yet: the server needs sums alone",
    "4-bit": "a quantised backbone, which is not built yet: the backbone stays frozen",
}
"""Columns of features that no setting enables yet."""


def format_mark(feature: str, objection: str | None) -> str:
    """Format the table's entry for a method and a feature."""
    if feature in PLANNED:
        return "-"
    return "no" if objection else "yes"


def make_legend() -> dict[str, str]:
    """Return the meaning of each column."""
    return {**{name: feature.about for name, feature in FEATURES.items()}, **PLANNED}


def make_rows() -> dict[str, dict[str, str | None]]:
    """Return every method's row."""
    return {name: make_row(name) for name in METHODS}
