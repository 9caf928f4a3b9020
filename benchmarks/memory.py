"""Peak memory against the number of clients, every client's personal adapter kept.

    python benchmarks/memory.py --backbone PATH --out benchmarks/results/memory-NAME.json

Each number comes from a process of its own that does a whole run: rounds with a cohort of 10 by
FedPer, whose clients keep leaves, then personalisation of all. Every client has eight sentences.

Ten thousand take long, most of it personalisation: `--counts 10 100 1000` leaves them out.

oneDNN keeps a compiled kernel for each of up to 1,024 shapes, and stacks that are not full have
shapes of their own; ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 in the environment shows what is left
without them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fedgen_edge.config import from_table
from fedgen_edge.hardware import describe_hardware, peak_memory, steady_allocations
from fedgen_edge.runs.run import create, proceed

COUNTS = (10, 100, 1000, 10000)


def whole_run(backbone: str, clients: int) -> int:
    """Peak bytes of this process after a run of so many clients."""
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data.jsonl"
        with data.open("w") as file:
            for client in range(clients):
                for at in range(8):
                    text = f"Sentence {at} of client {client}: the dog saw a ball and ran home."
                    file.write(json.dumps({"text": text, "who": f"c{client:05d}"}) + "\n")
        table = {
            "backbone": {"path": backbone},
            "data": {"source": "jsonl", "path": str(data), "client_field": "who", "length": 32},
            "federation": {"rounds": 3, "cohort": 10},
            "method": {"name": "fedper"},
            "training": {"steps": 2, "batch": 1},
            "personal": {"epochs": 1, "steps": 2},
            "evaluation": {"every_rounds": 3, "sample_tokens": 0},
        }
        out = Path(place) / "run"
        experiment = create(from_table(table), out)
        for _ in proceed(experiment, out):
            pass
        kept = len(list((out / "adapters" / "clients").iterdir()))
    assert kept == clients
    return peak_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--clients", type=int, help="say the peak of one run of so many")
    told = parser.parse_args()
    if told.clients:
        steady_allocations()
        print(whole_run(told.backbone, told.clients))
        return
    peaks = {}
    for count in told.counts:
        command = [sys.executable, __file__, "--backbone", told.backbone, "--clients", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[str(count)] = round(int(done.stdout.split()[-1]) / 1e6)
    result = {
        "backbone": Path(told.backbone).resolve().name,
        "kernels_cached": int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")),
        "hardware": describe_hardware(torch.device("cpu")),
        "peak_megabytes": peaks,
        "most_over_fewest": round(peaks[str(told.counts[-1])] / peaks[str(told.counts[0])], 3),
    }
    print(json.dumps(result, indent=1))
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
