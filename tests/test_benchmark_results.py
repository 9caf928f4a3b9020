"""What committed results of benchmarks say agrees with the runs that they hold."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent / "benchmarks"
SPEEDS = sorted((ROOT / "results").glob("speed-*.json"))
COMPILED = sorted((ROOT / "results").glob("compiled-*.json"))
PEAKS = sorted((ROOT / "results").glob("peak-*.json"))
SIMULATORS = sorted((ROOT / "results").glob("simulators-*.json"))
OVERHEADS = sorted((ROOT / "results").glob("overhead-*.json"))
BUSY = sorted((ROOT / "results").glob("busy-*.json"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


@pytest.mark.parametrize("path", SPEEDS, ids=lambda p: p.stem)
def test_speeds_are_medians_of_runs_in_turn(path: Path) -> None:
    told = read(path)
    runs = told["all_runs"]
    for name, each in runs.items():
        assert told["tokens_per_second"][name] == pytest.approx(statistics.median(each), abs=0.1)
    pairs = zip(runs["stacked"], runs["bare, the total batch"], strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    assert told["stacked_over_bare_same_total_batch"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("path", COMPILED, ids=lambda p: p.stem)
def test_what_compiling_brings_is_the_median_of_pairs(path: Path) -> None:
    told = read(path)
    runs = told["all_runs"]
    for name, each in runs.items():
        found = told["tokens_per_processor_second"][name]
        assert found == pytest.approx(statistics.median(each), abs=0.1)
    pairs = zip(runs["compiled"], runs["stacked"], strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    assert told["compiled_over_stacked"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("path", PEAKS, ids=lambda p: p.stem)
def test_the_share_of_the_peak_is_of_four_flops_a_weight_and_token(path: Path) -> None:
    told = read(path)
    shares = [4 * told["weights"] * rate / (most * 1e9) for rate, most in told["all_runs"]]
    assert told["share_of_peak"] == pytest.approx(statistics.median(shares), abs=2e-3)
    assert sum(told["time_by_kind"].values()) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("path", SIMULATORS, ids=lambda p: p.stem)
def test_simulators_compare_medians_and_learn_alike(path: Path) -> None:
    told = read(path)
    for name, runs in told["all_runs"].items():
        assert told["seconds"][name] == pytest.approx(
            statistics.median(run["seconds"] for run in runs), abs=1e-3
        )
    ours = told["seconds"]["fedgen run"]
    actors = [told["seconds"][f"Flower, {how}"] for how in ("an actor a core", "one actor")]
    assert told["flower_over_ours"] == pytest.approx(min(actors) / ours, abs=0.01)
    # a side that did not learn would be quick for nothing
    best = min(told["perplexity"].values())
    assert all(best <= found < 1.1 * best for found in told["perplexity"].values())
    assert best < 0.9 * told["perplexity_of_backbone"]


@pytest.mark.parametrize("path", OVERHEADS, ids=lambda p: p.stem)
def test_overhead_is_of_64_clients_of_50_steps_and_a_million_values(path: Path) -> None:
    told = read(path)
    assert told["clients"] == 64
    assert told["steps"] >= 50
    assert 0.9e6 < told["values"] < 1.1e6
    assert told["overhead"] == pytest.approx(statistics.median(told["of_each_round"]), abs=1e-4)


def test_overhead_is_what_is_neither_training_nor_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overhead = program("overhead", monkeypatch)
    rest = dict.fromkeys(overhead.PARTS, 0.0) | {"other": 0.0}
    first = rest | {"training": 1.0, "checkpoint": 99.0}  # the first round does not count
    second = rest | {"training": 9.0, "checkpoint": 0.75, "other": 0.25, "validation": 5.0}
    assert overhead.summary([first, second])["overhead"] == pytest.approx(0.1)


def test_every_part_of_a_round_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    overhead = program("overhead", monkeypatch)
    monkeypatch.setattr(overhead, "CLIENTS", 3)
    found = overhead.measured(tmp_path, rank=2, size=16, count=2, steps=2)
    assert len(found["rounds"]) == 2
    assert all(seconds > 0 for spent in found["rounds"] for seconds in spent.values())
    # 4 layers of q, k, v, o (16 to 16), gate and up (16 to 32), down (32 to 16), rank 2
    assert found["values"] == 4 * 2 * (4 * 32 + 3 * 48)


def test_others_are_given_what_fedgen_run_trains_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from fedgen_edge.config import from_table
    from fedgen_edge.runs.build import build

    simulators = program("simulators", monkeypatch)
    data = {"packages": ["json", "logging"], "length": 16}
    experiment = build(from_table({"backbone": {"path": "tiny"}, "data": data}))
    simulators.lay(experiment, tmp_path)
    tokens = load_file(tmp_path / "blocks.safetensors")
    assert [*tokens] == ["0", "1"]
    assert tokens["1"].equal(experiment.clients.shards[1].train["tokens"])
    told = json.loads((tmp_path / "given.json").read_text())
    assert (told["clients"], told["cohort"], told["batch"]) == (2, 2, 4)
    assert told["bf16"] == (experiment.settings.backbone.precision == "bf16")


def test_of_flowers_ways_the_quicker_one_counts_that_keeps_the_backbone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulators = program("simulators", monkeypatch)
    others = zip(simulators.WAYS, (60.0, 50.0, 20.0, 30.0), strict=True)
    seconds = [(simulators.OURS, 10.0), (simulators.LIBRARY, 5.0), *others]
    runs = {name: [{"seconds": s, "rounds": s, "perplexity": 9.0}] for name, s in seconds}
    found = simulators.summary(runs)
    assert (found["flower_over_ours"], found["blaze_over_ours"]) == (5.0, 3.0)
    assert (found["flower_over_library"], found["blaze_over_library"]) == (10.0, 6.0)


@pytest.mark.parametrize("path", BUSY, ids=lambda p: p.stem)
def test_the_default_number_of_threads_is_near_the_best(path: Path) -> None:
    told = read(path)
    for name, every in told["all_runs"].items():
        medians = {
            way: statistics.median(run["seconds"] for run in runs) for way, runs in every.items()
        }
        assert told[name]["seconds"] == pytest.approx(medians)
        fixed = min(seconds for way, seconds in medians.items() if way != "default")
        assert told[name]["default_over_best"] == pytest.approx(
            medians["default"] / fixed, abs=1e-3
        )
        assert medians["default"] <= 1.3 * fixed
