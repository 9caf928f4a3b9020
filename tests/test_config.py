"""Settings: there and back through TOML, every mistake one line, every one with its sentence."""

import ast
import math
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from fedgen_edge import config
from fedgen_edge.algorithms.methods import make_algorithm
from fedgen_edge.config import (
    RENAMED_SETTINGS,
    Settings,
    Training,
    describe_unknown,
    from_table,
    iter_settings,
    learning_rate,
    load,
    load_saved,
    to_toml,
)
from fedgen_edge.deploy.settings import DeploymentSettings, SiteSettings, read
from fedgen_edge.errors import ConfigError

SOURCE = Path(config.__file__)
RECIPES = sorted((SOURCE.parents[2] / "recipes").glob("*.toml"))
PARTS = {name: part for name, part in get_type_hints(Settings).items() if name != "task"}
DEFAULTS = dict(iter_settings(Settings()))
NEEDS = {"data.source": {"path": "texts"}, "uplink.feedback": {"dtype": "int8"}}
"""What a setting cannot be without."""


def hint(name: str) -> Any:
    """Annotation of a setting, less what checks it."""
    if "." not in name:
        return get_type_hints(Settings)[name]
    part, key = name.split(".")
    return get_type_hints(PARTS[part])[key]


def other(kind: Any, value: Any) -> Any:
    """A value of this kind that is not the given one."""
    if get_origin(kind) in {types.UnionType, Union}:
        return other(next(k for k in get_args(kind) if k is not type(None)), value)
    if get_origin(kind) is Literal:
        return next((choice for choice in reversed(get_args(kind)) if choice != value), value)
    if get_origin(kind) is tuple:
        numbers: dict[Any, Any] = {float: (0.5, 0.25), int: (3, 5)}
        return numbers.get(get_args(kind)[0], ("a", 'b "c"\\'))
    if kind is bool:
        return not value
    if kind in {int, float}:
        # a factor is 1 by default, and not below
        return (value or 0) + 1 if kind is int or value == 1 else (value or 0) / 2 + 0.07
    return {str: "ä'\n", Path: Path("a/b")}[kind]


def table_of(name: str, value: Any) -> dict[str, Any]:
    """One setting as TOML says it, with what it needs."""
    if "." not in name:
        return {name: value}
    part, key = name.split(".")
    return {part: {key: value, **NEEDS.get(name, {})}}


# ---- TOML


def test_the_defaults_come_back_from_toml(tmp_path: Path) -> None:
    assert through_toml(Settings(), tmp_path) == Settings()
    assert from_table({}) == Settings()


def through_toml(settings: Settings, folder: Path) -> Settings:
    path = folder / "settings.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    return load(path)


UPLINK_ONLY = ("downlink.low_rank", "downlink.feedback", "downlink.decay", "downlink.sparsify")
"""Settings of the downlink whose other values are refused: one class is for both directions."""


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name not in UPLINK_ONLY])
def test_every_setting_comes_back_from_toml(name: str, tmp_path: Path) -> None:
    wanted = other(hint(name), DEFAULTS[name])
    settings = from_table(table_of(name, wanted))
    assert dict(iter_settings(settings))[name] == wanted
    back = through_toml(settings, tmp_path)
    assert back == settings
    assert type(dict(iter_settings(back))[name]) is type(wanted)


def test_a_setting_that_may_be_none_is_none_by_default() -> None:
    # TOML cannot say none: a default that is something could never be taken back.
    may_be_none = [name for name in DEFAULTS if type(None) in get_args(hint(name))]
    assert may_be_none
    assert [name for name in may_be_none if DEFAULTS[name] is not None] == []


def test_a_word_is_a_list_of_one() -> None:
    settings = from_table({"adapter": {"target_modules": "all-linear"}})
    assert settings.adapter.target_modules == ("all-linear",)


# ---- names of earlier versions


@pytest.mark.parametrize(("old", "new"), RENAMED_SETTINGS.items())
def test_an_old_name_is_refused_in_one_line_with_the_new_one(old: str, new: str) -> None:
    assert old not in DEFAULTS
    assert new in DEFAULTS
    part, key = old.split(".")
    # pydantic refuses the whole table where its name is old
    wrong, right = (part, "image_metrics") if part == "judging" else (old, new)
    refused({part: {key: 1}}, f"unknown setting '{wrong}': it is called '{right}' now")
    assert f"it is called {new!r} now" in describe_unknown(old)


