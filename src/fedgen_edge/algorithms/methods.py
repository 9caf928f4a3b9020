"""The catalogue: from the name in a paper's table to an algorithm.

To add a method: a function in its slot's file, a line here, a known-answer test, and a row in
docs/methods.md, which a test holds equal to this table.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.correct import proximal
from fedgen_edge.algorithms.merge import by_agreement
from fedgen_edge.algorithms.share import all_but_last, all_together, nothing
from fedgen_edge.config import Method
from fedgen_edge.errors import ConfigError


class Entry(NamedTuple):
    """A method, and what its row in the catalogue says."""

    about: str
    make: Callable[[Method], Algorithm]


METHODS: dict[str, Entry] = {
    "fedgen-edge": Entry(
        "FedAvg of LoRA adapters, the backbone frozen (arXiv:2511.11585)", lambda _: Algorithm()
    ),
    "fedavg-full": Entry(
        "FedAvg of every weight (arXiv:1602.05629)", lambda _: Algorithm(adapts="full")
    ),
    "fedper": Entry(
        "the last layers' adapters stay at the client (arXiv:1912.00818)",
        lambda m: Algorithm(sends=all_but_last(m.personal_layers)),
    ),
    "fedprox": Entry(
        "each local step is pulled towards the received adapter (arXiv:1812.06127)",
        lambda m: Algorithm(corrects=proximal(m.mu)),
    ),
    "layerwise": Entry(
        "each layer's mean weighs a client by how well it agrees (after L-DAWA, arXiv:2307.07393)",
        lambda _: Algorithm(merges=by_agreement),
    ),
    "local-only": Entry(
        "nothing is shared: every client trains alone", lambda _: Algorithm(sends=nothing)
    ),
    "centralised": Entry(
        "one learner meets every client's batches: what federation gives up",
        lambda _: Algorithm(groups=all_together),
    ),
}


def method(settings: Method, setting: str = "method.name") -> Algorithm:
    """The algorithm of these settings.

    Args:
        settings: its name and parameters.
        setting: where the name was given, for the error.

    Raises:
        ConfigError: no method has this name.
    """
    if settings.name not in METHODS:
        near = difflib.get_close_matches(settings.name, METHODS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{setting}={settings.name!r} is not known: did you mean {near!r}? "
            f"There are {', '.join(METHODS)}"
        )
    return METHODS[settings.name].make(settings)
