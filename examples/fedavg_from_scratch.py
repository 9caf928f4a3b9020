"""FedAvg of LoRA adapters in plain loops: what the library's rounds come to.

    python examples/fedavg_from_scratch.py [BACKBONE]

The clients' data and the layers are the library's; the algorithm is all here.
"""

import sys

import torch
from torch.nn.utils import clip_grad_norm_

from fedgen_edge.config import Settings, from_table
from fedgen_edge.data.batches import Budget, make_batches
from fedgen_edge.runs.build import build
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves


def settings(backbone: str = "tiny") -> Settings:
    return from_table(
        {
            "backbone": {"path": backbone, "precision": "float32"},
            "data": {"packages": ["json", "logging", "urllib"], "limit": 120, "length": 32},
            "federation": {"rounds": 3, "cohort": 2},
            "training": {"lr": 1e-2, "steps": 3, "batch": 4, "clip": 1.0},
            "engine": {"name": "serial"},
        }
    )


def main(backbone: str = "tiny") -> Leaves:
    told = settings(backbone)
    experiment = build(told)
    task, shards = experiment.task, experiment.clients.shards
    seed, budget = told.federation.seed, Budget(told.training.batch, steps=told.training.steps)
    adapter = task.init(generator(seed, "init"))
    for r in range(told.federation.rounds):
        order = torch.randperm(len(shards), generator=generator(seed, "sample", r))
        cohort, trained = sorted(order[: told.federation.cohort].tolist()), []
        for c in cohort:
            own = {name: leaf.clone().requires_grad_() for name, leaf in adapter.items()}
            optimiser = torch.optim.AdamW(own.values(), lr=told.training.lr, weight_decay=0)
            for batch in make_batches(shards[c].train, budget, seed, "train", r, c):
                loss = task.loss(own, batch, phase="")
                optimiser.zero_grad()
                (loss.total / loss.count).backward()
                clip_grad_norm_(own.values(), told.training.clip)
                optimiser.step()
            trained.append({name: leaf.detach() for name, leaf in own.items()})
        sizes = [len(shards[c].train["tokens"]) for c in cohort]
        shares = torch.tensor(sizes) / sum(sizes)
        stacks = {name: torch.stack([own[name] for own in trained], -1) for name in adapter}
        adapter = {name: stack @ shares for name, stack in stacks.items()}
        print(f"round {r + 1}: clients {cohort} of {sizes} blocks")
    return adapter


if __name__ == "__main__":
    main(*sys.argv[1:])
