"""A run is taken up again with what it was begun with, or the server says what is not the same."""

import re
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge import __version__
from fedgen_edge.config import to_toml
from fedgen_edge.deploy.server.main import prepare_server
from fedgen_edge.errors import CheckpointError
from fedgen_edge.runs import records
from fedgen_edge.runs.provenance import versions
from support.loop import server
from support.sites import NAMES, recipe


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A server's folder whose run has begun, with a cohort of two."""
    folder = server(tmp_path / "fed", recipe(None), NAMES)
    prepare_server(folder)
    return folder


def refused(folder: Path) -> str:
    """Why it is not taken up again: one line, after which nothing has changed."""
    before = {p: p.read_bytes() for p in (folder / "run").iterdir()}
    with pytest.raises(CheckpointError) as caught:
        prepare_server(folder)
    assert {p: p.read_bytes() for p in (folder / "run").iterdir()} == before
    assert "\n" not in str(caught.value)
    assert f"move {folder / 'run'} away" in str(caught.value)
    return str(caught.value)


def test_with_the_same_it_is_taken_up_again_though_sites_have_come(begun: Path) -> None:
    run = prepare_server(begun).terms.run
    (begun / "sites" / "south.pub").write_bytes(b"a key")
    assert prepare_server(begun).terms.run == run


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"training": {"lr": 0.25}}, r"of training\.lr=[0-9.e-]+ and not 0\.25: restore it"),
        ({"federation": {"cohort": 3}}, r"of federation\.cohort=2 and not 3: restore it"),
        ({"federation": {"cohort": None}}, r"of federation\.cohort=2 and not 3: restore it"),
        ({"training": {"lr": 0.1, "batch": 3, "epochs": 5, "warmup": 1}}, ", .*, .*, .*: restore"),
        (
            {
                "adapter": {"rank": 2, "alpha": 2.0, "dropout": 0.5},
                "federation": {"rounds": 9},
                "personal": {"epochs": 3},
                "training": {"lr": 0.1},
            },
            ", and 1 more: restore it",
        ),
    ],
)
def test_settings_that_changed_are_named(begun: Path, more: dict[str, Any], told: str) -> None:
    (begun / "recipe.toml").write_text(to_toml(recipe(None, **more)))
    assert re.search(f"begun with another recipe.toml, .*{told}", refused(begun))


def test_another_backbone_is_named_by_its_hash(begun: Path) -> None:
    path = begun / "run" / "run.json"
    facts = records.read_json(path)
    facts["backbone"]["sha256"] = "0123456789abcdef" * 4
    records.write_json(path, facts)
    assert "begun with another backbone, of SHA-256 0123456789abcdef..." in refused(begun)


def test_leaves_that_are_drawn_otherwise_by_now_are_told_with_the_versions(begun: Path) -> None:
    path = begun / "run" / "run.json"
    records.write_json(path, {**records.read_json(path), "drawn": "0" * 64, "torch": "2.0.1"})
    told = refused(begun)
    assert "drawn otherwise here" in told
    assert "torch 2.0.1" in told
    assert versions() in told


def test_a_version_that_had_fewer_settings_is_named_with_those_it_had_not(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what a server wrote that did not know two of today's settings
    path, facts = begun / "run" / "settings.toml", begun / "run" / "run.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(s for s in lines if not s.startswith(("ditto_lambda =", "choose_by =")))
    )
    old = {**records.read_json(facts), "recipe": "0" * 64, "version": "0.0.7"}
    records.write_json(facts, old)
    told = refused(begun)
    assert "begun by fedgen-edge 0.0.7, whose settings (such as method." in told
    assert "method.ditto_lambda" in told
    assert "method.choose_by" in told
    assert "and " not in told.partition("(such as ")[2].partition(")")[0]
    assert f"of this one, {__version__}: go on with that version" in told
    # of settings that are nothing by default a file says nothing
    path.write_text("".join(lines))
    assert "begun by fedgen-edge 0.0.7, whose settings are not those" in refused(begun)
