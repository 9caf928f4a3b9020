"""Whatever became of a server's files, it says in one line what is damaged, or does its work."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from fedgen_edge.deploy.server import status
from fedgen_edge.deploy.server.audit import Audit
from fedgen_edge.deploy.server.main import is_finished, make_deployment, prepare_server
from support.damage import mistake, some
from support.loop import Loop, conduct, hurry, server, stubs
from support.sites import NAMES, recipe

READ = (
    "federation.toml",
    "recipe.toml",
    *(f"run/{n}.jsonl" for n in ("audit", "rounds", "personal")),
    *(f"run/{n}.json" for n in ("run", "sites", "now")),
    "run/settings.toml",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder after its run."""
    folder = tmp_path_factory.mktemp("servers") / "fed"
    more = {"federation": {"rounds": 1}, "evaluation": {"sample_tokens": 0}}
    server(folder, recipe(None, **more), NAMES)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        conduct(folder, Loop({name: s.handle for name, s in stubs(*NAMES, rounds=1).items()}))
    return folder


def taken_up(folder: Path) -> None:
    home = prepare_server(folder)
    is_finished(home)
    make_deployment(home, Loop({}), Audit(home.run / "audit.jsonl"), print)


def shown(folder: Path) -> None:
    list(status.summarize_status(folder))
    status.make_table(folder)


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_of_a_server_is_one_line(finished: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "fed"
    shutil.copytree(finished, copy)
    for number, content in enumerate(some(copy / name, 40)):
        (copy / name).write_bytes(content)
        for act in (shown, taken_up) if number < 4 else (shown,):
            assert "\n" not in mistake(partial(act, copy), content), content[:200]
