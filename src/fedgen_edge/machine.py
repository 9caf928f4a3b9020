"""What the machine at hand decides: its device, how many clients a stack holds, its memory."""

import ctypes
import os
import platform
import re
from pathlib import Path

import psutil
import torch
from torch import Tensor

from fedgen_edge.errors import ConfigError
from fedgen_edge.leaves import stack
from fedgen_edge.tasks.task import Task
from fedgen_edge.types import Batch, Leaves

CPU_TOKENS = 4096
"""Tokens in one step beyond which a CPU gains nothing from a larger stack: with as many, a round of
stories260K was 7 % quicker than with half, and one of SmolLM2 2 to 7 %."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names for them, in malloc.h."""


def device(name: str) -> torch.device:
    """The device of this name; `auto` is an accelerator where there is one.

    Raises:
        ConfigError: there is none such.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"engine.device={name!r} is not on this machine: say cpu, or auto"
        ) from None
    return found


def stack_size(task: Task, adapter: Leaves, batch: Batch) -> int:
    """Clients in one stack: what half of the free memory holds, measured on one client's batch.

    Args:
        task: whose loss is trained.
        adapter: one client's leaves, on the task's device.
        batch: one client's batch, there too.
    """
    kept = saved_bytes(task, adapter, batch, 2) - saved_bytes(task, adapter, batch, 1)
    own = sum(v.numel() * v.element_size() for v in adapter.values())
    where = batch["mask"].device
    free = (
        torch.cuda.mem_get_info(where)[0]
        if where.type == "cuda"
        else psutil.virtual_memory().available
    )
    most = free // 2 // (kept + kept // 2 + 6 * own)
    if where.type == "cpu":
        most = min(most, CPU_TOKENS // max(1, batch["mask"].numel()))
    return max(1, most)


def saved_bytes(task: Task, adapter: Leaves, batch: Batch, clients: int) -> int:
    """Bytes that the forward pass of a stack keeps for its backward pass, frozen weights too."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {k: v.requires_grad_() for k, v in stack([adapter] * clients).items()}
    plain = torch.compiler.set_stance("force_eager")  # nothing is compiled for these sizes
    with plain, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(own, stack([batch] * clients), task.phases[0].prefix)
    del loss
    return sum(seen.values())


def steady_allocations() -> None:
    """Have glibc keep freed memory instead of giving it back after each step.

    Activations of many megabytes are else mapped and unmapped, and their pages zeroed, at every
    step. Where there is no glibc, nothing happens.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        return


def give_back() -> None:
    """Have glibc return what is free now: the next stage's shapes would not fit its holes."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def peak_memory() -> int:
    """Most bytes that this process ever had in memory; 0 where the system does not say."""
    told = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", told.read_text()) if told.exists() else None
    return 1024 * int(found[1]) if found else 0


def hardware(device: torch.device) -> str:
    """The processor, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"
