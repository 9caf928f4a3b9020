"""A server and its sites without a network: they end as one process does, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

from conftest import suited
from fedgen_edge import config
from fedgen_edge.adapters.ranks import truncate_rank
from fedgen_edge.algorithms.ifca import split_clusters
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.cli.compatibility import find_objection
from fedgen_edge.compression.serialize import encode
from fedgen_edge.config import Method, Settings, from_table
from fedgen_edge.deploy.server.cohort import sample_cohort
from fedgen_edge.deploy.settings import hash_settings
from fedgen_edge.deploy.site import store
from fedgen_edge.deploy.site.site import Site, open_site
from fedgen_edge.federation.rounds import sample_clients
from fedgen_edge.network.flower.carrier import FlowerCarrier
from fedgen_edge.network.messages import Carrier
from fedgen_edge.runs import records
from fedgen_edge.runs.build import Experiment, build
from fedgen_edge.runs.run import create, proceed
from support.loop import InlineGrid, Loop, conduct, hurry, model, outcome, server, stubs
from support.sites import NAMES, kit, recipe, rows, write_rows

QUICK: dict[str, Any] = {
    "personal": {"epochs": 1},
    "evaluation": {"sample_tokens": 2, "prompts": ["One"]},
}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def deployable(name: str) -> bool:
    return find_objection(name, "sites") is None


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
        own = model(site.state.get_run_store(run.home.terms.run).personal_folder)
        assert own == model(simulation / "adapters" / "clients" / name)
        assert own


@pytest.mark.parametrize("method", [*filter(deployable, METHODS)])
def test_a_federation_of_sites_ends_as_a_run_on_one_machine(tmp_path: Path, method: str) -> None:
    training = {**suited(method), "epochs": 1 + METHODS[method].make(Method()).head_epochs}
    more = {**QUICK, "method": {"name": method, "mu": 0.1}, "training": training}
    data = write_rows(tmp_path / "all.jsonl", rows())
    simulation = simulated(tmp_path / "run", recipe(data, **more))
    sites = opened(tmp_path / "kits", **more)
    folder = server(tmp_path / "fed", shared(recipe(None, **more)), NAMES, over_selection=1)
    check(folder, sites, simulation, Loop({name: s.handle for name, s in sites.items()}))


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        ("fedgen-edge", {"sparsify": "top-k", "density": 0.1, "dtype": "int8", "zstd": 3}, {}),
        ("rolora", {"sparsify": "top-k", "dtype": "fp16", "feedback": True}, {"dtype": "bf16"}),
        (
            "fedper",
            {"sparsify": "random-k", "feedback": True},
            {"sparsify": "top-k", "dtype": "int4"},
        ),
        ("flexlora", {"low_rank": 1}, {"dtype": "int8", "zstd": 1}),
        ("ifca", {"sparsify": "top-k", "dtype": "fp16", "feedback": True}, {"dtype": "int8"}),
    ],
)
def test_fewer_bytes_arrive_as_on_one_machine(
    tmp_path: Path, method: str, up: dict[str, Any], down: dict[str, Any]
) -> None:
    ranks = {"rank": 4, "ranks": [1, 4, 2]} if method == "flexlora" else {}
    more = {**QUICK, "method": {"name": method}, "uplink": up, "downlink": down, "adapter": ranks}
    data = write_rows(tmp_path / "all.jsonl", rows())
    simulation = simulated(tmp_path / "run", recipe(data, **more))
    sites = opened(tmp_path / "kits", **more)
    folder = server(tmp_path / "fed", shared(recipe(None, **more)), NAMES, over_selection=1)
    check(folder, sites, simulation, Loop({name: s.handle for name, s in sites.items()}))


def loud(row: dict[str, str]) -> dict[str, str]:
    """One site writes in capitals."""
    return {**row, "text": row["text"].upper()} if row["who"] == "west" else row


def test_each_site_trains_and_tunes_the_cluster_that_suits_its_data(tmp_path: Path) -> None:
    more = {
        **QUICK,
        "adapter": {"dropout": 0.0},
        "federation": {"cohort": None},
        "method": {"name": "ifca"},
        "training": {"lr": 0.02, "epochs": 6},
    }
    data = write_rows(tmp_path / "all.jsonl", [loud(row) for row in rows()])
    simulation = simulated(tmp_path / "run", recipe(data, **more))
    kits = {name: kit(tmp_path / "kits" / name, name, **more) for name in NAMES}
    write_rows(kits["west"] / "texts.jsonl", [loud(row) for row in rows(["west"])])
    sites = {name: open_site(folder) for name, folder in kits.items()}
    folder = server(tmp_path / "fed", shared(recipe(None, **more)), NAMES, over_selection=1)
    carrier = Loop({name: s.handle for name, s in sites.items()})
    check(folder, sites, simulation, carrier)
    assert {p.name for p in (folder / "run" / "adapters").iterdir()} == {"cluster-0", "cluster-1"}
    *_, last = records.lines(folder / "run" / "rounds.jsonl")
    took = {own["client"]: own["cluster"] for own in last["clients"]}
    tuned = {own["client"]: own["cluster"] for own in records.lines(folder / "run/personal.jsonl")}
    assert took == tuned == {"east": 0, "north": 0, "west": 1}
    # both adapters go down, and one comes up
    start = sites["north"].start
    up, down = len(encode(split_clusters(start)[0])), len(encode(start))
    assert {len(w.payload) for _, w in carrier.asked if w.payload} == {down}
    sent = {len(r.payload) for r in carrier.heard if r.payload}
    assert len(sent) == 1
    assert up < sent.pop() < down


def test_sites_of_unequal_ranks_end_as_on_one_machine_and_send_fewer_bytes(tmp_path: Path) -> None:
    more = {
        **QUICK,
        "method": {"name": "raflora"},
        "adapter": {"rank": 4, "ranks": [1, 4, 2], "rslora": True},
        "federation": {"cohort": None},
    }
    data = write_rows(tmp_path / "all.jsonl", rows())
    simulation = simulated(tmp_path / "run", recipe(data, **more))
    sites = opened(tmp_path / "kits", **more)
    folder = server(tmp_path / "fed", shared(recipe(None, **more)), NAMES, over_selection=1)
    carrier = Loop({name: s.handle for name, s in sites.items()})
    check(folder, sites, simulation, carrier)
    # what travelled, either way and for any work but to join, is as long as the rank makes it
    whole = sites["north"].start
    ranks = dict(zip(NAMES, (1, 4, 2), strict=True))
    lengths = {name: len(encode(truncate_rank(whole, rank))) for name, rank in ranks.items()}
    assert lengths["east"] < lengths["west"] < lengths["north"]
    down = {(name, len(work.payload)) for name, work in carrier.asked if work.payload}
    assert down == {*lengths.items()}
    assert {(r.site, len(r.payload)) for r in carrier.heard if r.payload} == {*lengths.items()}
    for line in records.lines(folder / "run" / "rounds.jsonl"):
        told = {own["client"]: (own["rank"], own["bytes_up"]) for own in line["clients"]}
        assert told == {name: (ranks[name], lengths[name]) for name in NAMES}
        assert line["bytes_down"] == sum(lengths.values())
    for name, rank in ranks.items():
        own = simulation / "adapters" / "clients" / name / "adapter_config.json"
        found = json.loads(own.read_text())
        # the scale of rsLoRA is that of the whole adapter, 16 / sqrt(4) = 8, for every rank
        assert (found["r"], found["use_rslora"]) == (rank, False)
        assert found["lora_alpha"] == pytest.approx(8 * rank)


def posted(sites: dict[str, Site]) -> FlowerCarrier:
    """The same over Flower's own messages."""
    nodes = {11 * (at + 1): name for at, name in enumerate(sites)}
    grid = InlineGrid(handles={node: sites[name].handle for node, name in nodes.items()})
    return FlowerCarrier(grid, lambda: nodes, poll=1e-3)


