"""What sites say in numbers, judged before anything is made of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedgen_edge.deploy.roll import COUNTS
from fedgen_edge.engines.gate import numbers, taken, weighed
from fedgen_edge.engines.payload import shown
from fedgen_edge.errors import RefusedError
from fedgen_edge.experiments.build import Sums

LONGEST = 10_000
"""Epochs that a site tunes, at most."""


def entry(said: Mapping[str, Any], largest: int, before: int | None) -> tuple[int, dict[str, int]]:
    """Training examples of a site that joins, and its other counts.

    Args:
        said: by the site.
        largest: training examples that it may have.
        before: training examples that it had when it joined before.

    Raises:
        RefusedError: they are none, or have changed.
    """
    weight = weighed(said.get("weight"), largest)
    counts = numbers({k: said.get(k) for k in COUNTS}, (), COUNTS)
    if before not in {None, weight}:
        raise RefusedError("bad-weight", f"it has {weight} training examples, had {before}")
    return weight, {k: int(v) for k, v in counts.items()}


def sums(said: object, counts: Sequence[str]) -> Sums:
    """Held-out sums: a total loss, and what it is a sum over.

    Args:
        said: by the site.
        counts: what the task counts; `count` is one.

    Raises:
        RefusedError: they are others, or of nothing.
    """
    found = numbers(said if isinstance(said, dict) else {}, ("total",), counts)
    if found["count"] < 1:
        raise RefusedError("bad-numbers", "nothing was held out")
    return found


def tuned(said: Mapping[str, Any], counts: Sequence[str], clusters: int = 0) -> dict[str, Any]:
    """What a site says of its own adapter.

    Args:
        said: by the site.
        counts: what the task counts.
        clusters: adapters that it chose from; 0 is one for all.

    Raises:
        RefusedError: it is not what was asked for.
    """
    history, chosen = said.get("validation"), said.get("chosen")
    if not isinstance(history, list) or not 0 < len(history) <= LONGEST:
        raise RefusedError("bad-numbers", f"validation is {shown(history)}")
    each = numbers({str(i): v for i, v in enumerate(history)}, [*map(str, range(len(history)))], ())
    if type(chosen) is not int or not 0 <= chosen < len(history):
        raise RefusedError("bad-numbers", f"chosen is {shown(chosen)}")
    share = numbers({"share": said["share"]}, (), ("share",)) if "share" in said else {}
    if share.get("share", 1.0) > 1:
        raise RefusedError("bad-numbers", f"share is {shown(said['share'])}")
    cluster = {"cluster": taken(said.get("cluster"), clusters)} if clusters else {}
    seconds = numbers({"seconds": said.get("seconds")}, (), ("seconds",))
    found = sums(said.get("test"), counts)
    return {"validation": [*each.values()], "chosen": chosen, **share, **cluster, "test": found,
            **seconds}  # fmt: skip
