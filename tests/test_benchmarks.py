"""Benchmarks are not run here, but their parts are: one that cannot start measures nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "benchmarks"


def told(*arguments: str) -> int:
    """What the script says last."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("case", ["bare, one client's batch", "stacked"])
def test_peak_memory_of_a_speed_case_is_measured(case: str) -> None:
    found = told(str(ROOT / "speed.py"), "--backbone", "tiny", "--memory-of", case)
    assert 100e6 < found < 3e9  # torch alone takes more than the first


def test_peak_memory_of_a_whole_run_is_measured() -> None:
    found = told(str(ROOT / "memory.py"), "--backbone", "tiny", "--clients", "10")
    assert 100e6 < found < 3e9
