"""The command: its table, its JSON, and its mistakes, each one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge.cli import main as cli

TINY = "--backbone.path tiny --federation.clients 4 --federation.rounds 2 --training.steps 2"


def says(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(["plan", *arguments.split()])
    said, complained = capsys.readouterr()
    assert complained == ""
    return said


def plan(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(says(f"{arguments} --json", capsys))


def test_a_plan_is_a_table_that_80_columns_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = says(f"{TINY} --flops 1e9 --memory 1 --devices.up 1e6 --devices.down 1e6", capsys)
    assert max(map(len, said.splitlines())) <= 80
    for words in ("26,848 parameters", "full FedAvg", "with checkpointing", "nothing breaks"):
        assert words in said


def test_the_same_is_told_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(TINY, capsys)
    keys = "model clients cohort rounds steps traffic memory step time server breaks says"
    assert [*found] == keys.split()
    assert (found["clients"], found["cohort"], found["rounds"], found["steps"]) == (4, 4, 2, 2)
    assert [*found["memory"]] == ["bf16", "int8", "int4"]
    own = found["memory"]["bf16"]
    parts = ("backbone", "adapter", "optimiser", "gradients", "activations")
    assert own["backbone"] == 2 * 26848
    assert sum(own[part] for part in parts) == pytest.approx(own["total"], abs=5)
    assert own["checkpointed"] < own["total"]


def test_time_is_arithmetic_on_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(f"{TINY} --devices.up 1000 --devices.down 2000 --flops 1e9", capsys)
    time, t = found["time"], found["traffic"]
    flops = found["step"]["cost"]["flops"]
    assert time["step"] == pytest.approx(flops / 1e9)
    assert time["train"] == pytest.approx(2 * flops / 1e9)
    assert time["down"] == pytest.approx(t["client_down"] / 2000)
    assert time["up"] == pytest.approx(t["client_up"] / 1000)
    whole = time["down"] + time["train"] + time["up"]
    assert (time["round"], time["total"]) == pytest.approx((whole, 2 * whole))
    # what is said of the devices goes before
    told = plan(f"{TINY} --flops 1e9 --devices.steps-per-second 4", capsys)["time"]
    assert (told["step"], told["train"]) == (0.25, 0.5)
    assert told["source"] == "devices.steps_per_second"


def test_steps_are_counted_from_examples(capsys: pytest.CaptureFixture[str]) -> None:
    plain = TINY.removesuffix("--training.steps 2")
    assert plan(plain, capsys)["steps"] is None
    # 3 epochs of 10 blocks in batches of 4 are 3 * 3 steps
    assert plan(f"{plain} --examples 10 --training.epochs 3", capsys)["steps"] == 9


@pytest.mark.parametrize(
    ("flags", "first", "helps"),
    [
        ("--memory 0.0001", "the device's memory", "a smaller training.batch"),
        ("--memory 99", "nothing breaks", "of 99 GB"),
        ("--server-memory 0.00001", "the server's memory", "federation.cohort"),
        ("--server-link 1 --devices.up 1e4", "the server's link", "uplink.dtype"),
        ("--devices.up 1 --federation.deadline 9", "the slowest client", "uplink.dtype='int8'"),
        ("--memory 0.0001 --server-memory 1e-9", "the server's memory", "federation.cohort"),
    ],
)
def test_what_breaks_first_is_said_with_what_would_help(
    flags: str, first: str, helps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(f"{TINY} --flops 1e12 {flags}", capsys)
    assert found["says"].startswith(first)
    assert helps in found["says"]


@pytest.mark.parametrize(("precision", "advised"), [("bf16", False), ("float32", True)])
def test_no_more_is_advised_than_a_run_can_do(
    precision: str, advised: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    said = plan(f"{TINY} --backbone.precision {precision} --memory 0.0001", capsys)["says"]
    assert ("backbone.precision='bf16'" in said) == advised
    for missing in ("int8", "int4", "checkpointing"):
        assert missing not in said


MISTAKES = {
    "no such model": ("--backbone.path no-such-1B", ["backbone.path='no-such-1B'", "Llama-3.1"]),
    "pictures": ("--task vae", ["task='vae'", "language"]),
    "clients unknown": (
        "--backbone.path tiny --data.source jsonl",
        ["federation.clients", "reads no data"],
    ),
    "a block too long": (f"{TINY} --data.length 513", ["data.length=513", "above 512"]),
    "a rank too high": (f"{TINY} --adapter.rank 33", ["adapter.rank=33", "take at most 32"]),
    "no memory": (f"{TINY} --memory 0", ["--memory=0.0", "above 0"]),
    "no option": (f"{TINY} --adapter.rnak 3", ["adapter.rnak", "did you mean 'adapter.rank'"]),
    "a cohort too large": (f"{TINY} --federation.cohort 5", ["federation.cohort=5", "at most 4"]),
    "no adapter's method": (f"{TINY} --method.name fedsomething", ["method.name='fedsomething'"]),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    arguments: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *arguments.split()])
    said, complained = capsys.readouterr()
    assert (caught.value.code, said) == (2, "")
    assert re.fullmatch(r"fedgen: [^\n]+\n", complained)
    for word in words:
        assert word in complained


def test_a_broken_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 0}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit):
        cli.main(["plan", "--backbone.path", str(tmp_path)])
    assert re.fullmatch(r"fedgen: backbone.path=[^\n]+\n", capsys.readouterr().err)
