"""Train generative models where the data is: federated LoRA adapters, one for every client.

The names below are the public ones; each is loaded when it is first used, so that importing the
package costs nothing.

Where torch is imported after it, torch's threads sleep while they wait for one another. By default
they spin: beside another busy program each operation then lasts until the scheduler interrupts
them, and a run takes ten times as long. OMP_WAIT_POLICY and GOMP_SPINCOUNT of the user's stand.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgen_edge.algorithms.algorithm import Algorithm
    from fedgen_edge.algorithms.methods import METHODS
    from fedgen_edge.config import Settings, from_table, load
    from fedgen_edge.errors import FedGenError
    from fedgen_edge.runs.build import Experiment, build
    from fedgen_edge.tasks.task import TASKS, Task

if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "algorithms.methods",
    "TASKS": "tasks.task",
    "Algorithm": "algorithms.algorithm",
    "Experiment": "runs.build",
    "FedGenError": "errors",
    "Settings": "config",
    "Task": "tasks.task",
    "build": "runs.build",
    "from_table": "config",
    "load": "config",
}

__all__ = [
    "METHODS",
    "TASKS",
    "Algorithm",
    "Experiment",
    "FedGenError",
    "Settings",
    "Task",
    "build",
    "from_table",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"fedgen_edge has no public name {name!r}")
    return getattr(import_module(f"fedgen_edge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
