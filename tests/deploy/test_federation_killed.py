"""A server that is killed at any moment of a round, or has no space, ends as one that was not."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge.cli import deploy
from fedgen_edge.cli import main as cli
from fedgen_edge.deploy.server import main as server_room
from fedgen_edge.deploy.server.audit import Audit, read_lines
from fedgen_edge.deploy.server.stages import proceed
from fedgen_edge.report import page as report
from fedgen_edge.runs import progress, records
from fedgen_edge.runs.checkpoint import find_latest
from fedgen_edge.runs.run import Event
from support.loop import Loop, conduct, hurry, outcome, server, stubs
from support.sites import recipe

ABC = ("a", "b", "c")
ROUNDS = 2
SETTINGS = recipe(
    None,
    federation={"rounds": ROUNDS, "cohort": None},
    evaluation={"sample_tokens": 0},
    checkpoints={"keep": 1},
    training={"schedule": "constant"},
)
LOADED = (deploy, progress, report)
"""What the command imports as it needs it: once here, not in each process."""
BEFORE, AFTER, TORN = "before", "after", "torn"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def loop() -> Loop:
    return Loop({k: v.handle for k, v in stubs(*ABC, rounds=ROUNDS).items()})


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder in the middle of its run: the second round is next."""
    folder = server(tmp_path_factory.mktemp("begun") / "fed", SETTINGS, ABC)
    conduct(folder, loop(), until=1)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = server(tmp_path_factory.mktemp("fed") / "fed", SETTINGS, ABC)
    return outcome(conduct(folder, loop()).home.run)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


class Points:
    """Moments at which this process has something on the disk; it can end at one of them."""

    def __init__(self, stop: int = -1, how: str = BEFORE) -> None:
        self.stop, self.how = stop, how
        self.seen: list[str] = []

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(os, "fsync", self._point("fsync", os.fsync))
        patch.setattr(os, "truncate", self._point("truncate", os.truncate))
        patch.setattr(Path, "replace", self._point("replace", Path.replace))

    def _point(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            here = len(self.seen) == self.stop
            self.seen.append(_log(args[0]) if name == "fsync" else name)
            if here and self.how == TORN:
                _tear(args[0])
            if here and self.how != AFTER:
                os._exit(9)
            found = real(*args)
            if here:
                os._exit(9)
            return found

        return called


def _log(written: int) -> str:
    """The log that is added to, if it is one."""
    name = Path(os.readlink(f"/proc/self/fd/{written}")).name
    return name if name.endswith(".jsonl") else "fsync"


def _tear(written: int) -> None:
    """The last of what was written is not there."""
    os.ftruncate(written, os.fstat(written).st_size - 5)


def points(folder: Path) -> list[str]:
    """The moments of the second round, and of all that follows it."""
    watch = Points()
    with pytest.MonkeyPatch.context() as patch:
        watch.watch(patch)
        conduct(folder, loop())
    return watch.seen


def killed(folder: Path, stop: int, how: str) -> int:
    """Run the server in a process of its own, to that moment; its exit status."""
    child = os.fork()
    if not child:
        try:
            Points(stop, how).watch(pytest.MonkeyPatch())
            conduct(folder, loop())
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(run: Path) -> None:
    """What a reader of this moment may see: nothing half written."""
    state, _, refused = find_latest(run)
    assert refused == []
    assert state is not None
    assert state.round in {1, ROUNDS}
    read_lines(run / "audit.jsonl")
    for name in ("run.json", "sites.json", "clients.json"):
        records.read_json(run / name)
    for name in ("rounds", "personal", "evaluation"):
        records.lines(run / f"{name}.jsonl")


def test_a_server_that_is_killed_at_any_moment_ends_as_one_that_was_not(
    tmp_path: Path, begun: Path, unbroken: dict[str, Any]
) -> None:
    moments = points(copied(begun, tmp_path / "counted"))
    # the audit log, and the records of the round and of each site's own adapter
    assert {"audit.jsonl", "rounds.jsonl", "personal.jsonl", "replace"} <= {*moments}
    ends = [(at, BEFORE) for at in range(len(moments))]
    ends += [(at, TORN) for at, name in enumerate(moments) if name.endswith(".jsonl")]
    ends.append((len(moments) - 1, AFTER))
    for at, how in ends:
        folder = copied(begun, tmp_path / f"{at}-{how}")
        assert killed(folder, at, how) == 9, (at, how)
        whole(folder / "run")
        assert outcome(conduct(folder, loop()).home.run) == unbroken, (at, how, moments[at])


def commanded(folder: Path, log: Path) -> None:
    """`fedgen server FOLDER` over a loop, in this process, which ends; stderr goes to a file."""
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def looped(
        home: server_room.ServerContext, tell: Callable[[str], None] = print
    ) -> Iterator[Event]:
        audit = Audit(home.run / "audit.jsonl")
        yield from proceed(server_room.make_deployment(home, loop(), audit, tell), home.run)

    server_room.run_server = looped
    try:
        cli.main(["server", str(folder)])
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def commands(folder: Path, log: Path, limit: int | None = None) -> int:
    """The exit status of the command in a process of its own, whose files have that many bytes."""
    child = os.fork()
    if not child:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        commanded(folder, log)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("more", [1, 900, 2200])
def test_a_server_whose_files_may_not_grow_says_so_and_goes_on_once_they_may(
    tmp_path: Path, begun: Path, unbroken: dict[str, Any], more: int
) -> None:
    folder = copied(begun, tmp_path / "fed")
    limit = (folder / "run" / "audit.jsonl").stat().st_size + more
    status = commands(folder, tmp_path / "said", limit)
    assert status == 2
    assert (tmp_path / "said").read_text().count("\n") == 1
    assert os.strerror(errno.EFBIG) in (tmp_path / "said").read_text()
    whole(folder / "run")
    assert outcome(conduct(folder, loop()).home.run) == unbroken


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no disk can be made here: there is no mount")
    if mounted.returncode:
        pytest.skip(f"no disk can be made here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], timeout=60, check=True)


@pytest.mark.parametrize("left", [0, 3, 9])
def test_a_server_whose_disk_is_full_says_so_and_goes_on_once_it_is_not(
    tmp_path: Path, disk: Path, begun: Path, unbroken: dict[str, Any], left: int
) -> None:
    folder, page = copied(begun, disk / "fed"), 4096
    filling = disk / "filling"
    room = os.statvfs(disk).f_bavail - left
    filling.write_bytes(b"\0" * page * room)
    assert os.statvfs(disk).f_bavail == left
    status = commands(folder, tmp_path / "said")
    assert status == 2, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert said.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in said
    whole(folder / "run")
    filling.unlink()
    assert outcome(conduct(folder, loop()).home.run) == unbroken
