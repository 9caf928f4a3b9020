"""How many bytes a process grows by, at most, while a model that standard input names trains."""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import torch

from fedgen_edge.algorithms.methods import make_algorithm
from fedgen_edge.config import Settings, from_table
from fedgen_edge.federation.client import descend
from fedgen_edge.planning.memory import StepPlan, make_blank_batch, make_client_start, make_recipe
from fedgen_edge.tasks.language.config_only import (
    build_from_config,
    enable_checkpointing,
    make_config,
)
from fedgen_edge.tasks.language.task import Language


def held(key: str) -> int:
    told = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert told
    return 1024 * int(told[1])


def train(settings: Settings, task: Language, work: StepPlan) -> None:
    algorithm = make_algorithm(settings.method)
    start, told = make_client_start(algorithm, task, work)
    recipe = make_recipe(settings, algorithm, start, algorithm.corrects, [])
    for _ in descend(task, start, told, [make_blank_batch(work)] * 2, recipe):
        pass


def main(rows: int, length: int, clients: int, again: int, kind: str = "float32") -> int:
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    settings = from_table({"adapter": {"rank": 4}})
    task = build_from_config(make_config(json.load(sys.stdin)), settings.adapter, dtype)
    task = enable_checkpointing(task) if again else task
    train(settings, task, StepPlan(1, 8, min(clients, 1), bool(again)))  # what libraries keep
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    train(settings, task, StepPlan(rows, length, clients, bool(again)))
    return held("VmHWM") - before


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:5]), *sys.argv[5:]))
