"""How a round is worded."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.optim import SGD

from conftest import Line, line_shard
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.compression.wire import make_wire
from fedgen_edge.config import Compression
from fedgen_edge.data.batches import Budget
from fedgen_edge.errors import TrainingError
from fedgen_edge.federation.client import Recipe
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.orders import make_orders
from fedgen_edge.types import ServerState


@pytest.mark.parametrize(
    ("moved", "told"),
    [(1e6, "a change of 1e\\+06 .* fp16"), (torch.nan, "a change that is not finite")],
)
def test_what_cannot_go_down_is_told_with_its_round(moved: float, told: str) -> None:
    base = {"w": torch.tensor(0.0)}
    clients = Clients(Line(), Algorithm(), [line_shard("a", 4)], 0)
    job = Train(
        replace(clients, wire=make_wire(Compression(), Compression(dtype="fp16"), 0, base)),
        Budget(1),
        lambda _: Recipe(partial(SGD, lr=0.5)),
    )
    state = ServerState(2, {"w": torch.tensor(moved)})
    with pytest.raises(TrainingError, match=f"^round 3, to its clients: {told}"):
        make_orders(Algorithm(), job, state, 1)((0,))
