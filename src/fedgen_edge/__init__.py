"""Train generative models where the data is: federated LoRA adapters, one for every client.

The names below are the public ones; each is loaded when it is first used, so that importing the
package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgen_edge.algorithms.algorithm import Algorithm
    from fedgen_edge.algorithms.methods import METHODS
    from fedgen_edge.config import Settings, from_table, load
    from fedgen_edge.errors import FedGenError
    from fedgen_edge.experiments.build import Experiment, build
    from fedgen_edge.tasks.task import TASKS, Task

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "algorithms.methods",
    "TASKS": "tasks.task",
    "Algorithm": "algorithms.algorithm",
    "Experiment": "experiments.build",
    "FedGenError": "errors",
    "Settings": "config",
    "Task": "tasks.task",
    "build": "experiments.build",
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