def divided(experiment: Experiment, recipe: str, folder: Path) -> dict[str, Site]:
    """A site for each client of an experiment, with the same data."""
    start = experiment.start().adapter
    names = experiment.algorithm.sends(list(start), None)
    shapes = {k: tuple(v.shape) for k, v in start.items() if k in names}

    def site(number: int) -> Site:
        clients = replace(experiment.clients, shards=[experiment.clients.shards[number]], memory={})
        own = replace(experiment, holdings=[experiment.holdings[number]], clients=clients)
        state = store.open_store(folder / str(number))
        return Site(own, recipe, start, shapes, state)

    return {name: site(number) for number, name in enumerate(experiment.names)}


@pytest.mark.parametrize("task", ["vae", "gan"])
def test_pictures_over_flowers_messages_end_as_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    settings = from_table(
        {
            "task": task,
            "backbone": {"path": "tiny", "precision": "float32"},
            "data": {"source": "digits", "limit": 60, "names": [*"0123456789"]},
            "partition": {"by": "iid"},
            "federation": {"rounds": 3, "cohort": 2, "clients": 3},
            "method": {"name": "fedper"},
            "personal": {"epochs": 1},
            "engine": {"name": "serial", "threads": 1, "device": "cpu"},
            "evaluation": {"sample_images": 1},
        }
    )
    simulation = simulated(tmp_path / "run", settings)
    sites = divided(build(settings), hash_settings(settings), tmp_path / "sites")
    folder = server(tmp_path / "fed", settings, [*sites], over_selection=1)
    check(folder, sites, simulation, posted(sites))
    assert (simulation / "samples" / "1-0.png").read_bytes() == (
        folder / "run" / "samples" / "1-0.png"
    ).read_bytes()


def test_answers_may_come_in_any_order(tmp_path: Path) -> None:
    def ended(name: str, slow: list[str]) -> dict[str, Any]:
        sites = stubs(*NAMES)
        carrier = Loop({k: v.handle for k, v in sites.items()}, slow=slow)
        more = {"federation": {"cohort": None}, "evaluation": {"sample_tokens": 0}}
        folder = server(tmp_path / name, recipe(None, **more), NAMES)
        return outcome(conduct(folder, carrier).home.run)

    assert ended("one", []) == ended("other", ["west", "north", "east"])


def test_the_cohort_is_the_simulations_where_all_are_there_and_else_the_next_of_the_same_draw() -> (
    None
):
    numbers = {f"site-{at}": at for at in range(9)}
    plan = config.Federation(clients=9, cohort=4, seed=3)
    for round_ in range(20):
        drawn = sample_clients(plan, 9, round_)
        assert sample_cohort(3, round_, [*numbers], numbers, 4) == drawn
        away = drawn[1]
        there = [name for name, at in numbers.items() if at != away]
        found = sample_cohort(3, round_, there, numbers, 4)
        assert len(found) == 4
        assert {*drawn} - {away} < {*found}
        assert away not in found
