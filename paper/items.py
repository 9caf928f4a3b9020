"""What a table or a figure rests on, as its file says: the runs to make, and their settings."""

import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedgen_edge.config import RENAMED_SETTINGS, ImageMetrics, Settings, from_table, to_table
from fedgen_edge.errors import ConfigError

ROOT = Path(__file__).parent.parent
ITEMS = Path(__file__).parent / "items"
SCALES = ("small", "full", "recipe")
"""What pages show; an item may have others, to try it out."""
LEAST = {"seeds": 3, "clients": 20, "rounds": 30}
"""At the first two of those scales; `recipe` is a recipe as it is, whatever its size."""
NEEDED = ("title", "recipe", "seeds", "reference", "measures", "variants")
KEYS = {
    "title": "of the figure",
    "recipe": "settings that all runs begin from",
    "seeds": "of the runs that are shown",
    "reference": "the variant that others are held against",
    "measures": "of the test, the first of which differences are of: word, pooled, mean, ...",
    "variants": "what is compared: settings of each, and its own trials",
    "of": "another item, whose keys and records this one shows in its own way",
    "repeats": "another item with the same variants, whose outcome is looked for again",
    "paths": "settings that are paths in the data folder",
    "unset": "settings of the recipe to leave out",
    "backbones": "what `fedgen pretrain` makes first, backbone.path=made:NAME: recipe, overrides, "
    "paths",
    "overrides": "settings of all runs",
    "divisions": "settings of the data's division, each of which all variants have",
    "tuning": "a seed, a division, the trials of each variant, and the tunings that are tried "
    "after them where clients tune",
    "jobs": "most runs at once, where more would need too much memory",
    "table": "a view of views.py",
    "figure": "a view of figures.py",
    "models": "the run's models that are shown, where variants are values of something",
    "axis": "what those are values of",
    "beside": "variants that are none of those values, to be shown beside them",
    "paper": "the value that the paper finds best",
    "rows": "the models that are shown, where variants are methods: see cells.Shown",
    "failures": "what is provoked: its variant, and the diagnosis' findings that are right for it",
    "differences": "pairs of rows, of which the second is subtracted from the first",
    "claims": "pairs of rows, of which the paper says that one is better, or what it saves",
}
"""What an item's file may say, and each [scale.NAME] over it."""
TRIAL = {"evaluation": {"test_blocks": 1}}
"""Trials are judged by validation alone."""
LISTS = ("trials", "tunings")
"""Of what is tried, in a variant or for all of them."""
SHARED = {"personal": {"epochs": 0}}
"""Most of them by the shared model's, so that nothing is tuned."""
MADE = "made:"
"""Begins the path of a backbone that is made first, by its name in the item's `backbones`."""
Row = dict[str, Any]


class Places(NamedTuple):
    """Folders of this machine."""

    data: Path
    made: Path
    """Of the backbones that are made."""


class Case(NamedTuple):
    """One run of a comparison."""

    division: str
    variant: str
    seed: int
    overrides: Row
    trial: Row | None = None
    """What it tries, where it is to choose a variant's settings."""
    chosen: Row | None = None
    """What its variant's trials chose."""

    def __str__(self) -> str:
        tried = f"trial {format_overrides(self.trial)}" if self.trial is not None else ""
        return ", ".join(filter(None, (self.division, self.variant, tried, f"seed {self.seed}")))


