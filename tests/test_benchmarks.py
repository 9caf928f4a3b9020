"""Benchmarks are not run here, but their parts are: one that cannot start measures nothing."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "benchmarks"


def told(script: str, *arguments: str) -> str:
    """What the script says."""
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    return done.stdout


def test_every_case_of_speed_is_timed_in_turn_and_its_memory_measured() -> None:
    few = ["--backbone", "tiny", "--clients", "2", "--rows", "1", "--repeats", "2"]
    found = json.loads(told("speed.py", *few, "--seconds", "0.01"))
    assert len(found["peak_megabytes"]) == 4
    assert all(100 < peak < 3000 for peak in found["peak_megabytes"].values())  # torch is above it
    assert all(len(runs) == 2 and min(runs) > 0 for runs in found["all_runs"].values())


def test_peak_memory_of_a_whole_run_is_measured() -> None:
    found = int(told("memory.py", "--backbone", "tiny", "--clients", "10").split()[-1])
    assert 100e6 < found < 3e9
