"""The paper's harness: what is run, what is kept, what is refused, and how it ends."""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import figures
import items
import kept
import make
import running
import views
from fedgen_edge.errors import ConfigError, TrainingError
from fedgen_edge.runs.records import lines, write_lines

ROOT = Path(__file__).parents[1]
ITEM = {
    "title": "a toy",
    "recipe": str(ROOT / "recipes" / "tiny.toml"),
    "seeds": [0, 1],
    "reference": "one",
    "axis": "steps",
    "models": ["global", "personal"],
    "measures": ["pooled"],
    "table": "curve",
    "figure": "curve",
    "overrides": {
        "evaluation": {"baselines": [], "sample_tokens": 0, "test_blocks": 2, "blocks": 2},
        "personal": {"epochs": 1, "steps": 1},
        "federation": {"rounds": 2},
    },
    "tuning": {"seed": 7, "trials": [{"training": {"lr": 1e-3}}, {"training": {"lr": 1e-2}}]},
    "variants": {"one": {"training": {"steps": 1}}, "two": {"training": {"steps": 2}}},
    "scale": {"try": {}},
}


class Here(Executor):
    """Runs what it is given at once, and remembers it."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        self.given.append(args)
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def write(folder: Path, name: str = "toy", **changes: Any) -> Path:
    """An item's file; returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.toml").write_text(tomli_w.dumps({**ITEM, **changes}))
    return folder


def told(here: Path, **other: Any) -> argparse.Namespace:
    """The command's arguments."""
    known = {"data": here, "runs": here / "runs", "results": here / "results", "discard": True}
    return argparse.Namespace(**{**known, **other})


