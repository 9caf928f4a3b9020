import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedgen_edge.report.gains import MODEL_PAIRS, Gain, gains, make_client_rows
from fedgen_edge.report.summary import Row, RunFiles
from fedgen_edge.tasks.measure import Measure

OLD, NEW = "abcd", "yz"
TESTED = {
    "backbone": (20.0, 20.0, 20.0, 20.0, 20.0, 40.0),
    "local-only": (10.0, 8.0, 16.0, 4.0, 20.0, 40.0),
    "global": (10.0, 10.0, 10.0, 10.0, 10.0, 20.0),
    "personal": (5.0, 8.0, 12.0, 10.0, 5.0, 22.0),
}
"""A number for each of a, b, c, d, and of the newcomers y and z, who have not trained alone."""


def on_test(models: Mapping[str, Sequence[float]], clients: str) -> list[Row]:
    """A test item each, so that its loss is the client's number."""
    return [
        {"model": m, "client": c, "participated": c not in NEW, "total": v, "count": 1}
        for m, each in models.items()
        for c, v in zip(clients, each, strict=True)
    ]


RUN = RunFiles(
    folder=Path("run"),
    settings={},
    facts={},
    measure=Measure("error", "images", "a number", "pictures", scarce_items=1, loss_spread=1.0),
    clients=[{"client": c, "train": 1, "items": 9, "newcomer": c in NEW} for c in OLD + NEW],
    rounds=[],
    baselines={},
    personal=[],
    evaluation=on_test(TESTED, OLD + NEW),
    samples=[],
    distances=[],
)


def of(model: str, reference: str, newcomers: bool = False, run: RunFiles = RUN) -> Gain:
    (found,) = [g for g in gains(run) if (g.model, g.reference) == (model, reference)
                and g.newcomers == newcomers]  # fmt: skip
    return found


def test_gains_are_percent_of_each_clients_own_reference_the_least_first() -> None:
    # d: 10 for 4, 150 % more. b: 8 for 8. c: 12 for 16, a quarter less. a: 5 for 10, half.
    found = of("personal", "local-only")
    assert list(found.gain_by_client.items()) == [("d", -150), ("b", 0), ("c", 25), ("a", 50)]
    assert found.mean == (50 + 0 + 25 - 150) / 4
    assert (found.worst_client, found.worst_decile) == ("d", -150)
    assert (found.share_gained, found.share_lost) == (0.5, 0.25)


def test_a_mean_of_gains_is_not_the_gain_of_means() -> None:
    # Over global, 5, 8, 12 and 10 for 10: 50, 20, -20 and 0 %.
    found = of("personal", "global")
    assert found.mean == pytest.approx(12.5)
    assert (found.worst_client, found.share_gained, found.share_lost) == ("c", 0.5, 0.25)


def test_newcomers_have_a_distribution_of_their_own_and_none_over_training_alone() -> None:
    # y: 5 for 10, half less. z: 22 for 20, a tenth more; both: 20 for 5, 40 for 22.
    found = of("personal", "global", newcomers=True)
    assert found.gain_by_client == pytest.approx({"z": -10, "y": 50})
    assert of("personal", "backbone", newcomers=True).gain_by_client == pytest.approx(
        {"z": 45, "y": 75}
    )
    told = [(g.model, g.reference) for g in gains(RUN) if g.newcomers]
    assert told == [pair for pair in MODEL_PAIRS if "local-only" not in pair]


def test_who_never_took_part_is_told_by_the_records_too() -> None:
    # A client that no round drew is no newcomer in clients.json.
    clients = [{**row, "newcomer": False} for row in RUN.clients]
    assert gains(replace(RUN, clients=clients)) == gains(RUN)


def test_the_worst_tenth_of_eleven_clients_is_two() -> None:
    # The reference is 100, and clients have 90 to 100: gains of 0 and 1 are the least.
    clients = "abcdefghijk"
    models = {"global": [100.0] * 11, "personal": [90.0 + at for at in range(11)]}
    run = replace(RUN, clients=[], evaluation=on_test(models, clients))
    found = of("personal", "global", run=run)
    assert found.worst_decile == pytest.approx(0.5)
    assert found.share_gained == pytest.approx(10 / 11)


def test_a_difference_of_the_arithmetic_alone_is_neither_gain_nor_loss() -> None:
    models = {"global": (3.0, 3.0), "personal": (3.0 + 1e-6, 3.0 - 1e-6)}
    found = of("personal", "global", run=replace(RUN, clients=[], evaluation=on_test(models, "ab")))
    assert (found.share_gained, found.share_lost) == (0, 0)


def test_a_broken_model_has_lost_and_gains_least() -> None:
    models = {"global": (3.0, 3.0), "personal": (2.0, math.nan)}
    found = of("personal", "global", run=replace(RUN, clients=[], evaluation=on_test(models, "ab")))
    assert (found.worst_client, found.share_gained, found.share_lost) == ("b", 0.5, 0.5)
    assert math.isnan(found.mean)


def test_without_a_baseline_there_is_no_gain_over_it() -> None:
    rest = [row for row in RUN.evaluation if row["model"] != "local-only"]
    told = {(g.model, g.reference) for g in gains(replace(RUN, evaluation=rest))}
    assert told == {pair for pair in MODEL_PAIRS if "local-only" not in pair}
    assert gains(replace(RUN, evaluation=[])) == []


def test_each_client_has_a_number_for_each_model_it_was_tested_with() -> None:
    rest = [row for row in RUN.evaluation if (row["client"], row["model"]) != ("y", "global")]
    newcomer = make_client_rows(replace(RUN, evaluation=rest))[4]
    assert (newcomer.client, newcomer.newcomer) == ("y", True)
    assert newcomer.test_results == {"backbone": 20, "local-only": 20, "personal": 5}
