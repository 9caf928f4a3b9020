"""Dropout as data: a mask is a function of a client's seed, a layer and a place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgen_edge.adapters.dropout import draw_mask
from fedgen_edge.adapters.lora import Lora, inject
from fedgen_edge.config import Adapter
from fedgen_edge.leaves import stack
from fedgen_edge.seeds import generator

patient = settings(deadline=None, max_examples=50)
SHARE = 0.3
COUNT = 100_000
SHAPE = (100, 10, 100)
WIDE = 5  # standard deviations: by chance, once in two million


def of(seed: int, layer: int = 0, share: float = SHARE) -> Tensor:
    return draw_mask(torch.tensor(seed), layer, SHAPE, share)


def agreement(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())


def assert_independent(one: Tensor, other: Tensor) -> None:
    """Two masks agree where both keep or both drop: 0.7^2 + 0.3^2 = 0.58 of places."""
    agree = SHARE**2 + (1 - SHARE) ** 2
    spread = math.sqrt(agree * (1 - agree) / one.numel())
    assert abs(agreement(one, other) - agree) < WIDE * spread


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_an_element_is_zero_or_one_over_the_share_that_is_kept(share: float) -> None:
    kept = torch.tensor(1 / (1 - share)).item()
    assert set(of(1, share=share).unique().tolist()) == ({0.0, kept} if share else {1.0})


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_the_share_of_zeros_is_the_settings(share: float, seed: int) -> None:
    # Binomial: the share's standard deviation is sqrt(p (1 - p) / n).
    zeros = float((of(seed, share=share) == 0).double().mean())
    assert abs(zeros - share) < WIDE * math.sqrt(share * (1 - share) / COUNT)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_mean_is_one(share: float) -> None:
    # A kept element is 1 / (1 - p), and 1 - p are kept: mean 1, variance p / (1 - p).
    mean = float(of(7, share=share).double().mean())
    assert abs(mean - 1) < WIDE * math.sqrt(share / (1 - share) / COUNT)


def test_layers_do_not_share_a_mask() -> None:
    masks = [of(3, layer) for layer in range(4)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert_independent(one, other)


def test_clients_do_not_share_a_mask_even_with_seeds_side_by_side() -> None:
    assert_independent(of(10), of(11))
    assert_independent(of(10, layer=1), of(11, layer=0))
    assert_independent(of(0), of(2**32))


def test_places_are_independent_of_the_places_before_them() -> None:
    flat = of(5).flatten()
    for step in (1, 2, 100, 1000):
        assert_independent(flat[step:], flat[:-step])


@patient
@given(
    seeds=st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=4),
    layer=st.integers(0, 1000),
    rows=st.integers(1, 4),
    share=st.floats(0, 0.9),
)
def test_a_stack_of_masks_is_each_clients_mask_and_drawn_again_it_is_equal(
    seeds: list[int], layer: int, rows: int, share: float
) -> None:
    shape = (rows, 3, 2)
    stacked = draw_mask(torch.tensor(seeds), layer, shape, share)
    assert stacked.shape == (len(seeds), *shape)
    alone = torch.stack([draw_mask(torch.tensor(s), layer, shape, share) for s in seeds])
    assert torch.equal(stacked, alone)
    assert torch.equal(stacked, draw_mask(torch.tensor(seeds), layer, shape, share))


def test_rows_that_fill_up_a_stack_leave_the_rows_before_them_alone() -> None:
    seed = torch.tensor([4, 9])
    longer, shorter = draw_mask(seed, 2, (6, 5), SHARE), draw_mask(seed, 2, (4, 5), SHARE)
    assert torch.equal(longer[:, :4], shorter)


# ---- in the layer


def linear(share: float) -> tuple[nn.Sequential, Lora]:
    """y = x + scale * B A (x * mask), the scale and B A being one: y = x + x * mask."""
    layer = nn.Linear(8, 8, bias=False)
    nn.init.eye_(layer.weight)
    model = nn.Sequential(layer)
    return model, inject(model, Adapter(rank=8, alpha=8, dropout=share, target_modules=("0",)))


def test_dropout_is_on_the_updates_input_alone() -> None:
    model, lora = linear(SHARE)
    own = {name: torch.eye(8) for name in lora.shapes()}
    x, seed = torch.randn(4, 8, generator=generator("x")), torch.tensor(6)
    with lora.bind(own, seed):
        torch.testing.assert_close(model(x), x + x * draw_mask(seed, 0, (4, 8), SHARE))
    with lora.bind(own):
        torch.testing.assert_close(model(x), 2 * x)


def test_a_stack_of_clients_drops_what_its_clients_drop_alone() -> None:
    model, lora = linear(SHARE)
    own = [{k: torch.eye(8) * c for k in lora.shapes()} for c in (1, 2, 3)]
    x, seeds = torch.randn(6, 8, generator=generator("x")), torch.tensor([6, 7, 8])
    with lora.bind(stack(own), seeds):
        stacked = model(x)
    for client, seed, part, out in zip(own, seeds, x.split(2), stacked.split(2), strict=True):
        with lora.bind(client, seed):
            torch.testing.assert_close(out, model(part))


def test_an_embeddings_tokens_are_never_dropped_or_multiplied() -> None:
    # As in PEFT, whose embedding has no dropout: its input is a number, not a strength.
    model = nn.Sequential(nn.Embedding(9, 4))
    lora = inject(model, Adapter(rank=2, dropout=0.5, target_modules=("0",)))
    rng = generator("factors")
    own = {k: torch.randn(s, generator=rng) for k, s in lora.shapes().items()}
    ids = torch.arange(9).reshape(3, 3)
    with lora.bind(own):
        undropped = model(ids)
    with lora.bind(own, torch.tensor(1)):
        torch.testing.assert_close(model(ids), undropped)
