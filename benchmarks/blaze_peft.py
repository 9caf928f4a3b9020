"""The same federation as users of BlazeFL write it, for `simulators.py`: PEFT, and a loop of torch.

    PYTHON benchmarks/blaze_peft.py FOLDER

As in BlazeFL's examples, a worker's training is a plain loop, and clients are processes of a pool
that each round forks anew: so the backbone, loaded before, is there in each. A process a core, with
one thread in each, and shared memory. Its threads would need a Python without a global lock.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is read: a process a core

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing as mp
from blazefl.core import (  # pyright: ignore[reportMissingImports]
    IPCMode,
    ProcessPoolClientTrainer,
    process_tensors_in_object,
)
from peers import Told, blocks, finish, kept, read
from peft import get_peft_model_state_dict
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import AdamW


@dataclass
class Asked:
    """What goes down."""

    values: torch.Tensor
    round: int


@dataclass
class Answer:
    """What comes up."""

    values: torch.Tensor
    weight: int = 0


@dataclass
class Client:
    """A client's configuration."""

    folder: str
    number: int


def moving(model: Any) -> list[torch.Tensor]:
    """What is trained; it travels as one vector."""
    return [p for p in model.parameters() if p.requires_grad]


def train(model: Any, rows: torch.Tensor, told: Told, seed: int) -> None:
    """Some steps of AdamW, through the rows in an order of their own."""
    optimiser = AdamW(moving(model), lr=told["lr"], weight_decay=0.0)
    rng = torch.Generator().manual_seed(seed)
    batches = torch.randperm(len(rows), generator=rng).split(told["batch"])
    model.train()
    for step in range(told["steps"]):
        ids = rows[batches[step % len(batches)]]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=told["bf16"]):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving(model), told["clip"])
        optimiser.step()
        optimiser.zero_grad()


class Trainer(ProcessPoolClientTrainer[Answer, Asked, Client]):
    """BlazeFL's pool of processes."""

    def __init__(self, folder: str) -> None:
        self.folder, self.cache, self.ipc_mode = folder, [], IPCMode.SHARED_MEMORY
        self.num_parallels, self.device, self.device_count = os.cpu_count() or 1, "cpu", 0
        self.manager = mp.Manager()
        self.stop_event = self.manager.Event()

    def get_client_config(self, cid: int) -> Client:
        """Which client it is."""
        return Client(self.folder, cid)

    def prepare_uplink_package_buffer(self) -> Answer:
        """Room for an answer, in shared memory."""
        return Answer(torch.empty_like(parameters_to_vector(moving(kept(self.folder))).detach()))

    def uplink_package(self) -> list[Answer]:
        """The round's answers."""
        package, self.cache = self.cache, []
        return package

    @staticmethod
    def worker(
        config: Client, payload: Asked, device: str, stop_event: Any, *, shm_buffer: Answer
    ) -> Answer:
        """A client's side."""
        del device, stop_event
        folder, number = config.folder, config.number
        told, model, rows = read(folder), kept(folder), blocks(folder, number)
        vector_to_parameters(payload.values.clone(), moving(model))
        train(model, rows, told, told["seed"] + payload.round * told["clients"] + number)
        shm_buffer.values.copy_(parameters_to_vector(moving(model)).detach())
        return process_tensors_in_object(Answer(shm_buffer.values, len(rows)), mode="replace")


def mean(answers: list[Answer]) -> torch.Tensor:
    """FedAvg's, weighted by examples."""
    whole = sum(answer.weight for answer in answers)
    return torch.stack([a.values * (a.weight / whole) for a in answers]).sum(0)


def main(folder: str) -> None:
    told, model = read(folder), kept(folder)
    trainer = Trainer(folder)
    values = parameters_to_vector(moving(model)).detach().clone()
    rng = torch.Generator().manual_seed(told["seed"])
    began = time.perf_counter()
    for number in range(told["rounds"]):
        cohort = torch.randperm(told["clients"], generator=rng)[: told["cohort"]].tolist()
        trainer.local_process(Asked(values, number), cohort)
        values = mean(trainer.uplink_package())
    seconds = time.perf_counter() - began
    vector_to_parameters(values, moving(model))
    finish(folder, model, get_peft_model_state_dict(model), seconds)


if __name__ == "__main__":
    main(sys.argv[1])
