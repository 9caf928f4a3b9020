"""What `fedgen plan` says of a training step, beside what it takes: seconds, and bytes at most.

    python benchmarks/planned.py --data ../shared/data --out benchmarks/results/planned-2-cores.json

First this machine is calibrated, as `fedgen plan --calibrate` does; none of the models timed here
is one that it times. Then, for each model and each type of arithmetic, the same step is counted
without values, and done with random ones. Bytes are those by which a fresh process grows while it
trains (`tests/planning/grown.py`), beside the frozen weights.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fedgen_edge.config import Backbone, from_table
from fedgen_edge.hardware import describe_hardware
from fedgen_edge.planning.memory import StepPlan, count_training_step
from fedgen_edge.planning.speed import Speed, calibrate, time_step
from fedgen_edge.tasks.language.config_only import load_config

GROWN = Path(__file__).parent.parent / "tests" / "planning" / "grown.py"
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
WORKS = {
    "stories260K": (StepPlan(4, 64), StepPlan(8, 512)),
    "gpt2": (StepPlan(4, 64), StepPlan(2, 512)),
    "SmolLM2-135M": (StepPlan(4, 64), StepPlan(2, 512)),
}
"""Of each model, the step that is timed, and the larger one whose bytes are taken."""
CPU = torch.device("cpu")
SETTINGS = from_table({"adapter": {"rank": 4}})  # as grown.py trains


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder with stories260K in it")
    parser.add_argument("--out", type=Path, required=True)
    told = parser.parse_args()
    load = os.getloadavg()[0]
    speeds = {name: calibrate(SETTINGS, dtype, CPU) for name, dtype in TYPES.items()}
    found = {}
    for name in WORKS:
        path = str(told.data / name) if (told.data / name).is_dir() else name
        config = load_config(Backbone(path=path))
        found[name] = {kind: beside(name, config, kind, speed) for kind, speed in speeds.items()}
    result = {
        "hardware": describe_hardware(CPU),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": load,
        "models": found,
    }
    told.out.write_text(json.dumps(result, indent=1) + "\n")


def beside(name: str, config: Any, kind: str, speed: Speed) -> dict[str, Any]:
    """What is said, and what is so."""
    timed, weighed = WORKS[name]
    said = speed.estimate_seconds(count_training_step(SETTINGS, config, timed, TYPES[kind]).cost)
    so = time_step(SETTINGS, config, timed, TYPES[kind], CPU)
    grows = count_training_step(SETTINGS, config, weighed, TYPES[kind]).peak
    grown = growth(config, weighed, kind)
    return {
        "rows": timed.rows,
        "length": timed.length,
        "seconds_said": round(said, 5),
        "seconds": round(so, 5),
        "rows_for_bytes": weighed.rows,
        "length_for_bytes": weighed.length,
        "bytes_said": round(grows),
        "bytes": grown,
    }


def growth(config: Any, work: StepPlan, kind: str) -> int:
    """Bytes by which a fresh process grows, whose allocator gives back what is freed."""
    command = [sys.executable, str(GROWN), str(work.rows), str(work.length), "0", "0", kind]
    steady = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command,
        input=config.to_json_string(use_diff=False),
        env={**os.environ, **steady},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


if __name__ == "__main__":
    main()
