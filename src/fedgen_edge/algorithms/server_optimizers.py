"""Slots that apply the merged change at the server.

A moving average takes no optimizer step: it follows other leaves, so its change is added.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fedgen_edge import leaves
from fedgen_edge.types import AVERAGE, Leaves, ServerState


def add(state: ServerState, change: Leaves) -> ServerState:
    """Add the change: FedAvg's step, of size one."""
    return replace(state, adapter=leaves.add(state.adapter, change))


def momentum(rate: float, decay: float) -> Callable[[ServerState, Leaves], ServerState]:
    """Add `rate` times a running sum of the changes, m = decay m + change.

    Source: Hsu et al. 2019, FedAvgM (arXiv:1909.06335).
    """

    def steps(state: ServerState, change: Leaves) -> ServerState:
        trained, averages = _split_averages(change)
        velocity = {
            k: decay * state.first_moment[k] + v if k in state.first_moment else v
            for k, v in trained.items()
        }
        server_step = leaves.scale(velocity, rate)
        state = replace(state, first_moment={**state.first_moment, **velocity})
        return add(state, {**server_step, **averages})

    return steps


def adaptive(
    second_moment: Callable[[Tensor, Tensor], Tensor],
    learning_rate: float,
    decay: float,
    floor: float,
) -> Callable[[ServerState, Leaves], ServerState]:
    """Add rate * m / (sqrt(v) + floor), element by element.

    m = decay m + (1 - decay) change, starting at 0; v accumulates squared changes, not squares of
    m, and starts at floor^2.

    Args:
        second_moment: the new v from the old one and the squared change: `adagrad`, `adam`,
            `yogi`.
        learning_rate: the server's learning rate.
        decay: decay rate of m.
        floor: keeps small changes small; the paper's tau.

    Source: Reddi et al. 2021, Adaptive Federated Optimization (arXiv:2003.00295), algorithm 2.
    """

    def steps(state: ServerState, change: Leaves) -> ServerState:
        trained, averages = _split_averages(change)
        means, squares, server_step = dict(state.first_moment), dict(state.second_moment), {}
        for k, v in trained.items():
            mean = (1 - decay) * v
            if k in means:
                mean = decay * means[k] + mean
            square = v.square()
            previous = squares[k] if k in squares else square.new_full((), floor**2)
            means[k], squares[k] = mean, second_moment(previous, square)
            server_step[k] = learning_rate * mean / (squares[k].sqrt() + floor)
        state = replace(state, first_moment=means, second_moment=squares)
        return add(state, {**server_step, **averages})

    return steps


def adagrad(previous: Tensor, square: Tensor) -> Tensor:
    """The sum of all squares."""
    return previous + square


def adam(decay: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exponential moving average of squares.

    Differs: no bias correction in the first rounds, which Flower's FedAdam adds to the paper.
    """
    return lambda before, square: decay * before + (1 - decay) * square


def yogi(decay: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A step toward the last square, by a fraction of it, however far away it is."""
    return lambda before, square: before - (1 - decay) * square * (before - square).sign()


def _split_averages(change: Leaves) -> tuple[Leaves, Leaves]:
    """The leaves that take optimizer steps, and the moving averages."""
    averages = leaves.select(change, lambda name: name.startswith(AVERAGE))
    return {k: v for k, v in change.items() if k not in averages}, averages
