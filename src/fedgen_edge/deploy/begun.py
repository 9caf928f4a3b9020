"""What a run at sites was begun with: it goes on with nothing else, and says what is other now."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedgen_edge import __version__
from fedgen_edge.config import Settings, flat, load, read_table
from fedgen_edge.deploy.cohort import wanted
from fedgen_edge.deploy.settings import OWN
from fedgen_edge.engines.exchange import Terms
from fedgen_edge.errors import CheckpointError

SHOWN = 5
"""Settings that a line names."""


def of_sites(settings: Settings, sites: int) -> Settings:
    """The settings of a run that begins with so many sites."""
    plan = settings.federation
    cohort = wanted(plan, sites)
    return replace(settings, federation=replace(plan, clients=sites, cohort=cohort, fraction=None))


def check(run: Path, told: Mapping[str, Any], terms: Terms, settings: Settings) -> None:
    """Refuse to go on with a run that was begun with other settings or another backbone.

    A version of fedgen-edge that has more settings than the one before has another recipe too, even
    where their defaults are what that one did: a run is of one version.

    Args:
        run: the run's folder.
        told: its run.json.
        terms: what the server agrees on with sites now.
        settings: resolved, as they are now.

    Raises:
        CheckpointError: in one line, what differs, and the way out.
    """
    way = f"or move {run} away to begin another run"
    weights = told["backbone"]["sha256"]
    if weights != terms.backbone:
        raise CheckpointError(
            f"{run} was begun with another backbone, of SHA-256 {weights[:16]}... and not "
            f"{terms.backbone[:16]}...: restore the weights at backbone.path, {way}"
        )
    if told["recipe"] != terms.recipe:
        raise CheckpointError(f"{run} was begun {_otherwise(run, told, settings)}, {way}")
    if told.get("drawn", terms.drawn) != terms.drawn:
        raise CheckpointError(
            f"{run} was begun with leaves that are drawn otherwise here, by fedgen-edge "
            f"{told.get('version')} and torch {told.get('torch')}, where these are "
            f"{terms.versions}: install those, or restore adapter.initial, {way}"
        )


def _otherwise(run: Path, told: Mapping[str, Any], settings: Settings) -> str:
    """How the recipe is another, and what would mend it."""
    path = run / "settings.toml"
    before = load(path)
    now = of_sites(settings, before.federation.clients or 1)
    changed = [
        f"{name}={old!r} and not {new!r}"
        for (name, old), (_, new) in zip(flat(before), flat(now), strict=True)
        if name not in OWN and old != new
    ]
    if changed:
        return f"with another recipe.toml, of {_some(changed)}: restore it"
    known = {*_names(read_table(path))}
    added = [name for name, value in flat(now) if value is not None and name not in known]
    more = f" (such as {_some(added)})" if added else ""
    return (
        f"by fedgen-edge {told.get('version')}, whose settings{more} are not those of this one, "
        f"{__version__}: go on with that version"
    )


def _names(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every setting that a file says, with its dotted name."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _some(told: list[str]) -> str:
    more = f", and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return ", ".join(told[:SHOWN]) + more
