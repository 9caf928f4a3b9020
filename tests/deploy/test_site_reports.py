"""What a site says of its own adapter, where it chose from several."""

from typing import Any

import pytest

from fedgen_edge.deploy.server.site_reports import validate_tuning
from fedgen_edge.errors import RefusedError

TEST = {"total": 4.0, "count": 2}
SAID = {"validation": [2.0, 1.0], "chosen": 1, "test": TEST, "seconds": 0.5}


def test_its_cluster_is_told_where_there_are_some_and_nowhere_else() -> None:
    assert validate_tuning({**SAID, "cluster": 1}, ("count",), 2)["cluster"] == 1
    assert "cluster" not in validate_tuning({**SAID, "cluster": 1}, ("count",))


@pytest.mark.parametrize("said", [{}, {"cluster": 2}, {"cluster": -1}, {"cluster": True}])
def test_a_cluster_that_there_is_not_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"^bad-cluster: [ -~]{1,200}$"):
        validate_tuning({**SAID, **said}, ("count",), 2)
