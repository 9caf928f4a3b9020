import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import Line
from fedgen_edge import cli, machine
from fedgen_edge.seeds import generator


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({4: 1.0, 2: 0.9}, 4),  # a tenth is not clear
        ({4: 1.0, 2: 0.8, 1: 0.75}, 2),
        ({4: 1.0, 2: 0.5, 1: 0.3}, 1),
        ({1: 1.0}, 1),
    ],
)
def test_fewer_threads_are_taken_only_where_a_step_is_clearly_quicker(
    seconds: dict[int, float], best: int
) -> None:
    assert machine.fewest_quick(seconds.__getitem__, max(seconds)) == best


def test_a_container_s_cores_bound_the_threads_and_a_setting_does_not_ask() -> None:
    lines = "; ".join(
        (
            "import json, torch",
            "from fedgen_edge.machine import set_threads",
            "torch.set_num_threads(4)",
            "set_threads(None)",
            "bounded = torch.get_num_threads()",
            "set_threads(3)",
            "print(json.dumps([bounded, torch.get_num_threads()]))",
        )
    )
    environment = {**os.environ, "LOKY_MAX_CPU_COUNT": "1"}  # as a quota of one core
    done = subprocess.run(
        [sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [1, 3]


def test_cores_that_are_busy_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 8)
    for load, idle in ((0.0, 8), (50.0, 4), (99.0, 1)):
        monkeypatch.setattr(machine.psutil, "cpu_percent", lambda _, load=load: load)
        assert machine._idle_cores() == idle


def test_one_thread_stays_one_and_choosing_leaves_torch_as_it_was() -> None:
    task, batch = Line(), {"x": torch.ones(3), "mask": torch.ones(3, dtype=torch.bool)}
    adapter = task.init(generator(0))
    assert torch.get_num_threads() == 1
    assert machine.choose_threads(task, adapter, batch, 2) == 1
    assert machine._step_seconds(2, task, adapter, batch, 2) > 0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "5"}, None),
    ],
)
def test_threads_wait_passively_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], policy: str | None
) -> None:
    environment = {**given}
    monkeypatch.setattr(cli.os, "environ", environment)
    cli._wait_passively()
    assert environment.get("OMP_WAIT_POLICY") == policy