def test_a_saved_run_of_an_earlier_version_is_read_with_the_new_names(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        'task = "vae"\n[federation]\nover = 0.3\ncohort = 4\n[judging]\nfeatures = "pixels"\n'
        "[evaluation]\nevery = 5\nkeep = 3\n[uplink]\nrank = 2\n"
    )
    expected = {
        "task": "vae",
        "federation": {"over_selection": 1.3, "cohort": 4},
        "image_metrics": {"features": "pixels"},
        "evaluation": {"every_rounds": 5},
        "checkpoints": {"keep": 3},
        "uplink": {"low_rank": 2},
    }
    assert load_saved(path) == from_table(expected)
    path.write_text(to_toml(from_table(expected)))
    assert load_saved(path) == from_table(expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("low_rank", 1), ("feedback", True), ("decay", 0.5), ("sparsify", "random-k")],
)
def test_what_only_the_uplink_can_do_is_refused_on_the_downlink(key: str, value: Any) -> None:
    refused({"downlink": {"dtype": "int8", key: value}}, f"downlink.{key}={value!r} is for the up")


# ---- mistakes


def refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        from_table(table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"adapter": {"rnak": 4}}, "unknown setting 'adapter.rnak': did you mean 'adapter.rank'"),
        ({"trainig": {"lr": 1.0}}, "unknown setting 'trainig': did you mean 'training"),
        ({"lr": 1.0}, "unknown setting 'lr': did you mean"),
        ({"training": {"learning_rate": 1.0}}, "did you mean 'training"),
        ({"adapter": {"rank": 0}}, "adapter.rank=0: .*greater than or equal to 1"),
        ({"adapter": {"rank": "eight"}}, "adapter.rank='eight': .*integer"),
        ({"adapter": {"rank": True}}, "adapter.rank=True: "),
        ({"training": {"lr": True}}, "training.lr=True: "),
        ({"adapter": {"rank": 2.5}}, "adapter.rank=2.5: .*integer"),
        ({"adapter": {"dropout": 1.0}}, "adapter.dropout=1.0: .*less than 1"),
        ({"adapter": 3}, "adapter=3: "),
        ({"training": {"optimizer": "adam"}}, "training.optimizer='adam': .*'adamw' or 'sgd'"),
        ({"adapter": {"ranks": [2, 9]}}, r"adapter.ranks=\[2, 9\] must be at most adapter.rank=8"),
        ({"adapter": {"ranks": [2, 0]}}, r"adapter.ranks.1=0: .*greater than or equal to 1"),
        ({"partition": {"sizes": [1.0, -1.0]}}, r"partition.sizes.1=-1.0: .*greater than 0"),
        ({"federation": {"cohort": 3, "fraction": 0.5}}, "cohort=3 and federation.fraction=0.5"),
        ({"data": {"validation": 0.6, "test": 0.4}}, "data.validation=0.6 and data.test=0.4"),
    ],
)
def test_a_mistake_is_one_line_with_the_setting_its_value_and_the_rule(
    table: dict[str, Any], said: str
) -> None:
    refused(table, said)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [n for n in DEFAULTS if "." in n and hint(n) is float])
