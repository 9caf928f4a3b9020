import json
import os
import subprocess
import sys

import psutil
import pytest
import torch

from conftest import Line
from fedgen_edge import hardware
from fedgen_edge.config import from_table
from fedgen_edge.runs.build import build
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
    assert hardware.choose_thread_count(seconds.__getitem__, max(seconds)) == best


def test_a_container_s_cores_bound_the_threads_and_a_setting_does_not_ask() -> None:
    lines = "; ".join(
        (
            "import json, torch",
            "from fedgen_edge.hardware import set_threads",
            "from fedgen_edge import hardware",
            "torch.set_num_threads(4)",
            "hardware._idle_cores = lambda: 4",
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


def test_threads_that_were_lowered_for_one_model_are_there_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "THREADS", hardware.Threads(1))
    monkeypatch.setattr(hardware, "_idle_cores", lambda: 8)
    monkeypatch.setattr(hardware.joblib, "cpu_count", lambda: 8)
    try:
        torch.set_num_threads(4)
        hardware.set_threads(1)
        hardware.set_threads(None)
        assert torch.get_num_threads() == 4
        torch.set_num_threads(2)  # by the program that uses the package
        hardware.set_threads(None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_cores_that_are_busy_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0, 1, 3])
    for loads, idle in (([0, 0, 0, 0], 3), ([0, 100, 0, 50], 2), ([99, 99, 0, 99], 1)):
        monkeypatch.setattr(
            hardware.psutil, "cpu_percent", lambda _, percpu, loads=loads: loads if percpu else None
        )
        assert hardware._idle_cores() == idle


def test_one_thread_stays_one_and_timing_leaves_torch_as_it_was() -> None:
    task, batch = Line(), {"x": torch.ones(3), "mask": torch.ones(3, dtype=torch.bool)}
    adapter = task.init(generator(0))
    assert torch.get_num_threads() == 1
    hardware.choose_threads(task, adapter, batch, 2)
    assert hardware._step_seconds(2, task, adapter, batch, 2) > 0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("method", ["fedgen-edge", "fedavg-full"])
def test_steps_of_adapters_and_of_full_models_are_tried_with_fewer_threads(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(hardware, "THREADS", hardware.Threads(1))
    monkeypatch.setattr(hardware, "_idle_cores", lambda: 2)
    monkeypatch.setattr(hardware.joblib, "cpu_count", lambda: 2)
    tried = []
    timed = hardware._step_seconds
    monkeypatch.setattr(
        hardware, "_step_seconds", lambda n, *a, **k: tried.append(n) or timed(n, *a, **k)
    )
    table = {
        "backbone": {"path": "tiny"},
        "data": {"packages": ["json", "logging"], "length": 32},
        "method": {"name": method},
    }
    try:
        torch.set_num_threads(2)
        threads = build(from_table(table)).settings.engine.threads
        assert threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(1)
    assert tried[:2] == [2, 2]  # one client's step, then a stack's
    assert tried[2:] == [1]


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "5"}, "None"),
    ],
)
def test_threads_wait_passively_unless_the_user_says_otherwise(
    given: dict[str, str], policy: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in {"OMP_WAIT_POLICY"}} | given
    line = "import os, fedgen_edge; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run(
        [sys.executable, "-c", line], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == policy
