"""Mixtures of two adapters, as dense products; and what of a client's memory is its own model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedgen_edge.algorithms.low_rank import (
    FactorNames,
    find_pairs,
    get_product,
    get_residual,
    sum_products,
)
from fedgen_edge.algorithms.merge_products import make_residuals
from fedgen_edge.algorithms.personal_models import (
    PERSONAL_PREFIX,
    PersonalModel,
    mix_adapters,
    unmix_adapters,
)
from fedgen_edge.algorithms.share import is_random_init
from fedgen_edge.leaves import norm, subtract
from fedgen_edge.seeds import generator
from fedgen_edge.types import RESIDUAL, Leaves

SHAPES = {
    "q.lora_A": (2, 5),
    "q.lora_B": (3, 2),
    "conv.lora_A": (2, 4, 3, 3),
    "conv.lora_B": (6, 2, 1, 1),
    "e.lora_embedding_A": (2, 7),
    "e.lora_embedding_B": (4, 2),
    "average.q.lora_A": (2, 5),
    "average.q.lora_B": (3, 2),
    "norm.bias": (3,),
}


def some(key: int, cap: int = 0) -> Leaves:
    """An adapter of random leaves; what is frozen in it is the same whatever the key."""
    rng, same = generator("beside", key), generator("frozen")
    own = {k: torch.randn(shape, generator=rng) for k, shape in SHAPES.items()}
    frozen = {k: torch.randn(v.shape, generator=same) for k, v in make_residuals(own, cap).items()}
    return own | (frozen if cap else {})


def dense(adapter: Leaves) -> dict[str, Tensor]:
    """Each layer's whole product, and what is no factor."""
    found = {}
    for pair in find_pairs(k for k in adapter if not k.startswith(RESIDUAL)):
        whole = sum_products([get_product(adapter, pair), get_residual(adapter, pair)])
        found[pair.layer] = whole.b @ whole.a
    return found | {"norm.bias": adapter["norm.bias"].double()}


@given(share=st.floats(0, 1), cap=st.sampled_from([0, 1, 3]))
def test_a_mixture_puts_out_a_share_of_one_and_the_rest_of_the_other(
    share: float, cap: int
) -> None:
    one, other = some(1, cap), some(2, cap)
    found, first, second = dense(mix_adapters(one, other, share)), dense(one), dense(other)
    for layer, whole in found.items():
        expected = share * first[layer] + (1 - share) * second[layer]
        torch.testing.assert_close(whole, expected, atol=2e-6, rtol=2e-6)


def test_a_mixture_is_of_ranks_side_by_side() -> None:
    for cap in (0, 3):
        found = mix_adapters(some(1, cap), some(2, cap), 0.25)
        for name, shape in SHAPES.items():
            assert found[name].shape == shape
        assert found[RESIDUAL + "conv.lora_A"].shape == (2 + cap, 4, 3, 3)
        assert found[RESIDUAL + "conv.lora_B"].shape == (6, 2 + cap, 1, 1)
        assert found[RESIDUAL + "e.lora_embedding_A"].shape == (2 + cap, 7)
        assert found[RESIDUAL + "e.lora_embedding_B"].shape == (4, 2 + cap)


def test_at_either_end_a_mixture_is_one_of_the_two() -> None:
    one, other = some(1), some(2)
    assert mix_adapters(one, other, 1.0) is one
    assert mix_adapters(one, other, 0.0) is other


def test_the_factor_that_is_drawn_at_random_keeps_its_size() -> None:
    one, found = some(1), mix_adapters(some(1), some(2), 0.25)
    for name in SHAPES:
        if "lora" in name:
            assert torch.equal(found[name], one[name] if is_random_init(name) else one[name] / 4)


@given(share=st.floats(0.01, 1), cap=st.sampled_from([0, 2]))
def test_an_adapter_is_found_again_in_its_mixture(share: float, cap: int) -> None:
    one, other = some(1, cap), some(2, cap)
    again = unmix_adapters(mix_adapters(one, other, share), other, share)
    assert again.keys() == one.keys()
    assert float(norm(subtract(again, one))) < 1e-6 / share


def test_what_was_trained_in_a_mixture_is_its_own_part() -> None:
    # B and the bias move by 3, A by 1, in a mixture of a quarter: B and the bias by 12, A by 1
    one, other = some(1), some(2)
    now = {k: v if k.startswith(RESIDUAL) else v + (1.0 if is_random_init(k) else 3.0)
           for k, v in mix_adapters(one, other, 0.25).items()}  # fmt: skip
    moved = subtract(unmix_adapters(now, other, 0.25), one)
    for name, change in moved.items():
        expected = torch.full_like(change, 1.0 if is_random_init(name) else 12.0)
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)


def test_means_of_factors_are_another_model() -> None:
    # q: B A = 1 * 1 and B' A' = -1 * -1: each is 1, and so is the mixture; mean factors make 0
    pair = FactorNames("q.lora_A", "q.lora_B")
    one = dict.fromkeys(pair, torch.ones(1, 1))
    other = dict.fromkeys(pair, -torch.ones(1, 1))
    found = mix_adapters(one, other, 0.5)
    whole = sum_products([get_product(found, pair), get_residual(found, pair)])
    assert float(whole.b @ whole.a) == 1.0


def test_a_client_without_a_model_of_its_own_begins_from_the_shared_one() -> None:
    shared = some(1, cap=2)
    assert PersonalModel().make_start(shared, {"kept:norm.bias": torch.ones(3)}) == shared
    found = dense(PersonalModel(share=0.5).make_start(shared, {}))
    for layer, whole in dense(shared).items():
        torch.testing.assert_close(found[layer], whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_model_of_its_own_is_kept_without_what_is_frozen(share: float) -> None:
    shared, own = some(1, cap=2), some(2)
    memory = {PERSONAL_PREFIX + k: v for k, v in own.items()}
    beside = PersonalModel(share=share)
    begun = beside.make_start(shared, memory)
    kept = beside.make_memory(begun, shared)
    assert {*kept} == {PERSONAL_PREFIX + name for name in SHAPES}
    for name, leaf in own.items():
        # halves and doubles are exact
        near = 0.0 if "lora" in name or share == 1 else 1e-6
        torch.testing.assert_close(kept[PERSONAL_PREFIX + name], leaf, atol=near, rtol=0)