def list_items(folder: Path = ITEMS) -> list[str]:
    """Every item that there is."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def list_shown(folder: Path = ITEMS) -> Iterator[tuple[str, str]]:
    """Every item and scale that a page may show."""
    for name in list_items(folder):
        yield from (
            (name, scale) for scale in SCALES if scale in _read_tables(name, folder)["scale"]
        )


def read(name: str, scale: str, folder: Path = ITEMS) -> Row:
    """An item at one scale, whose own settings lie over the others.

    An item `of` another has that one's runs, and shows them in its own way.

    Raises:
        ConfigError: there is no such item or scale, or it says what cannot be.
    """
    tables = _read_tables(name, folder)
    scales = tables.pop("scale")
    if scale not in scales:
        there = ", ".join(scales) or "none"
        raise ConfigError(f"paper item {name!r} has no [scale.{scale}]: there are {there}")
    item = merge(tables, scales[scale])
    _check(name, scale, item)
    return {**item, "name": name, "scale": scale, "records": item.get("of", name)}


def _read_tables(name: str, folder: Path) -> Row:
    told = _parse(name, folder)
    other = _parse(told["of"], folder) if "of" in told else {}
    return merge({"scale": {}}, other, told)


def _parse(name: str, folder: Path) -> Row:
    path = folder / f"{name}.toml"
    if not path.exists():
        raise ConfigError(f"no paper item {name!r}: there are {', '.join(list_items(folder))}")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _check(name: str, scale: str, item: Row) -> None:
    where = f"paper item {name!r} at scale {scale!r}:"
    if unknown := sorted({*item} - {*KEYS}):
        raise ConfigError(f"{where} unknown key {unknown[0]!r}: {', '.join(KEYS)} are known")
    if missing := [key for key in NEEDED if key not in item]:
        raise ConfigError(f"{where} {missing[0]} is missing: say it in paper/items/{name}.toml")
    if item.get("jobs", 1) < 1:
        raise ConfigError(f"{where} jobs={item['jobs']} is below 1: give one or more")
    for told in (item["reference"], *(failure["variant"] for failure in item.get("failures", ()))):
        if told not in item["variants"]:
            raise ConfigError(f"{where} {told!r} is no variant: name one of them")
    _check_tuning(where, item)
    if scale in ("small", "full"):
        _check_least(where, item)


def _check_tuning(where: str, item: Row) -> None:
    """Refuse trials that give no equal chances, or use a seed of the claims."""
    tuning = item.get("tuning")
    if tuning is not None and "seed" not in tuning:
        raise ConfigError(f"{where} tuning.seed is missing: give one that is not in seeds")
    if tuning and tuning.get("division", "") not in {"", *item.get("divisions", {})}:
        raise ConfigError(f"{where} tuning.division={tuning['division']!r} is no division")
    if tuning and tuning["seed"] in item["seeds"]:
        raise ConfigError(
            f"{where} tuning.seed={tuning['seed']} is one of seeds={item['seeds']}: claims and "
            "choices need different ones"
        )
    numbers = {len(list_tried(item, variant)) for variant in item["variants"]} if tuning else {1}
    if 0 in numbers:
        raise ConfigError(f"{where} tuning.trials is missing, and some variant has none of its own")
    if len(numbers) > 1:
        raise ConfigError(f"{where} variants have unequal numbers of trials: give each as many")
    for variant, what in itertools.product(item["variants"], LISTS):
        if wrong := [
            one for one in list_tried(item, variant, what) if tunes(one) == (what == "trials")
        ]:
            raise ConfigError(
                f"{where} {what} of {variant!r} has {format_overrides(wrong[0])}: settings of "
                "personal alone are tunings, and all others trials"
            )


def _check_least(where: str, item: Row) -> None:
    """Refuse what is too small to be shown."""
    if len(item["seeds"]) < LEAST["seeds"]:
        raise ConfigError(
            f"{where} seeds={item['seeds']} are fewer than {LEAST['seeds']}: add some"
        )
    for case in cases(item, {}):
        federation = settings_of(item, case).federation
        for key in ("clients", "rounds"):
            if (getattr(federation, key) or 0) < LEAST[key]:
                raise ConfigError(
                    f"{where} federation.{key}={getattr(federation, key)} is below {LEAST[key]}, "
                    "the least that a page may show: raise it"
                )


def cases(claim: Row, chosen: Mapping[str, Row]) -> Iterator[Case]:
    """Every division, variant and seed, each variant with what its trials chose."""
    for division, held in claim.get("divisions", {"": {}}).items():
        for variant in claim["variants"]:
            for seed in claim["seeds"]:
                own = chosen.get(variant, {})
                overrides = merge(held, get_overrides(claim, variant), own)
                yield Case(division, variant, seed, overrides, chosen=own)


def trials(claim: Row) -> Iterator[Case]:
    """What each variant tries, on the division that is named, or the first."""
    for variant in claim["variants"]:
        for trial in list_tried(claim, variant):
            yield _trial(claim, variant, {}, trial)


def tunings(claim: Row, chosen: Mapping[str, Row]) -> Iterator[Case]:
    """What each variant whose clients tune tries of that, with what its trials chose."""
    for variant in claim["variants"]:
        for trial in list_tried(claim, variant, "tunings"):
            case = _trial(claim, variant, chosen.get(variant, {}), trial)
            if settings_of(claim, case).personal.epochs:
                yield case


def _trial(claim: Row, variant: str, chosen: Row, trial: Row) -> Case:
    told, divisions = claim["tuning"], claim.get("divisions", {"": {}})
    division = told.get("division", next(iter(divisions)))
    overrides = merge(divisions[division], get_overrides(claim, variant), chosen, trial)
    return Case(division, variant, told["seed"], overrides, trial)


def tunes(trial: Row) -> bool:
    """Whether it tries how clients tune, which their own models' validation judges."""
    return trial.keys() == {"personal"}


