import math

import pytest

from fedgen_edge.experiments.merging import agreement
from fedgen_edge.experiments.summary import Row

UNIT: Row = {"weight": 5.0, "drift": 1.0}
ROW: Row = {"bytes_up": 1, "update_norm": 0.5, "clients": [{"client": c, **UNIT} for c in "abcd"]}


@pytest.mark.parametrize(("norm", "cosine"), [(0.0, -1.0), (math.sqrt(0.5), 0.0), (1.0, 1.0)])
def test_agreement_is_the_cosine_that_the_norms_imply(norm: float, cosine: float) -> None:
    # Two unit updates, halved and added: opposite ones cancel, orthogonal ones leave sqrt(1/2).
    clients = [{"client": c, "weight": 5.0, "drift": 1.0} for c in "ab"]
    row = {"bytes_up": 1, "update_norm": norm, "clients": clients}
    assert agreement(row) == pytest.approx(cosine, abs=1e-12)


def test_agreement_minds_the_weights() -> None:
    # 3/4 (1, 0) + 1/4 (0, 1) has norm sqrt(10)/4, and the two are orthogonal.
    clients = [{"client": c, "weight": w, "drift": 1.0} for c, w in (("a", 3.0), ("b", 1.0))]
    row = {"bytes_up": 1, "update_norm": math.sqrt(10) / 4, "clients": clients}
    assert agreement(row) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("change", [{"clients": ROW["clients"][:1]}, {"bytes_up": 0}])
def test_nothing_merged_has_no_agreement(change: Row) -> None:
    assert agreement({**ROW, **change}) is None
