"""A server and its sites without a network: they end as one process does, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.algorithms.share import each_alone, nothing
from fedgen_edge.config import Method, Settings
from fedgen_edge.deploy.site import Site, open_site
from fedgen_edge.engines.exchange import Carrier
from fedgen_edge.experiments.run import create, proceed
from loop import Loop, conduct, model, outcome, server
from sites import NAMES, kit, recipe, rows, write_rows

QUICK: dict[str, Any] = {
    "personal": {"epochs": 1},
    "evaluation": {"sample_tokens": 2, "prompts": ["One"]},
}


def deployable(name: str) -> bool:
    algorithm = METHODS[name].make(Method())
    return algorithm.sends is not nothing and algorithm.groups is each_alone


def simulated(folder: Path, settings: Settings) -> Path:
    """A run of the same on one machine."""
    for _ in proceed(create(settings, folder), folder):
        pass
    return folder


def opened(folder: Path, **more: Any) -> dict[str, Site]:
    """The sites of a recipe, with their data."""
    return {name: open_site(kit(folder / name, name, **more)) for name in NAMES}


def shared(settings: Settings) -> Settings:
    """What the server has of a recipe: no data."""
    return replace(settings, data=replace(settings.data, path=None))


def check(folder: Path, sites: dict[str, Site], simulation: Path, carrier: Carrier) -> None:
    run = conduct(folder, carrier)
    expected, found = outcome(simulation), outcome(run.home.run)
    shown = [row for row in expected.pop("samples") if row["model"] != "personal"]
    assert found.pop("samples") == shown
    for name, value in expected.items():
        assert found[name] == value, name
    assert found["global"]
    for name, site in sites.items():
        own = model(site.state.past(run.home.terms.run).personal)
        assert own == model(simulation / "adapters" / "clients" / name)
        assert own


@pytest.mark.parametrize("method", [*filter(deployable, METHODS)])
def test_a_federation_of_sites_ends_as_a_run_on_one_machine(tmp_path: Path, method: str) -> None:
    more = {**QUICK, "method": {"name": method, "mu": 0.1}}
    data = write_rows(tmp_path / "all.jsonl", rows())
    simulation = simulated(tmp_path / "run", recipe(data, **more))
    sites = opened(tmp_path / "kits", **more)
    folder = server(tmp_path / "fed", shared(recipe(None, **more)), NAMES, over_selection=1)
    check(folder, sites, simulation, Loop({name: s.handle for name, s in sites.items()}))
