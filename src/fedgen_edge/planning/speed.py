"""Seconds of a training step on this machine: timed on small models, and drawn out to others.

    seconds = operations * a + products * b + flops * c + bytes read and written * d,

with factors of nought or more: what it takes to call an operation, to begin a product of matrices,
to multiply, and to reach memory. They are fitted to steps that were timed, by least squares of the
relative error.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from sklearn.linear_model import LinearRegression

from fedgen_edge import files
from fedgen_edge.algorithms.methods import method
from fedgen_edge.client import descend
from fedgen_edge.config import Settings
from fedgen_edge.machine import hardware, steady_allocations
from fedgen_edge.planning.count import Cost
from fedgen_edge.planning.memory import Work, begun, blank, recipe_of, training_step
from fedgen_edge.tasks.backbones import cache
from fedgen_edge.tasks.families import Shape
from fedgen_edge.tasks.outline import made_of, outlined


class Trial(NamedTuple):
    """A small model, and the step that is timed."""

    width: int
    layers: int
    words: int
    rows: int
    length: int


TRIALS = (
    Trial(32, 2, 256, 4, 32),
    Trial(64, 6, 512, 4, 64),
    Trial(128, 12, 512, 2, 64),
    Trial(128, 4, 8192, 4, 128),
    Trial(256, 4, 4096, 8, 128),
    Trial(512, 4, 16384, 4, 64),
    Trial(512, 6, 32000, 2, 64),
    Trial(768, 3, 49152, 2, 128),
)
"""From what calls cost most of all to what arithmetic does."""
TIMES = 5
"""Steps of a trial that count, after one that does not; the shortest does."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine is."""

    per_op: float
    """Seconds of each operation."""
    per_product: float
    """Seconds of each product of matrices, beside those."""
    per_flop: float
    """Seconds of each floating-point operation of a product of matrices."""
    per_byte: float
    """Seconds of each byte that operations read or write."""
    source: str
    """Where this is from, in words."""

    def seconds(self, cost: Cost) -> float:
        """Of a step."""
        told = (self.per_op, self.per_product, self.per_flop, self.per_byte)
        return float(np.dot(told, astuple(cost)))


def fitted(costs: Sequence[Cost], seconds: Sequence[float], source: str) -> Speed:
    """The speed that comes nearest to these times, by its relative error."""
    found = np.array(seconds, dtype=np.float64)
    relative = np.array([astuple(cost) for cost in costs]) / found[:, None]
    size = relative.max(0, initial=1e-30)  # counts are of very unequal sizes
    line = LinearRegression(positive=True, fit_intercept=False)
    line.fit(relative / size, np.ones(len(found)))
    per_op, per_product, per_flop, per_byte = (float(v) for v in line.coef_ / size)
    return Speed(per_op, per_product, per_flop, per_byte, source)


def calibrate(settings: Settings, dtype: torch.dtype, device: torch.device) -> Speed:
    """Time a step of each trial, which takes a minute or less, and keep what it says.

    Args:
        settings: of a run, whose optimiser and threads are taken.
        dtype: of the arithmetic.
        device: that is measured.
    """
    steady_allocations()
    costs, seconds = [], []
    for trial in TRIALS:
        config, work = made_of(_shape(trial)), Work(trial.rows, trial.length)
        costs.append(training_step(settings, config, work, dtype).cost)
        seconds.append(step_seconds(settings, config, work, dtype, device))
    speed = fitted(costs, seconds, f"calibrated on {hardware(device)}")
    files.write(_kept(dtype, device), json.dumps(asdict(speed)).encode())
    return speed


def known(dtype: torch.dtype, device: torch.device) -> Speed | None:
    """What the last calibration of this machine found; none where there was none."""
    path = _kept(dtype, device)
    try:
        return TypeAdapter(Speed).validate_python(files.parse(path.read_bytes(), json.loads))
    except (OSError, ValueError):
        return None


def _kept(dtype: torch.dtype, device: torch.device) -> Path:
    """By all that steps are known to depend on."""
    of = (hardware(device), str(device), str(dtype), torch.__version__, torch.get_num_threads())
    return cache() / f"speed-{sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"


def step_seconds(
    settings: Settings, config: Any, work: Work, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds of a real step of a model with random weights: the shortest of some."""
    algorithm = method(settings.method, adapter=settings.adapter)
    with torch.device(device):
        task = outlined(config, settings.adapter, dtype, full=algorithm.adapts == "full")
        start, told = begun(algorithm, task, work)
        batch = blank(work)
    recipe = recipe_of(settings, algorithm, start, algorithm.corrects, [])
    found, steps = [], descend(task, start, told, [batch] * (1 + TIMES), recipe)
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])  # what else the machine does only lengthens one


def _shape(trial: Trial) -> Shape:
    return {
        "model_type": "llama",
        "hidden_size": trial.width,
        "intermediate_size": 3 * trial.width,
        "num_hidden_layers": trial.layers,
        "num_attention_heads": max(1, trial.width // 32),
        "num_key_value_heads": max(1, trial.width // 32),
        "vocab_size": trial.words,
        "max_position_embeddings": trial.length,
        "tie_word_embeddings": True,
    }
