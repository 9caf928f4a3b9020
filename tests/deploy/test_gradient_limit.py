"""The operator's limit on steps, where the recipe is of SGD and does not clip."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import suited
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.config import Settings
from fedgen_edge.deploy.server.main import prepare_server
from fedgen_edge.errors import ConfigError
from fedgen_edge.network.messages import Reply, WorkRequest
from fedgen_edge.types import VARIATE
from support.loop import Fault, Loop, Run, When, conduct, hurry, server, stubs
from support.sites import NAMES, recipe

RATE, GRADIENT = 0.5, 0.25
MORE: dict[str, Any] = {
    "federation": {"rounds": 1, "cohort": None},
    "evaluation": {"sample_tokens": 0},
    "method": {"name": "scaffold"},
    "training": {**suited("scaffold"), "lr": RATE, "schedule": "constant"},
}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def moving(size: float) -> Fault:
    """The site moves one value so far, and no other."""

    def fault(loop: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
        del loop
        received = decode(work.payload)
        delta = {k: torch.zeros_like(v) for k, v in received.items() if not k.startswith(VARIATE)}
        next(iter(delta.values())).view(-1)[0] = size
        return [Reply(right.site, right.line, encode(delta))]

    return fault


def ended(folder: Path, west: float, **plan: Any) -> Run:
    """A round in which two sites stay where they are, and the third moves so far."""
    carrier = Loop({name: site.handle for name, site in stubs(*NAMES, rounds=1).items()})
    still = [(When(name), moving(0.0)) for name in NAMES[:2]]
    carrier.faults = [*still, (When("west"), moving(west))]
    fed = server(folder, recipe(None, **MORE), NAMES, **plan)
    return conduct(fed, carrier, until=1)


def test_a_change_may_be_as_long_as_so_many_steps_of_the_limit(tmp_path: Path) -> None:
    # the third stub has eight examples and takes four steps of rate 1/2, each of 1/4 at most
    most = 4 * RATE * GRADIENT
    found = ended(tmp_path / "within", most * 0.999, gradient=GRADIENT)
    assert not found.happened("refused")
    found = ended(tmp_path / "beyond", most * 1.001, gradient=GRADIENT)
    assert found.happened("refused") == [("west", 0, "change-too-large")]
    assert not ended(tmp_path / "free", 1e6).happened("refused")


def refused(folder: Path, settings: Settings) -> str:
    fed = server(folder, settings, NAMES, gradient=GRADIENT)
    with pytest.raises(ConfigError) as caught:
        prepare_server(fed)
    return str(caught.value)


def test_where_the_recipe_bounds_changes_itself_the_limit_is_refused(tmp_path: Path) -> None:
    clipped = {"optimizer": "sgd", "clip": 2.0}
    told = refused(tmp_path / "clip", recipe(None, training=clipped))
    assert "gradient=0.25 in federation.toml" in told
    assert "training.clip=2.0" in told
    told = refused(tmp_path / "adamw", recipe(None, training={"optimizer": "adamw", "clip": 0.0}))
    assert "training.optimizer='adamw'" in told
