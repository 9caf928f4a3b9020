import math
from pathlib import Path

import pytest

from fedgen_edge.report.layers import Spread, agreement, by_layer, drifts, layer_rows, over_layers
from fedgen_edge.report.summary import Row, RunFiles
from fedgen_edge.tasks.language.task import MEASURE

UNIT: Row = {"weight": 5.0, "drift": 1.0}
ROW: Row = {"bytes_up": 1, "mean_norm": 0.5, "clients": [{"client": c, **UNIT} for c in "abcd"]}


@pytest.mark.parametrize(("norm", "cosine"), [(0.0, -1.0), (math.sqrt(0.5), 0.0), (1.0, 1.0)])
def test_agreement_is_the_cosine_that_the_norms_imply(norm: float, cosine: float) -> None:
    # Two unit updates, halved and added: opposite ones cancel, orthogonal ones leave sqrt(1/2).
    clients = [{"client": c, "weight": 5.0, "drift": 1.0} for c in "ab"]
    row = {"bytes_up": 1, "mean_norm": norm, "clients": clients}
    assert agreement(row) == pytest.approx(cosine, abs=1e-12)


def test_agreement_minds_the_weights() -> None:
    # 3/4 (1, 0) + 1/4 (0, 1) has norm sqrt(10)/4, and the two are orthogonal.
    clients = [{"client": c, "weight": w, "drift": 1.0} for c, w in (("a", 3.0), ("b", 1.0))]
    row = {"bytes_up": 1, "mean_norm": math.sqrt(10) / 4, "clients": clients}
    assert agreement(row) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "change", [{"clients": ROW["clients"][:1]}, {"bytes_up": 0}, {"mean_norm": None}]
)
def test_nothing_merged_or_known_has_no_agreement(change: Row) -> None:
    assert agreement({**ROW, **change}) is None


def judged(number: int, **ranks: float) -> Row:
    """A round whose layers have these ranks, errors a tenth of them, and A and B twice and half."""
    layers = {k: {"rank": v, "error": v / 10, "a": 2 * v, "b": v / 2} for k, v in ranks.items()}
    return {"round": number, **ROW, "layers": layers}


ROUNDS = [judged(1, x=4, y=6, z=5), {"round": 2, **ROW}, judged(3, x=3, y=1, z=8)]
RUN = RunFiles(Path("run"), {}, {}, MEASURE, [], ROUNDS, {}, [], [], [], [])


def test_layers_are_told_by_their_median_and_range_where_a_round_was_judged() -> None:
    assert over_layers(ROUNDS, "rank") == [Spread(1, 5, 4, 6), Spread(3, 3, 1, 8)]
    assert over_layers(ROUNDS, "a") == [Spread(1, 10, 8, 12), Spread(3, 6, 2, 16)]


def test_the_worst_layer_has_the_least_rank_and_the_largest_of_the_rest() -> None:
    found = [(row.name, row.first.round, row.last.round, row.layer) for row in layer_rows(RUN)]
    assert found == [
        ("aggregation error", 1, 3, "z"),
        ("effective rank", 1, 3, "y"),
        ("norm of A", 1, 3, "z"),
        ("norm of B", 1, 3, "z"),
    ]
    assert [row.value for row in layer_rows(RUN)] == [0.8, 1, 16, 4]


def test_a_layer_without_a_number_is_left_out() -> None:
    # Where one factor was sent there is no error; what was not finite says nothing of a middle.
    row = {"layers": {"x": {"rank": 2.0, "a": math.nan}, "y": {"rank": 3.0, "a": 1.0}}}
    assert by_layer(row, "error") == {}
    assert by_layer(row, "a") == {"y": 1}


def test_drift_is_told_by_the_clients_mean_and_range_where_something_was_sent() -> None:
    row = {
        "bytes_up": 1,
        "mean_norm": 1.0,
        "clients": [{"drift": 1.0}, {"drift": 2.0}, {"drift": 6.0}],
    }
    rounds = [{"round": 1, **row}, {"round": 2, **row, "bytes_up": 0}]
    assert drifts(rounds) == [Spread(1, 3, 1, 6)]
