"""A federation as a library: settings, rounds, evaluation, personal adapters, PEFT folders.

python examples/library.py [BACKBONE [FOLDER]]
"""

import sys
from pathlib import Path

from fedgen_edge.config import from_table
from fedgen_edge.federation.rounds import mean_loss, rounds
from fedgen_edge.runs.build import build
from fedgen_edge.types import Order

TABLE = {
    "data": {"packages": ["json", "logging", "urllib"], "limit": 120, "length": 32},
    "federation": {"rounds": 3},
    "training": {"lr": 1e-2, "steps": 3},
    "personal": {"lr": 1e-2, "steps": 3},
}


def main(backbone: str = "tiny", folder: str = "adapters") -> None:
    parts = build(from_table({**TABLE, "backbone": {"path": backbone}}))
    state, plan = parts.start(), parts.settings.federation
    for commit in rounds(state, parts.algorithm, parts.engine, parts.train, plan):
        state = commit.state
        print(f"round {state.round}: loss {mean_loss(commit.updates):.3f}")

    orders = [Order((c,), state.round, state.adapter) for c in range(len(parts.names))]
    for tuned in parts.engine(orders, parts.tune):
        shard = parts.clients.shards[tuned.order.clients[0]]
        for name, adapter in {"global": state.adapter, "personal": tuned.adapter}.items():
            found = parts.evaluate_client(adapter, shard.test)
            print(f"{shard.name}, {name}: {found['total'] / found['count']:.3f} nats a token")
        parts.task.model.save(Path(folder, shard.name), tuned.adapter, parts.settings, {})


if __name__ == "__main__":
    main(*sys.argv[1:])