def list_tried(claim: Row, variant: str, what: str = "trials") -> list[Row]:
    """A variant's own list of trials, or of tunings, or all variants'."""
    own, common = claim["variants"][variant].get(what), claim.get("tuning", {}).get(what)
    return own or common or []


def get_overrides(claim: Row, variant: str) -> Row:
    """What a variant overrides, whatever its trials say."""
    return {part: told for part, told in claim["variants"][variant].items() if part not in LISTS}


def best(rows: Sequence[Row]) -> dict[str, Row]:
    """The trial of each variant with the lowest validation loss; one that diverged loses."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=_loss):
        found.setdefault(row["variant"], row["trial"])
    return found


def _loss(row: Row) -> float:
    loss = row["validation"]
    return math.inf if loss is None or math.isnan(loss) else loss


def merge(*tables: Mapping[str, Any]) -> Row:
    """Tables over tables, to any depth."""
    result: Row = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merge(result[key], value) if both else value
    return result


def format_overrides(trial: Row) -> str:
    """Overrides as a command line has them."""
    each = ((f"{part}.{key}", value) for part, own in trial.items() for key, value in own.items())
    plain = (bool, str, list)
    return ", ".join(f"{k}={v}" if isinstance(v, plain) else f"{k}={v:g}" for k, v in each)


def of_recipe(claim: Row) -> Settings:
    """The claim's recipe, without what the claim unsets, and with what it overrides."""
    table = tomllib.loads((ROOT / claim["recipe"]).read_text())
    for part, _, key in (name.partition(".") for name in claim.get("unset", ())):
        if key not in table.get(part, {}):
            raise ConfigError(f"unset: {claim['recipe']} does not set {part}.{key}: leave it out")
        del table[part][key]
    return from_table(merge(table, claim.get("overrides", {})))


def settings_of(item: Row, case: Case, at: Places | None = None) -> Settings:
    """A case's settings, one thread if it does not say more.

    Args:
        item: that the case is of.
        case: one of its runs.
        at: where its data and backbones are; none leaves paths as the item says, and has a digest
            for a backbone that is made.
    """
    extra = {}
    if case.trial is not None:
        extra = TRIAL if tunes(case.trial) else merge(TRIAL, SHARED)
    settings = _place(item, merge(item.get("overrides", {}), case.overrides, extra), at)
    settings = replace(settings, federation=replace(settings.federation, seed=case.seed))
    if case.trial is not None and settings.image_metrics.features:
        settings = replace(settings, image_metrics=ImageMetrics())
    return _resolve_backbone(item, settings, at)


def _place(item: Row, overrides: Row, at: Places | None) -> Settings:
    paths = {}
    for name, path in item.get("paths", {}).items():
        part, _, key = name.partition(".")
        paths = merge(paths, {part: {key: str(at.data / path) if at else path}})
    return of_recipe({**item, "overrides": merge({"engine": {"threads": 1}}, paths, overrides)})


