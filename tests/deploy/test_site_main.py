"""The command at a site: it says what is wrong with a kit, and what happens, and leaves nobody."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedgen_edge.deploy.processes import ProcessExit
from fedgen_edge.deploy.settings import SiteSettings, read
from fedgen_edge.deploy.site.main import (
    ADVICE,
    REQUIRED_FILES,
    ProcessMonitor,
    ReportingHandler,
    read_kit,
)
from fedgen_edge.deploy.site.site import open_site
from fedgen_edge.errors import ConfigError
from fedgen_edge.network.messages import Answer, Terms, WorkRequest, digest, encode_line
from fedgen_edge.network.messages import decode_message as heard
from support.sites import RUN, ask, kit, work

BOUND = 120.0
SCRIPT = '''
import sys, time
from pathlib import Path
from fedgen_edge.deploy.site.main import join
from fedgen_edge.errors import FedGenError

class Runtime:
    """Flower's stand-in: messages are files."""

    def supernode(self, address, ca, key, port, secret):
        node = "echo node $$ $FLWR_TELEMETRY_ENABLED; echo SuperNode ID: 7; "
        once = f"rm {key}.cut 2>&- && echo '[SSL: UNEXPECTED_EOF_WHILE_READING] (_ssl.c:1006)'; "
        return ["/bin/sh", "-c", f"{node}{once}exec sleep 600"]

    def serve(self, address, secret, handler, stop):
        assert secret.read_bytes()
        mail = secret.parent / "mail"
        mail.mkdir(exist_ok=True)
        while not stop.is_set():
            for asked in sorted(mail.glob("*.ask")):
                text, payload = asked.read_bytes().split(b"\\n", 1)
                said, sent = handler(text.decode(), payload)
                asked.unlink()
                draft = asked.with_suffix(".draft")
                draft.write_bytes(said.encode() + b"\\n" + sent)
                draft.rename(asked.with_suffix(".said"))
            stop.wait(0.02)

try:
    join(Path(sys.argv[1]), Runtime())
except FedGenError as error:
    print(f"fedgen: {error}", file=sys.stderr)
    sys.exit(2)
finally:
    print("heavy:", [m for m in ("torch", "transformers", "numpy", "flwr") if m in sys.modules])
