"""What a run at sites was begun with: it goes on with nothing else, and says what is other now."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedgen_edge import __version__
from fedgen_edge.config import Settings, iter_settings, load_saved, read_table
from fedgen_edge.deploy.server.cohort import count_target_updates
from fedgen_edge.deploy.settings import LOCAL_SETTINGS
from fedgen_edge.errors import CheckpointError
from fedgen_edge.network.messages import Terms

MAX_NAMED = 5
"""Settings that a line names."""


def set_client_count(settings: Settings, sites: int) -> Settings:
    """The settings of a run that begins with so many sites."""
    plan = settings.federation
    cohort = count_target_updates(plan, sites)
    return replace(settings, federation=replace(plan, clients=sites, cohort=cohort, fraction=None))


def check_resumable(
    run: Path, run_facts: Mapping[str, Any], terms: Terms, settings: Settings
) -> None:
    """Refuse to go on with a run that was begun with other settings or another backbone.

    A version of fedgen-edge that has more settings than the one before has another recipe too, even
    where their defaults are what that one did: a run is of one version.

    Args:
        run: the run's folder.
        run_facts: its run.json.
        terms: what the server agrees on with sites now.
        settings: resolved, as they are now.

    Raises:
        CheckpointError: in one line, what differs, and the way out.
    """
    remedy = f"or move {run} away to begin another run"
    backbone_digest = run_facts["backbone"]["sha256"]
    if backbone_digest != terms.backbone:
        raise CheckpointError(
            f"{run} was begun with another backbone, of SHA-256 {backbone_digest[:16]}... and not "
            f"{terms.backbone[:16]}...: restore the weights at backbone.path, {remedy}"
        )
    if run_facts["recipe"] != terms.recipe:
        raise CheckpointError(
            f"{run} was begun {_describe_recipe_change(run, run_facts, settings)}, {remedy}"
        )
    if run_facts.get("drawn", terms.drawn) != terms.drawn:
        raise CheckpointError(
            f"{run} was begun with leaves that are drawn otherwise here, by fedgen-edge "
            f"{run_facts.get('version')} and torch {run_facts.get('torch')}, where these are "
            f"{terms.versions}: install those, or restore adapter.initial, {remedy}"
        )


def _describe_recipe_change(run: Path, run_facts: Mapping[str, Any], settings: Settings) -> str:
    """How the recipe is another, and what would mend it."""
    path = run / "settings.toml"
    before = load_saved(path)
    now = set_client_count(settings, before.federation.clients or 1)
    changed = [
        f"{name}={old!r} and not {new!r}"
        for (name, old), (_, new) in zip(iter_settings(before), iter_settings(now), strict=True)
        if name not in LOCAL_SETTINGS and old != new
    ]
    if changed:
        return f"with another recipe.toml, of {_format_some(changed)}: restore it"
    setting_names = {*_iter_setting_names(read_table(path))}
    added = [
        name
        for name, value in iter_settings(now)
        if value is not None and name not in setting_names
    ]
    examples = f" (such as {_format_some(added)})" if added else ""
    return (
        f"by fedgen-edge {run_facts.get('version')}, whose settings{examples} are not "
        "those of this one, "
        f"{__version__}: go on with that version"
    )


def _iter_setting_names(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every setting that a file says, with its dotted name."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _iter_setting_names(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _format_some(items: list[str]) -> str:
    remainder = f", and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + remainder
