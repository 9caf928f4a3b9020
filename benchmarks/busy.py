"""What another busy program costs a run, and whether the threads that are chosen were the best.

    python benchmarks/busy.py --out benchmarks/results/busy-NAME.json

`fedgen run` with two rounds of the quickstart, once with nothing else on the machine and once
beside a loop that keeps one core busy: with the threads that the command chooses, and with each
fixed number from one to all cores. Runs alternate, so that a drift of the machine meets all of
them. Seconds are of the whole command; a first run, not counted, fills caches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from fedgen_edge.hardware import describe_hardware

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
SHORTER = ["--federation.rounds", "2", "--personal.epochs", "0", "--evaluation.sample_tokens", "0"]


@contextmanager
def keep_a_core_busy(busy: bool) -> Iterator[None]:
    """A loop in a process of its own, or nothing."""
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        try:
            yield
        finally:
            loop.kill()


def time_run(threads: int | None) -> dict[str, float]:
    """Seconds of one command, and the threads that it ran with."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        fixed = [] if threads is None else ["--engine.threads", str(threads)]
        command = [sys.executable, "-m", "fedgen_edge", "run", str(RECIPE), "--out", str(out)]
        began = time.perf_counter()
        subprocess.run(
            [*command, *SHORTER, "--evaluation.baselines", *fixed], check=True, capture_output=True
        )
        seconds = time.perf_counter() - began
        return {
            "seconds": round(seconds, 1),
            "threads": json.loads((out / "run.json").read_text())["threads"],
        }


def measure(cores: int, repeats: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Every run, by what else the machine does and the threads asked for."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    time_run(None)
    for name in ("idle", "busy"):
        asked = {"default": None, **{str(n): n for n in range(1, cores + 1)}}
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in asked}
        with keep_a_core_busy(name == "busy"):
            for _ in range(repeats):
                for way, threads in asked.items():
                    runs[way].append(time_run(threads))
                    print(name, way, runs[way][-1], flush=True)
        found[name] = runs
    return found


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the default's over the best fixed number's."""
    medians = {
        way: statistics.median(run["seconds"] for run in every) for way, every in runs.items()
    }
    fixed = min(seconds for way, seconds in medians.items() if way != "default")
    return {"seconds": medians, "default_over_best": round(medians["default"] / fixed, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    before = round(os.getloadavg()[0], 1)
    runs = measure(cores, told.repeats)
    result = {
        "hardware": describe_hardware(torch.device("cpu")),
        "torch": version("torch"),
        "load_before": before,
        "rounds": 2,
        **{name: summarize(every) for name, every in runs.items()},
        "all_runs": runs,
    }
    print(json.dumps(result, indent=1))
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
