"""Whatever became of a run's files, a command does its work or says in one line what is damaged."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from conftest import sentences
from fedgen_edge.cli import main as cli
from fedgen_edge.config import Settings, from_table, load
from fedgen_edge.report.summary import read
from fedgen_edge.runs import checkpoint, records
from fedgen_edge.runs.models import find_model_folders
from fedgen_edge.runs.run import create, proceed, sum_stage_seconds
from support.damage import mistake, some

READ = (
    "settings.toml",
    "run.json",
    "clients.json",
    "rounds.jsonl",
    "baselines/local-only/rounds.jsonl",
    "personal.jsonl",
    "evaluation.jsonl",
    "samples.jsonl",
    "checkpoints/00002/manifest.json",
    "checkpoints/00002/server.safetensors",
    "adapters/global/adapter_model.safetensors",
)
"""Files of a run that commands read, but for PEFT's adapter_config.json."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that a run of text writes."""
    folder = tmp_path_factory.mktemp("damage")
    rows = [{"text": text, "who": f"client {c}"} for c in range(2) for text in sentences(8, c)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = from_table(
        {
            "backbone": {"path": "tiny", "precision": "float32"},
            "data": {"source": "jsonl", "path": str(folder / "text.jsonl"), "length": 16}
            | {"client_field": "who"},
            "federation": {"rounds": 2},
            "method": {"name": "fedper"},
            "training": {"batch": 8},
            "personal": {"epochs": 1},
            "engine": {"threads": 1},
            "evaluation": {"baselines": ["local-only"], "sample_tokens": 1, "prompts": ["One"]},
        }
    )
    for _ in proceed(create(settings, folder / "run"), folder / "run"):
        pass
    return folder / "run"


def commands(run: Path, out: Path) -> dict[str, list[str]]:
    return {
        "resume": ["resume", str(run)],
        "report": ["report", str(run), "--out", str(out / "report.html")],
        "generate": ["generate", str(run), "--prompt", "a", "--tokens", "1"],
        "export": ["export", str(run), "--out", str(out / "export")],
        "status": ["status", str(run)],
    }


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """A command's exit status, and what it says of a mistake."""
    capsys.readouterr()
    status: object = 0
    try:
        cli.main(arguments)
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize("name", READ)
def test_every_reader_takes_a_damaged_file_or_says_so_in_one_line(
    run: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    readers = (
        read,
        find_model_folders,
        sum_stage_seconds,
        checkpoint.find_latest,
        records.list_cohort_members,
        settings_of,
    )
    for content in some(copy / name, 40):
        (copy / name).write_bytes(content)
        for reader in readers:
            assert "\n" not in mistake(partial(reader, copy), content), content[:200]


def settings_of(folder: Path) -> Settings:
    return load(folder / "settings.toml")


@pytest.mark.parametrize("name", READ)
def test_every_command_on_a_damaged_run_works_or_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "run"
    for number, content in enumerate(some(run / name, 3)):
        for command, arguments in commands(copy, tmp_path / f"out{number}").items():
            if number and command in {"resume", "report"}:  # the slower ones
                continue
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy)
            (copy / name).write_bytes(content)
            status, said = outcome(arguments, capsys)
            assert status in {0, 2}, (command, content[:200])
            if status:
                assert said.startswith("fedgen: "), (command, content[:200])
                assert said.count("\n") == 1, (command, content[:200])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rounds.jsonl", b"\xff\n", "rounds.jsonl, line 1, is cut short or altered: 'utf-8'"),
        ("rounds.jsonl", b"[]\n", "rounds.jsonl, line 1, is altered: it is []"),
        ("rounds.jsonl", b'{"round": 1}\n', "rounds.jsonl, line 1, is altered: it has no 'cohort'"),
        ("run.json", b"[" * 5000, "run.json is cut short or altered: it is nested too deep"),
        ("run.json", b'{"a":' * 60 + b"1" + b"}" * 60, "run.json is cut short or altered: it is "),
        ("clients.json", b'[{"client": 3}]', "clients.json is altered: 0.client is 3: "),
        ("samples.jsonl", b'{"model"', "samples.jsonl is cut short in line 1: restore it"),
        ("settings.toml", b"a = " + b"9" * 5000, "whole number in it has thousands of digits"),
    ],
)
def test_the_line_names_the_file_the_place_and_the_field(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    told: str,
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / name).write_bytes(content)
    status, said = outcome(["report", str(copy)], capsys)
    assert status == 2
    assert said.startswith(f"fedgen: {copy / name}")
    assert told in said
