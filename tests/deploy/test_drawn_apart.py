"""A site whose first adapter is not the server's, where no server sends it whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Method, from_table
from fedgen_edge.deploy.site import site
from fedgen_edge.deploy.site.site import Site, open_site
from fedgen_edge.errors import QuorumError
from fedgen_edge.network.messages import Answer, decode_message
from fedgen_edge.runs.build import select_drawn_leaves
from support.loop import Loop, conduct, hurry, opened, server
from support.sites import NAMES, kit, recipe

PLAIN: dict[str, Any] = {
    "federation": {"rounds": 1, "cohort": None},
    "evaluation": {"sample_tokens": 0},
    "method": {"name": "fedgen-edge"},
}
SHORT = {**PLAIN, "downlink": {"dtype": "int8"}}
KEPT = {**PLAIN, "method": {"name": "ffa-lora"}}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def sites(folder: Path, more: dict[str, Any]) -> dict[str, Site]:
    """Three, of which the last draws one value otherwise in its last digit."""
    found = {name: open_site(kit(folder / name, name, **more)) for name in NAMES}
    start = {k: v.clone() for k, v in found["west"].start.items()}
    first = next(leaf for name, leaf in start.items() if "lora_A" in name).view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(torch.inf))
    return {**found, "west": replace(found["west"], start=start)}


@pytest.mark.parametrize("more", [SHORT, KEPT], ids=["downlink", "ffa-lora"])
def test_it_is_refused_in_one_line_with_the_versions_of_both_sides(
    tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier = Loop({name: s.handle for name, s in sites(tmp_path, more).items()})
    fed = server(tmp_path / "fed", recipe(None, **more), NAMES, attempts=1)
    run = opened(fed, carrier)
    # what the site runs by now
    monkeypatch.setattr(site, "versions", lambda: "fedgen-edge 0.1.0, torch 9.9.9+cu128")
    assert run.deployment.find_ready_sites() == ["east", "north"]
    declined = [r for r in carrier.heard if '"refused":"wrong-start"' in r.line]
    assert {reply.site for reply in declined} == {"west"}
    reason = decode_message(Answer, declined[0].line, b"").said["reason"]
    assert "torch 9.9.9+cu128) are not the server's (" in reason
    assert f"({run.home.terms.versions})" in reason
    assert "9.9.9" not in run.home.terms.versions
    assert len(reason) <= 200
    assert "\n" not in reason
    # the operator reads all of it
    assert any(reason in line.replace("\\'", "'") for line in run.told)


def test_where_the_server_sends_all_nobody_minds(tmp_path: Path) -> None:
    carrier = Loop({name: s.handle for name, s in sites(tmp_path, PLAIN).items()})
    try:
        run = conduct(server(tmp_path / "fed", recipe(None, **PLAIN), NAMES), carrier)
    except QuorumError as error:
        raise AssertionError from error
    assert not run.happened("declined")


def test_what_is_drawn_is_what_is_never_sent_and_all_of_it_where_changes_go_down() -> None:
    begun = {"m.lora_A": torch.ones(2, 3), "m.lora_B": torch.zeros(3, 2)}
    for name, own in (("fedgen-edge", set()), ("ffa-lora", {"m.lora_A"})):
        settings = from_table({"method": {"name": name}})
        algorithm = METHODS[name].make(Method())
        assert select_drawn_leaves(settings, algorithm, begun).keys() == own
        short = from_table({"method": {"name": name}, "downlink": {"dtype": "fp16"}})
        assert select_drawn_leaves(short, algorithm, begun) == begun
