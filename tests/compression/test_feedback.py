"""What error feedback is for, and where it ends: clients with losses that a reader can minimise.

Client c has the loss h_c (x - o_c)^2 / 2 in each coordinate, and sends one gradient step, all of
them in each round. The sum is least at the mean of o_c weighted by h_c.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedgen_edge.compression.chain import Chain, compress, compress_with_feedback, decompress
from fedgen_edge.compression.quantize import Quantize
from fedgen_edge.compression.sparsify import RandomK, TopK
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

# They pull the first coordinate apart, harder than they pull the second to 1: the best is (0, 1).
APART = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])
HALF = Chain((TopK(0.5),))

RNG = generator("optima")
OPTIMA = torch.randn(4, 10, generator=RNG)
CURVES = 0.5 + torch.rand(4, 10, generator=RNG)
BEST = (CURVES * OPTIMA).sum(0) / CURVES.sum(0)
FIFTH = Chain((TopK(0.2), Quantize(4)))


def trained(
    optima: Tensor,
    curves: Tensor,
    chain: Chain,
    rate: Callable[[int], float],
    rounds: int,
    *,
    feedback: bool = True,
) -> Tensor:
    """The model after the rounds, from zero."""
    x, rng = torch.zeros(optima.shape[1]), generator("rounding")
    left: list[Leaves] = [{} for _ in optima]
    for r in range(rounds):
        changes = []
        for c, (optimum, curve) in enumerate(zip(optima, curves, strict=True)):
            delta = {"x": -rate(r) * curve * (x - optimum)}
            if feedback:
                payload, left[c] = compress_with_feedback(chain, delta, left[c], 1.0, rng, r)
            else:
                payload = compress(chain, delta, rng, r)
            changes.append(decompress(chain, payload, {"x": tuple(x.shape)}, r)["x"])
        x = x + torch.stack(changes).mean(0)
    return x


def falling(round_: int) -> float:
    return 2 / (round_ + 20)


def test_without_feedback_opposed_clients_stand_still_beside_the_optimum() -> None:
    # At (0, 0) the gradients are (-3, -1) and (3, -1): the first is sent, and cancels, for ever.
    found = trained(APART, torch.ones(2, 2), HALF, falling, 50, feedback=False)
    assert found.tolist() == [0.0, 0.0]


def test_with_feedback_and_small_falling_steps_they_reach_it() -> None:
    found = trained(APART, torch.ones(2, 2), HALF, falling, 300)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]), rtol=0, atol=0.02)


def test_a_fifth_of_four_bits_reaches_the_optimum_with_feedback_and_only_then() -> None:
    # The start is farther than 1 from the optimum, and rates of 2 / (r + 20) sum to 4.3 in 150
    # rounds: without compression all but exp(-4.3 h), h from 0.7 on, of that is gone, a twentieth.
    assert 1 < float(BEST.norm()) < 2
    far = {
        "uncompressed": trained(OPTIMA, CURVES, Chain(), falling, 150, feedback=False),
        "with": trained(OPTIMA, CURVES, FIFTH, falling, 150),
        "without": trained(OPTIMA, CURVES, FIFTH, falling, 150, feedback=False),
    }
    off = {k: float((x - BEST).norm() / BEST.norm()) for k, x in far.items()}
    assert off["uncompressed"] < 0.05
    assert off["with"] < 0.05
    assert off["without"] > 0.5


def test_feedback_fails_at_a_step_at_which_uncompressed_training_is_there_at_once() -> None:
    # The curvature is 1, so a step of 1 arrives. With feedback the second coordinate waits until
    # what is left of it is more than the first's 3 (3 is not), and moves by all that has gathered:
    # to 4, where the first's turn comes with 6, while -3 gathers twice; so to -2, and then, after
    # twice 3, to 4 again, for ever. A smaller step makes the same circle smaller.
    def constant(_: int) -> float:
        return 1.0

    curves = torch.ones(2, 2)
    assert trained(APART, curves, Chain(), constant, 1).tolist() == [0.0, 1.0]
    for rounds, second in ((3, 0), (4, 4), (5, 4), (6, -2), (7, -2), (40, 4), (42, -2)):
        assert trained(APART, curves, HALF, constant, rounds).tolist() == [0.0, second]


def test_feedback_to_a_stage_that_overshoots_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scaled=False"):
        compress_with_feedback(
            Chain((RandomK(0.1),)), {"a": torch.ones(9)}, {}, 1.0, generator("any"), 7
        )


def test_what_is_left_out_is_sent_later() -> None:
    # Half of two values. First 3 of (3, 1), and 1 is left. Then (3, 1 + decay * 1): 3 again, and at
    # a decay of 1/2 1.5 is left; then (1, 1.5 / 2 + 1) = (1, 1.75): the second.
    chain, schema = Chain((TopK(0.5),)), {"a": (2,)}
    residual: Leaves = {}
    arrived, left = [], []
    for delta in ([3.0, 1.0], [3.0, 1.0], [1.0, 1.0]):
        payload, residual = compress_with_feedback(
            chain, {"a": torch.tensor(delta)}, residual, 0.5, generator("any"), 7
        )
        arrived.append(decompress(chain, payload, schema, 7)["a"].tolist())
        left.append(residual["a"].tolist())
    assert arrived == [[3.0, 0.0], [3.0, 0.0], [0.0, 1.75]]
    assert left == [[0.0, 1.0], [0.0, 1.5], [1.0, 0.0]]
