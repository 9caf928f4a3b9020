"""No honest training exceeds the bounds, whatever its gradients; some training reaches them."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, AdamW

from contracts.test_contracts import make, shards
from fedgen_edge.config import Training
from fedgen_edge.data.batches import Budget, make_batches
from fedgen_edge.federation.client import (
    Recipe,
    clip_gradients,
    local_update,
    make_optimizer_factory,
)
from fedgen_edge.leaves import scale
from fedgen_edge.network.bounds import Bounds, compute_reach, compute_spectral_norm, find_excess
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TASKS
from fedgen_edge.types import Leaves, Phase

patient = settings(deadline=None, max_examples=200)
slopes = st.builds(
    lambda sign, power: sign * 10.0**power, st.sampled_from((-1, 1)), st.floats(-12, 8)
)
BETAS = [(0.9, 0.999), (0.0, 0.99), (0.9, 0.95), (0.0, 0.0), (0.5, 0.9999)]


def walked(made: torch.optim.Optimizer, leaf: Tensor, gradients: Sequence[float]) -> float:
    """How far an optimiser moves a number."""
    begun = float(leaf.detach())
    for gradient in gradients:
        leaf.grad = torch.tensor(gradient)
        made.step()
    return abs(float(leaf.detach()) - begun)


def moves(training: Training, gradients: Sequence[float], start: float = 0.0) -> tuple[float, bool]:
    """How far a number moves in a round at rate 0.01, and whether the bound allows it."""
    leaf = torch.tensor(start, requires_grad=True)
    far = walked(make_optimizer_factory(training, 0.01)([leaf]), leaf, gradients)
    bounds = Bounds(9, training, 0.01)
    delta = {"w": leaf.detach() - start}
    return far, find_excess(bounds, len(gradients), {"w": torch.tensor(start)}, delta) is None


@patient
@given(
    gradients=st.lists(slopes, min_size=1, max_size=40),
    betas=st.sampled_from(BETAS),
    decay=st.sampled_from((0.0, 0.1, 30.0)),
    start=st.floats(-1e6, 1e6, width=32),
)
def test_adamw_never_exceeds_its_bound(
    gradients: list[float], betas: tuple[float, float], decay: float, start: float
) -> None:
    assert moves(Training(betas=betas, weight_decay=decay), gradients, start)[1]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_rounding_of_a_large_number_is_not_taken_for_movement(kind: str) -> None:
    # near 2e5 float32 are 1/64 apart: ten steps of 0.01, each rounded up, move 0.156 and not 0.1
    training = Training(optimizer=kind)  # pyright: ignore[reportArgumentType]
    assert moves(training, [-1.0] * 10, 2e5) == (pytest.approx(10 / 64), True)
    # nor in an average that began at 0, and took its place
    start = {"w": torch.tensor(2e5), "average.w": torch.tensor(0.0)}
    delta = {"w": torch.tensor(10 / 64), "average.w": torch.tensor(2e5 + 10 / 64)}
    assert find_excess(Bounds(9, training, 0.01), 10, start, delta) is None


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_gradients_that_grow_reach_adamws_bound(betas: tuple[float, float], steps: int) -> None:
    # Cauchy and Schwarz are equal where g_i goes as (b2 / b1)^i; without b1, as fast as it can
    growth = min(betas[1] / betas[0], 10.0) if betas[0] else 10.0
    gradients = [1e-3 * growth**i for i in range(steps)]
    training = Training(betas=betas)
    found = compute_reach(training, 0.01, steps)
    assert found is not None
    far, allowed = moves(training, gradients)
    assert allowed
    assert far == pytest.approx(found.gain, rel=1e-2)


def test_the_paper_of_adam_understates_how_far_it_can_go() -> None:
    # its max(1, 0.1 / sqrt(0.001)) = 3.16 of a step; with gradients that grow by 0.999 / 0.9, step
    # 300 moves by 0.1 / sqrt(0.001 * (1 - 0.81 / 0.999)) = 7.27 times sqrt(1 - 0.999^300) = 0.509
    gradients = [(0.999 / 0.9) ** i for i in range(300)]
    (far, allowed), (less, _) = moves(Training(), gradients), moves(Training(), gradients[:-1])
    assert allowed
    assert (far - less) / 0.01 == pytest.approx(7.2738 * 0.5091, rel=1e-3)


@patient
@given(
    gradients=st.lists(slopes, min_size=1, max_size=40),
    momentum=st.sampled_from((0.0, 0.5, 0.9)),
    decay=st.sampled_from((0.0, 0.1, 3.0)),
    start=st.floats(-1e6, 1e6, width=32),
)
def test_sgd_with_clipped_gradients_never_exceeds_its_bound(
    gradients: list[float], momentum: float, decay: float, start: float
) -> None:
    training = Training(optimizer="sgd", momentum=momentum, weight_decay=decay, clip=0.5)
    cut = [float(clip_gradients({"w": torch.tensor(g)}, 0.5, 0)["w"]) for g in gradients]
    assert moves(training, cut, start)[1]


def test_sgd_with_equal_gradients_reaches_its_bound() -> None:
    # 20 steps of 0.01 * 0.5
    training = Training(optimizer="sgd", clip=0.5)
    found = compute_reach(training, 0.01, 20)
    assert found is not None
    assert found.gain == pytest.approx(0.1)
    assert moves(training, [0.5] * 20) == (pytest.approx(0.1), True)
    assert not moves(training, [0.51] * 20)[1]


@pytest.mark.parametrize(
    "training",
    [
        Training(optimizer="sgd", clip=0),
        Training(optimizer="sgd", weight_decay=1e6),
        Training(betas=(0.9, 0.81)),
        Training(betas=(0.9, 0.0)),
        Training(weight_decay=101.0),
    ],
)
def test_where_no_bound_is_known_nothing_is_refused_for_it(training: Training) -> None:
    assert compute_reach(training, 0.01, 100) is None
    bounds = Bounds(9, training, 0.01)
    assert find_excess(bounds, 100, {"w": torch.zeros(1)}, {"w": torch.full((1,), 1e30)}) is None


def test_a_chain_that_may_stretch_anything_is_not_bounded_by_a_rate_of_zero() -> None:
    zero = {"w": torch.zeros(1)}  # nothing can move, and infinitely often nothing is no number
    assert find_excess(Bounds(9, Training(), 0.0, stretch=math.inf), 1, zero, zero) is None


def test_very_many_steps_are_bounded_in_no_time_and_by_no_less() -> None:
    few, many = compute_reach(Training(), 1.0, 100_000), compute_reach(Training(), 1.0, 10**12)
    assert few is not None
    assert many is not None
    assert many.gain / 10**12 == pytest.approx(few.gain / 100_000, rel=0.01)
    assert math.isclose(many.gain / 10**12, 7.27, rel_tol=0.01)


def test_a_sites_steps_go_by_its_examples() -> None:
    # 9 examples in batches of 4 are 3 steps, twice over; or as many as the settings say
    assert Bounds(9, Training(batch=4, epochs=2)).steps(9) == 6
    assert Bounds(9, Training(batch=4, epochs=2, steps=5)).steps(9) == 5
    assert Bounds(9).steps(9) is None


def test_each_phase_moves_by_its_own_rate_and_repeats() -> None:
    # after one batch: the critic's two steps of 0.1 * 3, and the generator's one of 0.1; AdamW's
    # first step moves by the rate, its second by at most
    # 0.1 / 0.19 * sqrt((1 + 0.81 / 0.999) * 1.999) = 1.0013 of it
    bounds = Bounds(9, Training(), 0.1, (Phase("critic.", 2, 3.0), Phase("generator.")))
    zeros = {"critic.w": torch.zeros(2), "generator.w": torch.zeros(2)}
    for name, most in (("critic.w", 0.6004), ("generator.w", 0.1)):
        for far, says in ((most * 0.999, None), (most * 1.001, name)):
            delta = {**zeros, name: torch.tensor([0.0, -far])}
            told = find_excess(bounds, 1, zeros, delta)
            assert (told is None) == (says is None)
            assert says is None or (told is not None and f"element of {name}" in told)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_average_moves_as_what_it_follows_and_their_gap(kind: str) -> None:
    # three steps of w reach 0.3 in one element; its average lies 1 away, so reaches 1.3
    training = Training(optimizer=kind, betas=(0.0, 0.0))  # pyright: ignore[reportArgumentType]
    bounds = Bounds(9, training, 0.1)
    start = {"w": torch.tensor([5.0]), "average.w": torch.tensor([4.0])}
    for far, allowed in ((1.299, True), (1.301, False)):
        delta = {"w": torch.tensor([0.2]), "average.w": torch.tensor([far])}
        assert (find_excess(bounds, 3, start, delta) is None) == allowed


@pytest.mark.parametrize("learnt", TASKS)
@pytest.mark.parametrize(
    "training",
    [
        Training(batch=2, epochs=2),
        Training(batch=2, epochs=2, betas=(0.0, 0.99), weight_decay=1.0, clip=0),
        Training(batch=2, epochs=2, optimizer="sgd", momentum=0.9, clip=1e-3),
    ],
    ids=["adamw", "adamw that decays", "sgd"],
)
def test_honest_clients_of_real_tasks_keep_to_the_bounds(learnt: str, training: Training) -> None:
    task = make(learnt)
    held, rng = shards(task)[0].train, generator("bounds")
    start = task.init(rng)
    begun = {k: v + 0.05 * torch.randn(v.shape, generator=rng) for k, v in start.items()}
    bounds = Bounds(99, training, 0.01, tuple(task.phases))
    dealt = make_batches(held, Budget(training.batch, training.epochs), "bounds")
    batches = [task.draw(batch, rng) for batch in dealt]
    assert len(batches) == bounds.steps(len(next(iter(held.values()))))
    recipe = Recipe(make_optimizer_factory(training, 0.01), training.clip)
    delta, _ = local_update(task, begun, {}, batches, recipe)
    assert find_excess(bounds, len(batches), begun, delta) is None
    # nor are the bounds far off: ten times as much is beyond them, and no step makes none of it
    assert find_excess(bounds, len(batches), begun, scale(delta, 10.0)) is not None
    assert find_excess(bounds, 0, begun, delta) is not None


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))


@patient
@given(size=shapes, seed=st.integers(0, 99), power=st.integers(-6, 3))
def test_the_spectrum_is_that_of_the_dense_change(
    size: tuple[int, int, int], seed: int, power: int
) -> None:
    out, rank, in_ = size
    rng = generator("spectrum", seed)
    a, b = torch.randn(rank, in_, generator=rng), torch.randn(out, rank, generator=rng)
    da, db = (10.0**power * torch.randn(v.shape, generator=rng) for v in (a, b))
    change = (b.double() + db) @ (a.double() + da) - b.double() @ a.double()
    expected = float(torch.linalg.svdvals(change).max())
    found = compute_spectral_norm({"l.lora_A": a, "l.lora_B": b}, {"l.lora_A": da, "l.lora_B": db})
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_kind_of_layer_has_a_spectrum_and_the_largest_counts() -> None:
    # From zero, the change of B A is dB dA. Linear: [1 0]' [2 0], 2. Embedding: 3. Convolution of
    # 1 channel by 2 x 2: A a row of four ones, norm 2, and B = 4: 8. Without a partner: none.
    delta: Leaves = {
        "x.lora_A": torch.tensor([[2.0, 0.0]]),
        "x.lora_B": torch.tensor([[1.0], [0.0]]),
        "e.lora_embedding_A": torch.tensor([[3.0, 0.0, 0.0]]),
        "e.lora_embedding_B": torch.tensor([[1.0], [0.0]]),
        "c.lora_A": torch.ones(1, 1, 2, 2),
        "c.lora_B": torch.full((1, 1, 1, 1), 4.0),
        "alone.lora_A": torch.full((1, 2), 99.0),
        "bias": torch.full((3,), 99.0),
    }
    start = scale(delta, 0.0)
    for names, expected in (("x", 2.0), ("e", 3.0), ("c", 8.0), ("xe", 3.0), ("xec", 8.0)):
        own = {k: v for k, v in delta.items() if k[0] in names or k[0] in "ab"}
        assert compute_spectral_norm(start, own) == pytest.approx(expected)
    assert compute_spectral_norm(start, {"alone.lora_A": delta["alone.lora_A"]}) == 0


def test_a_factor_that_is_not_sent_has_stayed_as_it_began() -> None:
    start = {"l.lora_A": torch.tensor([[3.0, 4.0]]), "l.lora_B": torch.tensor([[2.0], [0.0]])}
    # dB A is 0.5 times a vector of length 5; B dA is 2 times one of length 1
    assert compute_spectral_norm(
        start, {"l.lora_B": torch.tensor([[0.5], [0.0]])}
    ) == pytest.approx(2.5)
    assert compute_spectral_norm(start, {"l.lora_A": torch.tensor([[0.0, 1.0]])}) == pytest.approx(
        2.0
    )


def test_adamw_and_sgd_are_the_optimisers_that_are_bounded() -> None:
    leaf = [torch.zeros(1, requires_grad=True)]
    assert type(make_optimizer_factory(Training(), 0.1)(leaf)) is AdamW
    assert type(make_optimizer_factory(Training(optimizer="sgd"), 0.1)(leaf)) is SGD