def carried(here: Path, **changes: Any) -> tuple[Here, list[str]]:
    """Carry the toy out; returns what ran, and what failed."""
    item, pool = items.read("toy", "try", write(here / "items", **changes)), Here()
    return pool, make.carry_out_item(item, told(here), pool)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the toy was carried out."""
    here = tmp_path_factory.mktemp("paper")
    pool, failed = carried(here)
    assert not failed
    assert len(pool.given) == 2 * 2 + 2 * 2
    return here


def copied(done: Path, to: Path, change: Any = lambda rows: rows) -> Path:
    """Its records elsewhere, altered."""
    name = "toy-try.jsonl"
    write_lines(to / "results" / name, change(lines(done / "results" / name)))
    return to


def toy(done: Path, **changes: Any) -> dict[str, Any]:
    return items.read("toy", "try", write(done / "items", **changes))


def test_a_record_is_in_the_place_that_the_file_gives_it(done: Path) -> None:
    rows = lines(done / "results" / "toy-try.jsonl")
    assert [(row["variant"], row["seed"], row.get("trial")) for row in rows] == [
        ("one", 0, None), ("one", 1, None), ("two", 0, None), ("two", 1, None),
        *((v, 7, {"training": {"lr": rate}}) for v in ("one", "two") for rate in (1e-3, 1e-2)),
    ]  # fmt: skip
    assert not [*(done / "runs").glob("toy*")]  # as their records are kept
    for row in rows[:4]:
        assert row["test"].keys() == {"backbone", "global", "personal"}
        assert [way[0] for way in row["way"]] == [1, 2]
        assert row["way"][-1][1] == row["bytes_up"]
        assert [moves[0] for moves in row["moves"]] == [1, 2]
        assert all(row["findings"].values())
        # of the last round, and of what each client kept
        assert row["validation"].keys() == {"global", "personal"}
        assert row["peak_bytes"] > 0
        assert row["training"]["steps"] == (1 if row["variant"] == "one" else 2)
        tried = [r for r in rows[4:] if r["variant"] == row["variant"]]
        assert row["chosen"] == min(tried, key=lambda r: r["validation"])["trial"]
    assert not any("test" in row for row in rows[4:])


def test_a_variant_runs_with_its_best_trial() -> None:
    few, many = ({"training": {"lr": rate}} for rate in (1e-3, 1e-2))
    claim = {
        "divisions": {"d": {"partition": {"by": "iid"}}},
        "tuning": {"seed": 7, "division": "d", "trials": [few, many]},
        "seeds": [0],
        "variants": {
            "a": {"method": {"name": "ffa-lora"}},
            "b": {"trials": [{"method": {"server_lr": 0.1}}], "method": {"name": "fedadam"}},
        },
    }
    tried = [*items.trials(claim)]
    assert [(case.variant, case.seed, case.trial) for case in tried] == [
        ("a", 7, few), ("a", 7, many), ("b", 7, {"method": {"server_lr": 0.1}})
    ]  # fmt: skip
    assert tried[2].overrides == {
        "partition": {"by": "iid"}, "method": {"name": "fedadam", "server_lr": 0.1}
    }  # fmt: skip
    losses = [math.nan, 3.0, 4.0]
    rows = [
        {"variant": case.variant, "trial": case.trial, "validation": loss}
        for case, loss in zip(tried, losses, strict=True)
    ]
    chosen = items.best(rows)
    assert chosen == {"a": many, "b": {"method": {"server_lr": 0.1}}}
    found = {case.variant: case.overrides for case in items.cases(claim, chosen)}
    assert found["a"]["training"] == {"lr": 1e-2}


def test_how_clients_tune_is_tried_with_what_the_trials_chose(tmp_path: Path) -> None:
    rates = [{"personal": {"lr": rate}} for rate in (1e-4, 1e-2)]
    variants = {"one": {}, "alone": {"method": {"name": "local-only"}, "personal": {"epochs": 0}}}
    tuning = {**ITEM["tuning"], "tunings": rates}
    pool, failed = carried(tmp_path, variants=variants, tuning=tuning, seeds=[0])
    assert not failed
    assert len(pool.given) == 4 + 2 + 2  # nobody tunes alone
    rows = lines(tmp_path / "results" / "toy-try.jsonl")
    assert [(row["variant"], row.get("trial")) for row in rows] == [
        ("one", None), ("alone", None),
        *((v, {"training": {"lr": rate}}) for v in ("one", "alone") for rate in (1e-3, 1e-2)),
        *(("one", rate) for rate in rates),
    ]  # fmt: skip
    one, alone, *tried, low, high = rows
    best = min(tried[:2], key=lambda row: row["validation"])["trial"]
    # random weights learn next to nothing at a hundredth of the rate
    assert high["validation"] < low["validation"]
    assert one["chosen"] == {**best, **high["trial"]}
    assert one["tuned"] > 0
    assert "personal" not in alone["chosen"]
    item = items.read("toy", "try", tmp_path / "items")
    assert len(kept.read_whole(item, tmp_path / "results")) == 2
    assert "the best of 2, by the mean" in views.caption(item, rows[:2])
    pool, _ = carried(tmp_path, variants=variants, tuning=tuning, seeds=[0])
    assert pool.given == []


def test_what_has_a_record_is_not_run_again(done: Path, tmp_path: Path) -> None:
    pool, failed = carried(copied(done, tmp_path))
    assert (pool.given, failed) == ([], [])


def test_only_what_is_missing_is_run(done: Path, tmp_path: Path) -> None:
    whole = lines(done / "results" / "toy-try.jsonl")
    pool, _ = carried(copied(done, tmp_path, lambda rows: rows[:2] + rows[3:]))
    assert len(pool.given) == 1
    again = lines(tmp_path / "results" / "toy-try.jsonl")
    told_ = [{k: row[k] for k in ("digest", "test", "moves")} for row in (whole[2], again[2])]
    assert told_[0] == told_[1]
    assert [row["digest"] for row in again] == [row["digest"] for row in whole]


def test_a_missing_record_is_named(done: Path, tmp_path: Path) -> None:
    here = copied(done, tmp_path, lambda rows: rows[:2] + rows[3:])
    with pytest.raises(ConfigError, match=r"toy-try.jsonl: the record of two, seed 0 is missing"):
        kept.read_whole(toy(here), here / "results")
    with pytest.raises(FileNotFoundError):
        kept.read_whole(toy(here), here / "nothing")


def test_a_record_of_other_settings_is_refused(done: Path) -> None:
    changed = {"one": {"training": {"steps": 1}}, "two": {"training": {"steps": 3}}}
    item = toy(done, variants=changed)
    with pytest.raises(ConfigError, match=r"of two, trial training.lr=0.001, seed 7 is of other"):
        kept.read_whole(item, done / "results")
    left = kept.find_missing(item, [*items.trials(item)], done / "results")
    assert {case.variant for case in left} == {"two"}


@pytest.mark.parametrize("what", ["data_sha256", "backbone_sha256"])
def test_records_of_other_data_or_backbones_are_not_shown_beside_each_other(
    what: str, done: Path, tmp_path: Path
) -> None:
    def stale(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*rows[:2], {**rows[2], what: "0"}, *rows[3:]]

    # both variants have the data and the backbone of the recipe, at each seed
    here = copied(done, tmp_path, stale)
    with pytest.raises(ConfigError, match=f"lines 1 and 3: {what} differs, and the settings"):
        kept.read_whole(toy(here), here / "results")


def test_a_record_of_another_choice_is_refused(done: Path, tmp_path: Path) -> None:
    def swapped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first, second = rows[4]["validation"], rows[5]["validation"]
        return [
            *rows[:4],
            {**rows[4], "validation": second},
            {**rows[5], "validation": first},
            *rows[6:],
        ]

    here = copied(done, tmp_path, swapped)
    with pytest.raises(ConfigError, match=r"the record of one, seed 0 is of other settings"):
        kept.read_whole(toy(here), here / "results")


def test_a_record_of_another_scale_or_of_nothing_is_refused(done: Path, tmp_path: Path) -> None:
    here = copied(done, tmp_path, lambda rows: [{**rows[0], "scale": "full"}, *rows[1:]])
    with pytest.raises(ConfigError, match=r"the record of one, seed 0 is of scale 'full'"):
        kept.read_whole(toy(here), here / "results")
    copied(done, tmp_path, lambda rows: [*rows[:4], {**rows[3], "variant": "six"}, *rows[4:]])
    with pytest.raises(ConfigError, match=r"line 5: the item's file has no .*six"):
        kept.read_whole(toy(here), here / "results")


def test_paths_and_the_engine_are_no_part_of_a_digest(tmp_path: Path) -> None:
    def digests(**changes: Any) -> list[str]:
        item = toy(tmp_path, **changes)
        return [items.digest(item, case) for case in items.cases(item, {})]

    usual = ITEM["overrides"]
    assert digests() == digests(overrides={**usual, "engine": {"device": "cpu", "threads": 2}})
    assert digests() != digests(overrides={**usual, "training": {"clip": 0.5}})
    assert len({*digests()}) == 4
    item = toy(tmp_path, paths={"data.path": "ptb"})
    case = next(items.cases(item, {}))
    assert (
        items.settings_of(item, case, items.Places(Path("/elsewhere"), tmp_path)).data.path
        == "/elsewhere/ptb"
    )
    assert items.settings_of(item, case).data.path == "ptb"


def test_what_an_item_may_not_say_is_one_line(tmp_path: Path) -> None:
    wrong = {
        r"tuning.seed=0 is one of seeds=\[0, 1\]": {"tuning": {**ITEM["tuning"], "seed": 0}},
        "unknown key 'colour'": {"colour": "red"},
        "'three' is no variant": {"reference": "three"},
        "'four' is no variant": {"failures": [{"variant": "four"}]},
        "unequal numbers of trials": {"variants": {**ITEM["variants"], "one": {"trials": [{}]}}},
        r"has no \[scale.try\]": {"scale": {"small": {}}},
    }
    for said, change in wrong.items():
        with pytest.raises(ConfigError, match=said):
            toy(tmp_path, **change)


def test_an_item_has_no_more_runs_at_once_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    @contextmanager
    def few(jobs: int) -> Iterator[Executor]:
        asked.append(jobs)
        yield Here()

    monkeypatch.setattr(make, "workers", few)
    monkeypatch.setattr(make, "carry_out_item", lambda *_: [])
    folder = write(write(tmp_path / "items"), "large", jobs=2)
    make.make(told(tmp_path, items=["toy", "large"], scale="try", jobs=3, folder=folder))
    make.make(told(tmp_path, items=["large"], scale="try", jobs=1, folder=folder))
    assert asked == [3, 2, 1]
    write(folder, "large", jobs=0)
    with pytest.raises(ConfigError, match="jobs=0 is below 1"):
        items.read("large", "try", folder)


def test_nothing_too_small_is_shown(tmp_path: Path) -> None:
    for said, more in {"seeds=": {}, "clients=None is below 20": {"seeds": [0, 1, 2]}}.items():
        with pytest.raises(ConfigError, match=said):
            items.read("toy", "small", write(tmp_path, scale={"small": more}))


def test_a_run_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(folder: Path) -> dict[str, Any]:
        if "lr=0.01" in folder.name.replace("_", "=") or "seed_1" in folder.name:
            raise TrainingError("its loss was nan")
        return {
            **dict.fromkeys(("hardware", "precision", "versions", "seconds"), "x"),
            "way": [[2.5]],
        }

    monkeypatch.setattr(running, "proceed_run", lambda *_: [])
    monkeypatch.setattr(running, "record", refuses)
    _, failed = carried(tmp_path, tuning={**ITEM["tuning"], "seed": 2})
    assert failed == [f"toy, {v}, seed 1: its loss was nan" for v in ("one", "two")]
    rows = lines(tmp_path / "results" / "toy-try.jsonl")
    assert [row["seed"] for row in rows] == [0, 0, 2, 2, 2, 2]
    assert [row["chosen"] for row in rows[:2]] == [{"training": {"lr": 1e-3}}] * 2


def test_a_trial_that_could_not_begin_is_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> list[Any]:
        raise ConfigError("no room")

    monkeypatch.setattr(running, "proceed_run", refuses)
    _, failed = carried(tmp_path)
    assert len(failed) == 4
    assert not (tmp_path / "results").exists()


def test_a_run_that_was_stopped_before_it_began_begins_again(tmp_path: Path) -> None:
    item = toy(tmp_path, tuning={**ITEM["tuning"], "seed": 2})
    settings = items.settings_of(item, next(items.cases(item, {})))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.toml").write_text("[data]")
    events = running.proceed_run(settings, tmp_path / "run")
    assert next(iter(events)).stage == "federation"


def test_a_numbers_link_leads_to_its_records(done: Path) -> None:
    item = toy(done)
    rows = kept.read_whole(item, done / "results")
    table = views.table(item, rows)
    found = re.findall(r"\]\(\.\./\.\./paper/results/toy-try\.jsonl#L(\d+)-L(\d+)\)", table)
    assert len(found) >= 2 * 5
    kept_rows = lines(done / "results" / "toy-try.jsonl")
    for line in table.splitlines():
        for first, last in re.findall(r"#L(\d+)-L(\d+)\)", line):
            variant = line.split(" | ")[0].removeprefix("| ")
            linked = kept_rows[int(first) - 1 : int(last)]
            assert [(row["variant"], row["seed"]) for row in linked] == [(variant, 0), (variant, 1)]


def test_a_figure_is_the_same_to_the_byte(done: Path) -> None:
    item = toy(done)
    rows = kept.read_whole(item, done / "results")
    first = figures.draw_figure(item, rows)
    assert first == figures.draw_figure(item, rows)
    assert "currentColor" not in first
    assert "#ffffff" in first
    assert "mean and 95 % interval of 2 seeds" in first


PICTURES = {
    "recipe": str(ROOT / "recipes" / "digits-vae.toml"),
    "seeds": [0, 1],
    "measures": ["distance"],
    "models": ["global"],
    "backbones": {"few": {"recipe": str(ROOT / "recipes" / "digits-vae.toml"), "overrides": {
        "pretrain": {"rounds": 1, "steps": 2}, "data": {"limit": 600}}}},
    "tuning": {"seed": 7, "trials": [{"training": {"lr": 1e-3}}]},
    "overrides": {
        "backbone": {"path": "made:few"},
        "data": {"limit": 600},
        "partition": {"by": "iid", "minimum": 1},
        "federation": {"rounds": 1, "clients": 2, "cohort": 2},
        "training": {"steps": 1},
        "personal": {"epochs": 0},
        "evaluation": {"sample_images": 0},
        "image_metrics": {"samples": 20},
    },
    "variants": {"one": {}},
    "reference": "one",
}  # fmt: skip


def test_pictures_have_a_backbone_that_is_made_first_and_are_judged_by_samples(
    tmp_path: Path,
) -> None:
    pool, failed = carried(tmp_path, **PICTURES)
    assert not failed
    (out,) = (path for path in (tmp_path / "runs" / "backbones").iterdir())
    assert out.name.startswith("few-")
    trial, *cases = [given[0] for given in pool.given[1:]]
    assert {settings.backbone.path for settings in (trial, *cases)} == {str(out)}
    assert [settings.image_metrics.features for settings in (trial, *cases)] == [
        None,
        "pixels",
        "pixels",
    ]
    item = items.read("toy", "try", tmp_path / "items")
    rows = kept.read_whole(item, tmp_path / "results")
    table = views.table(item, rows)
    assert f"global: {rows[0]['test']['global']['seen_by']} | " in table
    assert rows[0]["test"]["global"]["made"] >= 20
    again, _ = carried(tmp_path, **PICTURES)
    assert not again.given
    other = {
        "few": items.merge(PICTURES["backbones"]["few"], {"overrides": {"pretrain": {"steps": 3}}})
    }
    write(tmp_path / "items", **{**PICTURES, "backbones": other})
    changed = items.read("toy", "try", tmp_path / "items")
    assert len(kept.find_missing(changed, [*items.trials(changed)], tmp_path / "results")) == 1


def test_a_backbone_is_trained_on_from_another_one_which_is_made_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = PICTURES["backbones"]["few"]
    on = {"recipe": few["recipe"], "overrides": {"backbone": {"path": "made:few"}}}
    own = {**PICTURES, "name": "toy", "backbones": {"on": on, "few": few}}
    at = make.places(told(tmp_path))
    first, second = items.backbones(own, at)
    assert items.backbones(own, at)[first].backbone.path == str(second)
    other = items.merge(own, {"backbones": {"few": {"overrides": {"pretrain": {"steps": 9}}}}})
    assert first not in items.backbones(other, at)  # made of another one, it is another one
    pool = Here()
    monkeypatch.setattr(make, "pretrain_backbone", lambda _, out: "" if out == second else "broken")
    assert make.prepare(own, told(tmp_path), pool) == ["broken"]
    assert [given[1] for given in pool.given] == [second, first]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unset": ["training.nope"]}, "does not set training.nope"),
        ({"tuning": {"trials": []}}, "tuning.seed is missing"),
        ({"tuning": {"seed": 7, "division": "far", "trials": [{}]}}, "'far' is no division"),
        ({"tuning": {"seed": 7}}, "tuning.trials is missing"),
        (
            {"tuning": {"seed": 7, "trials": [{"personal": {"lr": 0.1}}]}},
            "trials of 'one' has personal.lr=0.1: settings of personal alone are tunings",
        ),
        (
            {"tuning": {**ITEM["tuning"], "tunings": [{"gan": {"r1": 1.0}}]}},
            "tunings of 'one' has gan.r1=1",
        ),
    ],
)
def test_a_mistake_in_an_items_file_is_told(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = write(tmp_path / "items", **changes)
    with pytest.raises(ConfigError, match=said):
        _ = [items.settings_of(told, case) for told in (items.read("toy", "try", folder),)
             for case in items.cases(told, {})]  # fmt: skip


def test_words_are_tried_as_they_are() -> None:
    assert items.format_overrides({"training": {"schedule": "cosine", "lr": 1e-3}}) == (
        "training.schedule=cosine, training.lr=0.001"
    )


def test_a_variant_that_left_the_file_keeps_its_records(tmp_path: Path) -> None:
    row = {"division": "", "variant": "one", "seed": 0, "digest": "d", "scale": "try"}
    item = items.read("toy", "try", write(tmp_path / "items"))
    kept.add(item, {**row, "variant": "three"}, tmp_path)
    kept.add(item, row, tmp_path)
    there = lines(kept.path_of(item, tmp_path))
    assert [own["variant"] for own in there] == ["one", "three"]


def test_a_missing_data_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "items", paths={"data.path": "ptb"})
    asked = ["toy", "--scale", "try", "--from", str(folder), "--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["make.py", *asked])
    with pytest.raises(SystemExit) as stopped:
        make.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"DATA={tmp_path} has no ptb, the data.path of paper item 'toy'" in said


def begun(here: Path) -> subprocess.Popen[str]:
    """The command on the toy, in a process group of its own."""
    told_ = ["toy", "--scale", "try", "--jobs", "1", "--data", str(here)]
    folders = {"from": here / "items", "runs": here / "runs", "results": here / "results"}
    told_ += [word for name, path in folders.items() for word in (f"--{name}", str(path))]
    # tests that a script began in the background are deaf to Ctrl-C, and so is what they begin
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "paper" / "make.py"), *told_],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, was)


def peopled(group: int) -> bool:
    """Whether a process group still has someone in it."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_at_once_and_loses_nothing(tmp_path: Path) -> None:
    held = ITEM["overrides"]
    long = {**held, "federation": {"rounds": 240}}
    tuning = {"seed": 7, "trials": [{}]}
    changes = {"seeds": [0], "variants": {"one": {}}, "overrides": long, "tuning": tuning}
    write(tmp_path / "items", **changes)
    process = begun(tmp_path)
    record = tmp_path / "results" / "toy-try.jsonl"
    ends = time.monotonic() + 240

    def rounds() -> list[int]:
        logs = sorted((tmp_path / "runs").glob("toy-try-one__seed_0-*/rounds.jsonl"))
        return [len(lines(log)) for log in logs]

    while not (record.exists() and any(count > 2 for count in rounds())):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    stopped = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - stopped < 20
    assert process.returncode == 130
    assert said == "paper: stopped; the same command goes on\n"
    (before,) = lines(record)
    (count,) = rounds()
    assert 2 < count < 240
    while peopled(process.pid) and time.monotonic() < stopped + 20:
        time.sleep(0.1)
    assert not peopled(process.pid)  # whoever it began is gone too
    again = begun(tmp_path)
    assert again.communicate(timeout=240)[1] == ""
    assert again.returncode == 0
    case, trial = lines(record)
    assert trial == before
    assert case["way"][-1][0] == 240


@pytest.mark.parametrize(("name", "scale"), [*items.list_shown()])
def test_an_items_file_says_what_can_be_run(name: str, scale: str) -> None:
    item = items.read(name, scale)
    assert item["table"] in views.VIEWS
    assert item.get("figure", "curve") in figures.VIEWS
    # equal chances for all: as many trials, of a seed that no claim uses
    assert {case.seed for case in items.trials(item)} <= {11}
    assert json.dumps([items.digest(item, case) for case in items.cases(item, {})])
    figure = figures.path_of(item)
    try:
        rows = kept.read_whole(item)
        drawn = figures.draw_figure(item, rows) if "figure" in item else ""
    except FileNotFoundError:
        pytest.skip("not measured yet")
    # by the same matplotlib
    if drawn and drawn.splitlines()[:1] == figure.read_text().splitlines()[:1]:
        assert drawn == figure.read_text()
