"""A site that lost its state, under SCAFFOLD: its old variate is in the server's sum no more."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import suited
from fedgen_edge.algorithms.scaffold import CLIENT_VARIATE
from fedgen_edge.deploy.site import store
from fedgen_edge.deploy.site.site import Site, open_site
from fedgen_edge.runs.checkpoint import load_latest
from fedgen_edge.types import VARIATE, Leaves
from support.loop import Loop, Run, When, conduct, first, hurry, outcome, same, server
from support.sites import NAMES, kit, recipe

MORE: dict[str, Any] = {
    "federation": {"rounds": 4, "cohort": None},
    "evaluation": {"sample_tokens": 0, "every_rounds": 4},
    "personal": {"epochs": 1},
    "method": {"name": "scaffold"},
    "training": {**suited("scaffold"), "lr": 0.1},
}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> list[Site]:
    folder = tmp_path_factory.mktemp("kits")
    return [open_site(kit(folder / name, name, **MORE)) for name in NAMES]


def kept(run: Run, sites: dict[str, Site], name: str) -> Leaves:
    """What a site has kept with its last update that counts."""
    taken = run.deployment.audit.get_accepted(MORE["federation"]["rounds"])[name]
    found = sites[name].state.get_run_store(run.home.terms.run).load_client_state(taken.payload)
    assert found
    return found


def ended(kits: list[Site], folder: Path, *stops: int) -> tuple[Run, dict[str, Site]]:
    """A run in which the third site loses all that it has in the second round."""
    sites = {s.name: replace(s, state=store.open_store(folder / s.name / "state")) for s in kits}
    state = sites["west"].state.folder

    def lost() -> None:
        state.rename(folder / "lost")
        store.open_store(state)

    carrier = Loop({name: site.handle for name, site in sites.items()})
    carrier.faults = [(When("east", round=1), first(lost))]
    fed = server(folder / "fed", recipe(None, **MORE), NAMES)
    for stop in stops:
        conduct(fed, carrier, until=stop)
    return conduct(fed, carrier), sites


def test_the_servers_sum_is_of_what_sites_have_and_of_nothing_that_was_lost(
    kits: list[Site], tmp_path: Path
) -> None:
    run, sites = ended(kits, tmp_path)
    state, memory = load_latest(run.home.run)
    own = [kept(run, sites, name) for name in NAMES]
    for name in state.adapter:
        total = torch.stack([each[CLIENT_VARIATE + name] for each in own]).sum(0)
        torch.testing.assert_close(state.method[VARIATE + name], total, atol=1e-6, rtol=1e-5)
    # the server works out each site's as the site itself does
    assert all(same(memory[at], each) for at, each in enumerate(own))
    # and the lost one was not nothing
    took_part = [row["cohort"] for row in outcome(run.home.run)["rounds"]]
    assert took_part == [[*NAMES], ["east", "north"], [*NAMES], [*NAMES]]


def test_a_server_that_goes_on_from_a_commit_knows_what_sites_had(
    kits: list[Site], tmp_path: Path
) -> None:
    one, _ = ended(kits, tmp_path / "one")
    other, _ = ended(kits, tmp_path / "other", 1, 2)
    assert outcome(one.home.run) == outcome(other.home.run)
    assert same(load_latest(one.home.run)[0].method, load_latest(other.home.run)[0].method)
