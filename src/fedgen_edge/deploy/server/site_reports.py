"""What sites say in numbers, judged before anything is made of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedgen_edge.deploy.server.registry import COUNTS
from fedgen_edge.errors import RefusedError
from fedgen_edge.network.gate import validate_cluster, validate_numbers, validate_weight
from fedgen_edge.network.payload import escape_value
from fedgen_edge.runs.build import Sums

MAX_EPOCHS = 10_000
"""Epochs that a site tunes, at most."""


def validate_join(
    answer: Mapping[str, Any], max_weight: int, previous_weight: int | None
) -> tuple[int, dict[str, int]]:
    """Training examples of a site that joins, and its other counts.

    Args:
        answer: by the site.
        max_weight: training examples that it may have.
        previous_weight: training examples that it had when it joined before.

    Raises:
        RefusedError: they are none, or have changed.
    """
    weight = validate_weight(answer.get("weight"), max_weight)
    counts = validate_numbers({k: answer.get(k) for k in COUNTS}, (), COUNTS)
    if previous_weight not in {None, weight}:
        raise RefusedError(
            "bad-weight", f"it has {weight} training examples, had {previous_weight}"
        )
    return weight, {k: int(v) for k, v in counts.items()}


def validate_sums(answer: object, counts: Sequence[str]) -> Sums:
    """Held-out sums: a total loss, and what it is a sum over.

    Args:
        answer: by the site.
        counts: what the task counts; `count` is one.

    Raises:
        RefusedError: they are others, or of nothing.
    """
    totals = validate_numbers(answer if isinstance(answer, dict) else {}, ("total",), counts)
    if totals["count"] < 1:
        raise RefusedError("bad-numbers", "nothing was held out")
    return totals


def validate_tuning(
    answer: Mapping[str, Any], counts: Sequence[str], clusters: int = 0
) -> dict[str, Any]:
    """What a site says of its own adapter.

    Args:
        answer: by the site.
        counts: what the task counts.
        clusters: adapters that it chose from; 0 is one for all.

    Raises:
        RefusedError: it is not what was asked for.
    """
    history, chosen_epoch = answer.get("validation"), answer.get("chosen")
    if not isinstance(history, list) or not 0 < len(history) <= MAX_EPOCHS:
        raise RefusedError("bad-numbers", f"validation is {escape_value(history)}")
    losses = validate_numbers(
        {str(i): v for i, v in enumerate(history)}, [*map(str, range(len(history)))], ()
    )
    if type(chosen_epoch) is not int or not 0 <= chosen_epoch < len(history):
        raise RefusedError("bad-numbers", f"chosen is {escape_value(chosen_epoch)}")
    share = (
        validate_numbers({"share": answer["share"]}, (), ("share",)) if "share" in answer else {}
    )
    if share.get("share", 1.0) > 1:
        raise RefusedError("bad-numbers", f"share is {escape_value(answer['share'])}")
    cluster = {"cluster": validate_cluster(answer.get("cluster"), clusters)} if clusters else {}
    seconds = validate_numbers({"seconds": answer.get("seconds")}, (), ("seconds",))
    test_sums = validate_sums(answer.get("test"), counts)
    return {
        "validation": [*losses.values()],
        "chosen": chosen_epoch,
        **share,
        **cluster,
        "test": test_sums,
        **seconds,
    }
