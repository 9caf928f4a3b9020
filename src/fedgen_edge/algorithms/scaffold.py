"""SCAFFOLD: every client's mean gradient is remembered, and its steps are freed of what is its own.

The server's variate c is the mean of all clients' c_k; a step uses g - c_k + c. After T steps of
plain SGD at rate eta, a client that moved by delta has c_k+ = -delta / (T eta) + c_k - c (option
II), so what c_k changes by is

    c_k+ - c_k = -delta / (T eta) - c,

which the server knows as well as the client: c travels down, and nothing more travels up.

A client may lose its c_k (a site's disk), and then trains with zero for it. What the lost one was
would stay in c for ever, and rounds would rest beside the optimum. So an update says what its
client has lost (`Update.lost_memory`), and the server takes that out of its sum as it adds the new
one.

Source: Karimireddy et al. 2020, SCAFFOLD (arXiv:1910.06378), algorithm 1 with a global rate of 1.
Differs: there, clients send the change of c_k; here both sides work it out from delta, as SCALLION
does (Huang et al. 2023, arXiv:2308.08165).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedgen_edge import leaves
from fedgen_edge.algorithms import server_optimizers
from fedgen_edge.types import AVERAGE, RESIDUAL, VARIATE, Leaves, Order, Phase, ServerState, Update

CLIENT_VARIATE = "own variate."
"""Begins, in a client's memory, the name of its c_k of a leaf."""


def compute_strides(phases: Sequence[Phase], rate: float) -> dict[str, float]:
    """How far a gradient of one moves a phase's leaves with each batch, under plain SGD."""
    return {phase.prefix: rate * phase.rate * phase.repeats for phase in phases}


def tells(state: ServerState, num_clients: int) -> Leaves:
    """c, of every leaf that is trained; zero before the first round.

    Args:
        state: the sum of all c_k is in its `method`, so that the mean follows their number.
        num_clients: clients that there are.
    """
    trained = (k for k in state.adapter if not k.startswith((AVERAGE, RESIDUAL)))
    sums = {k: state.method.get(VARIATE + k, torch.zeros_like(state.adapter[k])) for k in trained}
    return {VARIATE + k: v / num_clients for k, v in sums.items()}


def corrects(grads: Leaves, current: Leaves, start: Leaves, memory: Leaves) -> Leaves:
    """The gradient g - c_k + c; a client that never trained has a c_k of zero."""
    del current, start
    return {
        k: g - memory.get(CLIENT_VARIATE + k, 0.0) + memory[VARIATE + k] for k, g in grads.items()
    }


def learns(order: Order, delta: Leaves, steps: int, memory: Leaves) -> Leaves:
    """A client's c_k+, of what it has been told and how it moved."""
    changes = _compute_variate_changes(order, delta, steps)
    return {CLIENT_VARIATE + k: memory.get(CLIENT_VARIATE + k, 0.0) + v for k, v in changes.items()}


def merges(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The plain mean of the clients' changes; and how the sum of all c_k changes.

    Clients count alike, however many examples they have, as c counts them: what is found is the
    optimum of the plain mean of their losses. Weights would change the way there and not its end,
    where no client moves. A c_k that was lost is taken out.
    """
    del adapter
    mean_change = leaves.mean([u.delta for u in updates], torch.ones(len(updates)))
    variate_changes = [
        {
            k: v - u.lost_memory.get(CLIENT_VARIATE + k, 0.0)
            for k, v in _compute_variate_changes(u.order, u.delta, u.steps).items()
        }
        for u in updates
    ]
    return mean_change | {
        VARIATE + k: torch.stack([c[k] for c in variate_changes]).sum(0) for k in variate_changes[0]
    }


def steps(state: ServerState, change: Leaves) -> ServerState:
    """Add it: of the adapter, and of the sums in the server's memory."""
    sums = {k: state.method.get(k, 0.0) + v for k, v in change.items() if k.startswith(VARIATE)}
    return replace(server_optimizers.add(state, change), method={**state.method, **sums})


def _compute_variate_changes(order: Order, delta: Leaves, steps: int) -> Leaves:
    """c_k+ - c_k of each leaf that was trained, as both sides work it out."""
    server_variates = {
        k: order.received[VARIATE + k] for k in delta if VARIATE + k in order.received
    }
    return {
        k: -delta[k] / (steps * _get_stride(order.strides, k)) - c
        for k, c in server_variates.items()
    }


def _get_stride(by_prefix: Mapping[str, float], name: str) -> float:
    return next(stride for prefix, stride in by_prefix.items() if name.startswith(prefix))
