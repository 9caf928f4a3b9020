"""What does this machine decide? The device, the threads, the clients in a stack, the memory."""

import ctypes
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import joblib
import psutil
import torch
from torch import Tensor

from fedgen_edge.errors import ConfigError
from fedgen_edge.leaves import stack
from fedgen_edge.tasks.task import Task
from fedgen_edge.types import Batch, Leaves

CPU_TOKENS = 4096
"""Tokens in one step beyond which a CPU gains nothing from a larger stack: compared with half as
many, a round of stories260K was 7 % quicker, and one of SmolLM2 2 to 7 %."""
LARGE_STEP = 0.2
"""A step that takes more seconds than this gives every thread enough to do."""
SPEEDUP_THRESHOLD = 0.85
"""Fewer threads are preferred if a step takes less than this fraction of its time with more."""
LOAD_SAMPLE = 0.3
"""Seconds over which the load of other programs is measured."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, from malloc.h."""


def device(name: str) -> torch.device:
    """Return the device of this name; `auto` means an accelerator if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch_device = torch.device(name)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"engine.device={name!r} is not on this machine: say cpu, or auto"
        ) from None
    return torch_device


@dataclass
class Threads:
    """The number of torch's threads: the default, and the last number set here."""

    default: int
    """The number set by torch, OMP_NUM_THREADS or the program that uses this package."""
    last_set: int | None = None
    """The number set here most recently."""

    def set(self, number: int) -> None:
        """Make torch compute with this many threads."""
        torch.set_num_threads(number)
        self.last_set = number

    def get_default(self) -> int:
        """Return the number that applied before anything was set here."""
        if (now := torch.get_num_threads()) != self.last_set:
            self.default = now
        return self.default


THREADS = Threads(torch.get_num_threads())


def set_threads(number: int | None) -> None:
    """Make torch compute with this many threads; None means every available core.

    Available are the cores that the process's affinity and its container's quota allow, less those
    that other programs keep busy now.
    """
    max_threads = min(THREADS.get_default(), joblib.cpu_count())
    THREADS.set(number or (min(max_threads, _idle_cores()) if max_threads > 1 else max_threads))


def choose_threads(task: Task, adapter: Leaves, batch: Batch, clients: int | None) -> None:
    """Make torch compute with as many threads as training benefits from, and no more than now.

    The number is halved as long as a step gets clearly quicker: in small models, threads that wait
    for each other at every operation lose what they gain in it. A large step is not timed: it
    keeps every thread busy.

    Args:
        task: whose loss is trained.
        adapter: one client's leaves, on the task's device.
        batch: one client's batch, there too.
        clients: number of clients in one step; None for a task that cannot be stacked.
    """
    max_threads = torch.get_num_threads()
    if max_threads == 1 or batch["mask"].device.type != "cpu":
        return
    unstacked = None if clients is None else 1
    if _step_seconds(max_threads, task, adapter, batch, unstacked) * (clients or 1) < LARGE_STEP:
        step = partial(_step_seconds, task=task, adapter=adapter, batch=batch, clients=clients)
        THREADS.set(choose_thread_count(step, max_threads))


def choose_thread_count(seconds: Callable[[int], float], max_threads: int) -> int:
    """Halve the number of threads as long as a step gets clearly quicker."""
    best, best_seconds = max_threads, seconds(max_threads)
    while best > 1 and (fewer_seconds := seconds(best // 2)) < SPEEDUP_THRESHOLD * best_seconds:
        best, best_seconds = best // 2, fewer_seconds
    return best


def _idle_cores() -> int:
    """Count the cores in this process's affinity that no other program uses now; at least one."""
    loads = psutil.cpu_percent(LOAD_SAMPLE, percpu=True)
    process = psutil.Process()
    cores = process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(len(loads))
    return max(1, round(sum(1 - loads[core] / 100 for core in cores or () if core < len(loads))))


def _step_seconds(
    threads: int, task: Task, adapter: Leaves, batch: Batch, clients: int | None
) -> float:
    """Return the seconds of a forward and backward pass with this many threads: the best of three.

    The first pass, which also starts the threads, counts only if the step is large.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = _timed_step(task, adapter, batch, clients)
        if first > 2 * LARGE_STEP:
            return first
        return min(_timed_step(task, adapter, batch, clients) for _ in range(3))
    finally:
        torch.set_num_threads(before)


def _timed_step(task: Task, adapter: Leaves, batch: Batch, clients: int | None) -> float:
    start_time = time.perf_counter()
    if clients is not None:
        adapter, batch = stack([adapter] * clients), stack([batch] * clients)
    leaves = {k: v.detach().requires_grad_() for k, v in adapter.items()}
    with torch.compiler.set_stance("force_eager"):
        loss = task.loss(leaves, batch, task.phases[0].prefix)
        torch.autograd.grad(loss.total.sum(), [*leaves.values()], allow_unused=True)
    return time.perf_counter() - start_time


def stack_size(task: Task, adapter: Leaves, batch: Batch) -> int:
    """Count the clients whose stack fits in half of the free memory, measured on one batch.

    Args:
        task: whose loss is trained.
        adapter: one client's leaves, on the task's device.
        batch: one client's batch, there too.
    """
    bytes_per_client = saved_bytes(task, adapter, batch, 2) - saved_bytes(task, adapter, batch, 1)
    adapter_bytes = sum(v.numel() * v.element_size() for v in adapter.values())
    batch_device = batch["mask"].device
    free = (
        torch.cuda.mem_get_info(batch_device)[0]
        if batch_device.type == "cuda"
        else psutil.virtual_memory().available
    )
    max_clients = free // 2 // (bytes_per_client + bytes_per_client // 2 + 6 * adapter_bytes)
    if batch_device.type == "cpu":
        max_clients = min(max_clients, CPU_TOKENS // max(1, batch["mask"].numel()))
    return max(1, max_clients)


def saved_bytes(task: Task, adapter: Leaves, batch: Batch, clients: int) -> int:
    """Count the bytes that a stack's forward pass saves for backward, frozen weights included."""
    storage_bytes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storage_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    stacked = {k: v.requires_grad_() for k, v in stack([adapter] * clients).items()}
    eager = torch.compiler.set_stance("force_eager")  # nothing is compiled for these sizes
    with eager, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(stacked, stack([batch] * clients), task.phases[0].prefix)
    del loss
    return sum(storage_bytes.values())


def steady_allocations() -> None:
    """Make glibc keep freed memory instead of returning it to the system after each step.

    Otherwise activations of many megabytes are mapped and unmapped, and their pages zeroed, at
    every step. Without glibc, this does nothing.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        return


def trim_memory() -> None:
    """Make glibc return free memory: the next stage's tensors would not fit into its holes."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def peak_memory() -> int:
    """Return the process's peak memory in bytes; 0 if the system does not report it."""
    status_file = Path("/proc/self/status")
    match = (
        re.search(r"VmHWM:\s+(\d+) kB", status_file.read_text()) if status_file.exists() else None
    )
    return 1024 * int(match[1]) if match else 0


def describe_hardware(device: torch.device) -> str:
    """Describe the processor in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"