def backbones(item: Row, at: Places) -> dict[Path, Settings]:
    """Settings of those that `fedgen pretrain` makes for an item, by their folders."""
    names = item.get("backbones", {})
    return {_get_backbone_folder(item, name, at): _backbone(item, name, at) for name in names}


def _resolve_backbone(item: Row, settings: Settings, at: Places | None) -> Settings:
    """The settings with the backbone that is made first in its place, if it is one.

    Where there are no places, it is known by the digest of what makes it.
    """
    path = settings.backbone.path
    if not path.startswith(MADE):
        return settings
    name = path.removeprefix(MADE)
    if name not in item.get("backbones", {}):
        raise ConfigError(f"backbone.path={path!r} is no backbone of paper item {item['name']!r}")
    told = (
        str(_get_backbone_folder(item, name, at)) if at else MADE + _digest(_backbone(item, name))
    )
    return replace(settings, backbone=replace(settings.backbone, path=told))


def _get_backbone_folder(item: Row, name: str, at: Places) -> Path:
    """Where a backbone is made: other settings are another one."""
    return at.made / f"{name}-{_digest(_backbone(item, name))[:8]}"


def _backbone(item: Row, name: str, at: Places | None = None) -> Settings:
    """What a backbone is made by; it may be trained on from another one."""
    recipe_table = item["backbones"][name]
    paths = {**item.get("paths", {}), **recipe_table.get("paths", {})}
    bare = {key: value for key, value in item.items() if key != "unset"}
    own = {**bare, "recipe": recipe_table["recipe"], "paths": paths}
    return _resolve_backbone(item, _place(own, recipe_table.get("overrides", {}), at), at)


def check_paths(item: Row, data: Path) -> None:
    """Refuse a data folder that lacks what the item needs."""
    held = [own.get("paths", {}).items() for own in (item, *item.get("backbones", {}).values())]
    for name, path in itertools.chain(*held):
        if not (data / path).exists():
            raise ConfigError(
                f"DATA={data} has no {path}, the {name} of paper item {item['name']!r}: give the "
                "folder that has it, by DATA= or --data"
            )


def digest(item: Row, case: Case) -> str:
    """SHA-256 of a case's settings as TOML: those that are no defaults, [engine] left out.

    Paths are as the item says, not as a machine has them. A setting that is new in config.py, and
    that the item leaves alone, changes nothing here.
    """
    return _digest(settings_of(item, case))


def _digest(settings: Settings) -> str:
    settings_table, usual = to_table(settings), to_table(Settings())
    del settings_table["engine"]
    if (shape := ROOT / (settings.pretrain.config or "")).is_file():
        settings_table["pretrain"]["config"] = shape.read_text("utf-8")
    kept = {part: _apart(held, usual[part]) for part, held in settings_table.items()}
    kept = _with_old_names(kept)
    toml = tomli_w.dumps({part: held for part, held in kept.items() if held})
    return hashlib.sha256(toml.encode()).hexdigest()


def _with_old_names(table: Row) -> Row:
    """The table by the names that settings had when the committed records were made."""
    old_names = {new: old for old, new in RENAMED_SETTINGS.items()}
    renamed: Row = {}
    for part, values in table.items():
        if not isinstance(values, dict):
            renamed[part] = values
            continue
        for key, value in values.items():
            old_part, _, old_key = old_names.get(f"{part}.{key}", f"{part}.{key}").partition(".")
            is_factor = (part, key) == ("federation", "over_selection")
            old_value = round(value - 1, 12) if is_factor else value
            renamed.setdefault(old_part, {})[old_key] = old_value
    return renamed


def _apart(held: Any, usual: Any) -> Any:
    if not isinstance(held, dict):
        return held
    return {key: value for key, value in held.items() if value != usual.get(key)}


def key_of(division: str, variant: str, seed: int, trial: Row | None) -> str:
    """What tells one case of an item from its others."""
    return json.dumps([division, variant, seed, trial], sort_keys=True)
