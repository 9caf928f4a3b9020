"""Estimate the seconds of a training step on this machine, by timing small models.

    seconds = operations * a + products * b + flops * c + bytes read and written * d,

with nonnegative factors: the cost to call an operation, to start a matrix product, to multiply, and
to access memory. They are fitted to timed steps by least squares of the relative error.
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
from fedgen_edge.algorithms.methods import make_algorithm
from fedgen_edge.config import Settings
from fedgen_edge.federation.client import descend
from fedgen_edge.hardware import describe_hardware, steady_allocations
from fedgen_edge.planning.count import OperationCost
from fedgen_edge.planning.memory import (
    StepPlan,
    count_training_step,
    make_blank_batch,
    make_client_start,
    make_recipe,
)
from fedgen_edge.tasks.backbones.pretrained import get_cache_folder
from fedgen_edge.tasks.language.config_only import build_from_config, make_config
from fedgen_edge.tasks.language.families import ConfigValues


class Trial(NamedTuple):
    """A small model, and the step that is timed."""

    width: int
    layers: int
    vocabulary: int
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
"""From models dominated by calls to models dominated by arithmetic."""
TIMED_STEPS = 5
"""Timed steps of a trial, after one warm-up step; the shortest counts."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine is."""

    per_op: float
    """Seconds per operation."""
    per_product: float
    """Additional seconds per matrix product."""
    per_flop: float
    """Seconds per floating-point operation of a matrix product."""
    per_byte: float
    """Seconds per byte that operations read or write."""
    source: str
    """Where the speed comes from, in words."""

    def estimate_seconds(self, cost: OperationCost) -> float:
        """Estimate the seconds of a step."""
        factors = (self.per_op, self.per_product, self.per_flop, self.per_byte)
        return float(np.dot(factors, astuple(cost)))


def fit_speed(costs: Sequence[OperationCost], seconds: Sequence[float], source: str) -> Speed:
    """Fit the speed to these times, by least squares of the relative error."""
    measured = np.array(seconds, dtype=np.float64)
    relative_costs = np.array([astuple(cost) for cost in costs]) / measured[:, None]
    scales = relative_costs.max(0, initial=1e-30)  # the counts differ by orders of magnitude
    regression = LinearRegression(positive=True, fit_intercept=False)
    regression.fit(relative_costs / scales, np.ones(len(measured)))
    per_op, per_product, per_flop, per_byte = (float(v) for v in regression.coef_ / scales)
    return Speed(per_op, per_product, per_flop, per_byte, source)


def calibrate(settings: Settings, dtype: torch.dtype, device: torch.device) -> Speed:
    """Time a step of each trial, within a minute, and save the fitted speed.

    Args:
        settings: settings of a run, whose optimizer and threads are used.
        dtype: type of the arithmetic.
        device: the device to measure.
    """
    steady_allocations()
    costs, seconds = [], []
    for trial in TRIALS:
        config, step_plan = (
            make_config(_make_config_values(trial)),
            StepPlan(trial.rows, trial.length),
        )
        costs.append(count_training_step(settings, config, step_plan, dtype).cost)
        seconds.append(time_step(settings, config, step_plan, dtype, device))
    speed = fit_speed(costs, seconds, f"calibrated on {describe_hardware(device)}")
    files.write(_get_cache_path(dtype, device), json.dumps(asdict(speed)).encode())
    return speed


def load_speed(dtype: torch.dtype, device: torch.device) -> Speed | None:
    """Load the last calibration of this machine; None if there is none."""
    path = _get_cache_path(dtype, device)
    try:
        return TypeAdapter(Speed).validate_python(files.parse(path.read_bytes(), json.loads))
    except (OSError, ValueError):
        return None


def _get_cache_path(dtype: torch.dtype, device: torch.device) -> Path:
    """Return the path, named by everything that a step's time is known to depend on."""
    cache_key = (
        describe_hardware(device),
        str(device),
        str(dtype),
        torch.__version__,
        torch.get_num_threads(),
    )
    return (
        get_cache_folder() / f"speed-{sha256(json.dumps(cache_key).encode()).hexdigest()[:16]}.json"
    )


def time_step(
    settings: Settings, config: Any, step_plan: StepPlan, dtype: torch.dtype, device: torch.device
) -> float:
    """Time a real step of a model with random weights: the shortest of several."""
    algorithm = make_algorithm(settings.method, adapter=settings.adapter)
    with torch.device(device):
        task = build_from_config(config, settings.adapter, dtype, full=algorithm.adapts == "full")
        start, correction_state = make_client_start(algorithm, task, step_plan)
        batch = make_blank_batch(step_plan)
    recipe = make_recipe(settings, algorithm, start, algorithm.corrects, [])
    durations, steps = (
        [],
        descend(task, start, correction_state, [batch] * (1 + TIMED_STEPS), recipe),
    )
    for _ in range(1 + TIMED_STEPS):
        start_time = time.perf_counter()
        next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start_time)
    return min(durations[1:])  # other load only makes a step longer


def _make_config_values(trial: Trial) -> ConfigValues:
    return {
        "model_type": "llama",
        "hidden_size": trial.width,
        "intermediate_size": 3 * trial.width,
        "num_hidden_layers": trial.layers,
        "num_attention_heads": max(1, trial.width // 32),
        "num_key_value_heads": max(1, trial.width // 32),
        "vocab_size": trial.vocabulary,
        "max_position_embeddings": trial.length,
        "tie_word_embeddings": True,
    }