def test_no_number_may_be_infinite_or_none_at_all(name: str, value: float) -> None:
    refused(table_of(name, value), f"{name}={value}: ")


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no settings file at .*none\.toml: give a TOML file"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"[adapter", b"rank = ", b"\xff\xfe", b"{}"])
def test_a_file_that_is_not_toml_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: ") as caught:
        load(path)
    assert "\n" not in str(caught.value)


HOSTILE = {
    "nested deep": (b"a = " + b"[" * 5000 + b"]" * 5000, "is not TOML: it is nested too deep"),
    "tables nested deep": (b"a" + b".a" * 300 + b" = 1", "nested more than 50 levels deep"),
    "many digits": (b"port = " + b"9" * 5000, "a whole number in it has thousands of digits"),
    "many digits in base 16": (b"port = 0x" + b"f" * 5000, "a whole number in it is beyond 64"),
    "beyond 64 bits": (b"port = 9223372036854775808", "a whole number in it is beyond 64 bits"),
    "no UTF-8": (b'name = "\xe9"', "is not TOML: 'utf-8' codec can't decode byte 0xe9"),
    "NUL": (b'[own]\n"data.path" = "a\\u0000b"', "own.data.path has a NUL character in its text"),
    "NUL in a list": (b'[a]\nb = ["x", "a\\u0000"]', "a.b has a NUL character in its text"),
}


@pytest.mark.parametrize(("content", "told"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(
    "reader",
    [load, partial(read, DeploymentSettings), partial(read, SiteSettings)],
    ids=["recipe", "plan", "site"],
)
def test_a_hostile_file_of_settings_is_one_line(
    content: bytes, told: str, reader: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        reader(path)
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file_of_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no settings file at"):
        load(tmp_path)


def test_a_byte_order_mark_before_the_settings_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes("\ufeff[adapter]\nrank = 3".encode())
    assert load(path).adapter.rank == 3


def test_the_line_shows_the_beginning_of_a_long_value() -> None:
    with pytest.raises(ConfigError, match=r"^task='x{199}: ") as caught:
        from_table({"task": "x" * 10**6})
    assert len(str(caught.value)) < 500


def test_sizes_whose_sum_no_number_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"partition\.sizes=\[1e\+308, 1e\+308\] add up to more"):
        from_table({"partition": {"by": "size", "sizes": [1e308, 1e308]}})


# ---- the learning rate


def test_a_constant_rate_stays() -> None:
    assert rates(Training(lr=0.8), 3) == [0.8, 0.8, 0.8]


def test_a_linear_rate_falls_to_its_last_part() -> None:
    # Round r of 4: 0.8 * (1 - r / 4).
    assert rates(Training(lr=0.8, schedule="linear"), 4) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_cosine_rate_is_half_in_the_middle() -> None:
    # Round r of 4: 0.8 * (1 + cos(pi r / 4)) / 2; cos(pi / 4) = 1 / sqrt(2).
    root = math.sqrt(0.5)
    wanted = [0.8, 0.4 * (1 + root), 0.4, 0.4 * (1 - root)]
    assert rates(Training(lr=0.8, schedule="cosine"), 4) == pytest.approx(wanted)


def test_a_rate_warms_up_first_and_then_begins_its_schedule_whole() -> None:
    # Two rounds of warm-up: 1/3 and 2/3 of it; then 2 rounds of falling: 1 and 1/2.
    training = Training(lr=0.6, schedule="linear", warmup=2)
    assert rates(training, 4) == pytest.approx([0.2, 0.4, 0.6, 0.3])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2, 9])
def test_a_rate_is_never_zero_or_above_the_settings(schedule: Any, warmup: int) -> None:
    found = rates(Training(lr=0.5, schedule=schedule, warmup=warmup), 5)
    assert all(0 < rate <= 0.5 for rate in found)


def rates(training: Training, rounds: int) -> list[float]:
    return [learning_rate(training, r, rounds) for r in range(rounds)]


# ---- documentation


def documented() -> Iterator[tuple[str, str, str]]:
    """Class, field and sentence of each setting in the source; "" where there is none."""
    for node in ast.parse(SOURCE.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield node.name, field.target.id, sentence(after)


def sentence(node: ast.stmt) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
        case _:
            return ""


def test_every_setting_has_its_sentence() -> None:
    # A part of `Settings` is documented by its own class.
    parts = {("Settings", name) for name in PARTS}
    told = {(c, f): text for c, f, text in documented() if (c, f) not in parts}
    classes = {part.__name__: part for part in PARTS.values()}
    expected = {(c, f) for c, part in classes.items() for f in part.__dataclass_fields__}
    assert told.keys() == {*expected, ("Settings", "task")}
    assert [where for where, text in told.items() if not text.endswith(".")] == []


# ---- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_methods_that_there_are(path: Path) -> None:
    settings = load(path)
    make_algorithm(settings.method)
    for name in settings.evaluation.baselines:
        make_algorithm(config.Method(name=name))


def test_there_are_recipes() -> None:
    assert "quickstart" in {path.stem for path in RECIPES}