'''


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Client:
    """The command, running."""

    def __init__(self, folder: Path, name: str = "first") -> None:
        self.folder, self.out = folder, folder / name
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lines(self) -> list[str]:
        return self.out.read_text().splitlines()

    def said(self, part: str) -> bool:
        assert self.process.poll() is None, self.lines()
        return any(part in told for told in self.lines())

    def ask(self, asked: WorkRequest) -> Answer:
        """A message that the stand-in hands on."""
        mail = self.folder / "mail"
        answer = mail / "1.said"
        answer.unlink(missing_ok=True)
        (mail / "1.draft").write_bytes(encode_line(asked).encode() + b"\n" + asked.payload)
        (mail / "1.draft").rename(mail / "1.ask")
        until(answer.exists)
        text, payload = answer.read_bytes().split(b"\n", 1)
        return heard(Answer, text.decode(), payload)

    def ended(self) -> int:
        """Its exit status."""
        try:
            return self.process.wait(BOUND)
        finally:
            self.process.kill()
            self.process.wait()

    def children(self) -> list[int]:
        """The trainer and the SuperNode."""
        own = self.process.pid
        return [int(p) for p in Path(f"/proc/{own}/task").glob("*/children")
                for p in p.read_text().split()]  # fmt: skip


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    client = Client(kit(tmp_path / "east", "east"))
    try:
        yield client
    finally:
        client.process.kill()
        client.process.wait()


def test_a_site_takes_part_from_joining_to_its_own_adapter_and_leaves_nobody(
    client: Client, tmp_path: Path
) -> None:
    site = open_site(kit(tmp_path / "other", "east"))
    ask(site, work(site, "join"))
    until(lambda: client.said("connected to localhost:19443"))
    assert client.ask(work(site, "join")).refused is None
    asked = work(site, "train", site.start)
    first, expected = client.ask(asked), ask(site, asked)
    assert (first.payload, first.said) == (expected.payload, expected.said)
    children = client.children()
    assert len(children) == 2

    # the kit is one process's
    second = Client(client.folder, "second")
    assert second.ended() == 2
    assert "in use by another process" in second.lines()[0]

    # the trainer is killed; asked again, another answers from what it wrote
    (trainer,) = [p for p in children if "trainer" in Path(f"/proc/{p}/cmdline").read_text()]
    os.kill(trainer, signal.SIGKILL)
    until(lambda: gone(trainer))
    assert client.ask(asked).payload == expected.payload

    after = {"round": 1, "accepted": digest(first.payload)}
    assert client.ask(work(site, "personalise", site.start, **after)).refused is None
    client.process.send_signal(signal.SIGTERM)
    assert client.ended() == 0
    state = client.folder / "state"
    assert client.lines() == [
        "east: data read, backbone loaded; joining localhost:19443",
        "connected to localhost:19443",
        "run 01234567: joined with 15 training rows",
        f"round 1: trained, loss {first.said['loss']:.4f}",
        "the trainer ended (killed by SIGKILL): starting it again",
        f"round 1: trained, loss {first.said['loss']:.4f}",
        "round 1: accepted",
        f"personal adapter at {state / 'runs' / RUN / 'personal'}",
        "heavy: []",
    ]
    for pid in children:
        until(lambda pid=pid: gone(pid))
    assert (state / "runs" / RUN / "personal" / "adapter_model.safetensors").is_file()
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert (state / "supernode.log").read_text().startswith("node ")
    assert (state / "supernode.log").read_text().split()[2] == "0"  # no telemetry


def test_killed_it_leaves_nobody(client: Client) -> None:
    until(lambda: client.said("connected"))
    children = client.children()
    assert len(children) == 2
    client.process.kill()
    client.process.wait()
    for pid in children:
        until(lambda pid=pid: gone(pid))


def test_a_node_whose_handshake_was_cut_off_is_started_again(client: Client) -> None:
    # Flower's own neither tries again nor ends.
    until(lambda: client.said("connected"))
    node = next(p for p in client.children() if b"sleep" in Path(f"/proc/{p}/cmdline").read_bytes())
    (client.folder / "key.cut").touch()
    os.kill(node, signal.SIGKILL)
    until(lambda: client.said("does not answer: trying again"))
    until(lambda: [line for line in client.lines() if line.startswith("connected")][1:])
    until(lambda: len(client.children()) == 2)


def test_data_that_are_not_there_are_one_line_before_the_site_joins(tmp_path: Path) -> None:
    folder = kit(tmp_path / "east", "east")
    (folder / "texts.jsonl").unlink()
    client = Client(folder)
    assert client.ended() == 2
    (mistake, heavy) = client.lines()
    assert mistake.startswith("fedgen: data.path=")
    assert mistake.endswith("give what data.source='jsonl' reads")
    assert heavy == "heavy: []"
    assert not (folder / "state" / "supernode.log").exists()


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_kit_that_is_not_whole_is_refused_by_the_missing_file(tmp_path: Path, name: str) -> None:
    folder = kit(tmp_path / "east", "east")
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        read_kit(folder)


@pytest.mark.parametrize("name", ["key", "secret"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    folder = kit(tmp_path / "east", "east")
    assert read_kit(folder).name == "east"
    (folder / name).chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}\): chmod 600 .*{name}$"):
        read_kit(folder)


def test_a_site_cannot_change_what_all_share(tmp_path: Path) -> None:
    folder = kit(tmp_path / "east", "east")
    told = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(told.replace('"data.path"', '"training.lr"'))
    with pytest.raises(ConfigError, match=r"own\.training\.lr is the same at all sites"):
        read_kit(folder)


def test_what_is_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        read_kit(tmp_path / "none")


@pytest.fixture
def watch(tmp_path: Path) -> ProcessMonitor:
    folder = kit(tmp_path / "east", "east")
    return ProcessMonitor(read(SiteSettings, folder / "site.toml"), folder, threading.Event())


@pytest.mark.parametrize(
    ("line", "advice"),
    [  # as measured of flwr 1.41.0
        ("[code: 2004] Failed to activate SuperNode.", "register east's key.pub"),
        (
            "[code: 2001] SuperNode authentication is enabled. All SuperNodes must be registered "
            "via the CLI.",
            "did not get this site's key",
        ),
        ("Server disconnected without sending a response.", "speaks no TLS"),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local "
            "issuer certificate",
            "not signed by this kit's ca.crt",
        ),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch, "
            "certificate is not valid for 'localhost'",
            "is not a name in the server's certificate",
        ),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired",
            "set this machine's clock",
        ),
        (
            "The private key for SuperNode authentication was provided, but TLS is not enabled.",
            "started without TLS",
        ),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "speaks no TLS"),
        ("[Errno 111] Connection refused", "does not answer: trying again"),
    ],
)
def test_what_flower_refuses_is_said_once_with_the_way_out(
    watch: ProcessMonitor, capsys: pytest.CaptureFixture[str], line: str, advice: str
) -> None:
    for _ in range(3):
        watch.on_node_line("ERROR :     Exit Code: 305")
        watch.on_node_line(line)
        assert watch.on_node_exit(ProcessExit(1, "For more information, visit: <https://x>"))
    (told,) = capsys.readouterr().out.splitlines()
    assert advice in told
    if "SuperNode was" not in told:
        assert "localhost:19443" in told
    watch.on_node_line("INFO :      SuperNode ID: 1234")
    watch.on_node_line(line)
    assert capsys.readouterr().out.splitlines() == ["connected to localhost:19443", told]
    assert not watch.stop.is_set()


def test_every_advice_is_tried_above() -> None:
    assert len(ADVICE) == 8


def test_an_end_without_known_words_names_the_log(
    watch: ProcessMonitor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch.on_node_exit(ProcessExit(-9, "INFO: pulling"))
    told = capsys.readouterr().out
    assert "killed by SIGKILL" in told
    assert "supernode.log" in told


def test_a_trainer_that_never_was_up_or_has_a_mistake_stops_all(watch: ProcessMonitor) -> None:
    assert not watch.on_trainer_exit(ProcessExit(-9, "loading"))
    assert watch.stop.is_set()
    with pytest.raises(ConfigError, match=r"cannot start \(killed by SIGKILL\): see .*trainer.log"):
        watch.raise_failure()
    watch.was_ready = True
    assert not watch.on_trainer_exit(ProcessExit(2, "fedgen: data.path='x' does not exist"))
    with pytest.raises(ConfigError, match=r"^data\.path='x' does not exist"):
        watch.raise_failure()


def test_a_trainer_that_dies_later_is_started_again(
    watch: ProcessMonitor, capsys: pytest.CaptureFixture[str]
) -> None:
    watch.was_ready = True
    assert watch.on_trainer_exit(ProcessExit(1, "RuntimeError: CUDA error"))
    told = capsys.readouterr().out
    assert told == "the trainer ended (status 1: RuntimeError: CUDA error): starting it again\n"
    assert not watch.stop.is_set()
    watch.raise_failure()


def test_few_lines_tell_the_story_of_a_run(
    watch: ProcessMonitor, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = Terms(RUN, "r", "b")
    said = {
        "join": {"weight": 15},
        "train": {"weight": 15, "loss": 2.34567, "steps": 4},
        "evaluate": {"validation": {"total": 1.0}},
        "personalise": {"chosen": 1},
    }

    def trainer(text: str, payload: bytes) -> tuple[str, bytes]:
        work = heard(WorkRequest, text, payload)
        refused = "diverged" if work.attempt else None
        told = {"reason": "lower training.lr"} if refused else said[work.kind]
        answer = Answer(work.kind, terms, work.round, work.attempt, "0", told, refused)
        return encode_line(answer), b"update" if work.kind == "train" else b""

    told, counts = ReportingHandler(trainer, watch, lambda: None), digest(b"update")
    for work_ in (
        WorkRequest("join", terms, 0, 0, 0, None),
        WorkRequest("train", terms, 0, 0, 0, None),
        WorkRequest("train", terms, 0, 0, 0, None),
        WorkRequest("evaluate", terms, 0, 1, 0, counts),
        WorkRequest("train", terms, 0, 1, 3, counts),
        WorkRequest("personalise", terms, 0, 2, 0, counts),
    ):
        told(encode_line(work_), b"")
    assert capsys.readouterr().out.splitlines() == [
        "run 01234567: joined with 15 training rows",
        "round 1: trained, loss 2.3457",
        "round 1: trained, loss 2.3457",
        "round 1: accepted",
        "round 2: train refused, diverged: lower training.lr",
        f"personal adapter at {watch.kit / 'state' / 'runs' / RUN / 'personal'}",
    ]


def test_a_server_that_begins_anew_meets_a_supernode_without_old_answers(
    watch: ProcessMonitor,
) -> None:
    terms, renewed = Terms(RUN, "r", "b"), []

    def trainer(text: str, payload: bytes) -> tuple[str, bytes]:
        work = heard(WorkRequest, text, payload)
        answer = Answer(work.kind, terms, 0, 0, "0", {"weight": 15, "loss": 1.0, "steps": 4})
        return encode_line(answer), b""

    told = ReportingHandler(trainer, watch, lambda: renewed.append(1))
    for kind, times in (("join", 0), ("train", 0), ("join", 1), ("join", 1), ("train", 1)):
        told(encode_line(WorkRequest(kind, terms, 0, 0, 0, None)), b"")
        assert len(renewed) == times
