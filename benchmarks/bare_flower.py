"""Flower as it comes, for `network.py`: its own FedAvg, and a process for each message."""

import json
from typing import Any

from loopback import LONG, Place, Scale, admit, free_port, told

APP = {
    "pyproject.toml": b"""[project]
name = "bare"
version = "1.0.0"
description = "Flower's own FedAvg; clients that do not train"

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "bare:server"
clientapp = "bare:client"
""",
    "bare.py": b"""import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

server, client = ServerApp(), ClientApp()

@server.main()
def main(grid, context):
    told = context.run_config
    def mark(*_):
        with open(told["moments"], "a") as file:
            file.write(f"{time.time()}\\n")
    n = told["sites"]
    while len(list(grid.get_node_ids())) < n:
        time.sleep(0.2)
    values = np.random.default_rng(0).standard_normal(told["size"] // 4, np.float32)
    plan = FedAvg(fraction_evaluate=0.0, min_train_nodes=n, min_available_nodes=n)
    plan.start(grid, ArrayRecord({"flat": Array(values)}), told["rounds"], evaluate_fn=mark)

@client.train()
def train(message, context):
    values = message.content["arrays"]["flat"].numpy()
    changed = values + np.float32(1e-6 * (1 + context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": 8})
    record = RecordDict({"arrays": ArrayRecord({"flat": Array(changed)}), "metrics": metrics})
    return Message(record, reply_to=message)
""",
}


def bare(place: Place, size: int, rounds: int) -> tuple[list[float], int]:
    ca, certificate, key = place.tls
    link = place.start(
        "superlink",
        [
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(place.port), "--ssl-ca-certfile", str(ca)),
            *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ],
    )
    moments = place.folder / "moments"
    admit(place)
    submit(place, {"size": size, "rounds": rounds, "sites": place.sites, "moments": str(moments)})
    for number, name in enumerate(place.keys()):
        place.start(
            name,
            [
                "flower-supernode",
                *("--superlink", place.address, "--root-certificates", str(ca)),
                *("--auth-supernode-private-key", str(place.folder / name)),
                *("--port", str(free_port()), "--node-config", f"partition-id={number}"),
            ],
        )
    with Scale([link.pid]) as scale:
        return told(moments, rounds, [link]), scale.most


def submit(place: Place, config: dict[str, Any]) -> None:
    """Have Flower's server start the run: `flwr run`, without its command."""
    from hashlib import sha256

    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab

    from fedgen_edge.network.flower.http import FlowerServer

    told = "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    about = APP["pyproject.toml"] + f"\n[tool.flwr.app.config]\n{told}".encode()
    content, _ = build_fab_from_files({**APP, "pyproject.toml": about})
    fab = fab_to_proto(Fab(sha256(content).hexdigest(), content, {}))
    with FlowerServer(place.address, place.tls[0], LONG).make_client(ControlHttpClient) as control:
        control.StartRun(StartRunRequest(fab=fab))
