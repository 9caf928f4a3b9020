"""Merging by products against dense matrices and PEFT."""

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedgen_edge.algorithms import merge_products
from fedgen_edge.algorithms.low_rank import get_product
from fedgen_edge.leaves import add, shapes
from fedgen_edge.types import AVERAGE, RESIDUAL, Leaves
from support.cohorts import (
    EXACT,
    LAYERS,
    LINEAR,
    after,
    averaged,
    changed,
    close,
    cohort,
    cohort_of,
    dense,
    drawn,
    every_layer,
    ideal,
    matrix,
    names,
    untrained,
    weights,
)

# --- against dense matrices


@every_layer
def test_the_svd_rule_is_the_dense_svd_cut_to_the_rank(layer: str) -> None:
    updates = cohort_of(1, 3, untrained(1))
    whole = ideal(updates, layer)
    u, s, v = torch.linalg.svd(whole.flatten(1) if layer == "convolution" else whole.squeeze())
    cut = (u[:, :2] * s[:2] @ v[:2]).reshape(whole.shape)
    now = after("flexlora", updates)
    assert close(dense(now, layer), cut)
    # balanced: both factors' columns have the same size, the root of the singular value
    b, a = get_product(now, names(layer))
    torch.testing.assert_close(b.norm(dim=0), s[:2].sqrt())
    torch.testing.assert_close(a.norm(dim=1), s[:2].sqrt())


@every_layer
def test_above_a_layers_sides_the_svd_rule_misses_nothing(layer: str) -> None:
    received = drawn(5, (layer,), rank=40)  # of 36 at most, in the convolution's A
    updates = cohort(received, [drawn(f"{i}", (layer,), rank=40) for i in range(3)], [1, 5, 2])
    now = after("flexlora", updates)
    assert shapes(now) == shapes(received)
    assert close(dense(now, layer), ideal(updates, layer))


@every_layer
def test_what_means_miss_is_the_covariance_of_the_factors(layer: str) -> None:
    updates = cohort_of(3, 3, {**untrained(3), **merge_products.make_residuals(untrained(3), 99)})
    missed = ideal(updates, layer) - dense(after("mean", updates), layer)
    now = after("fedex_lora", updates)
    pair = names(layer).residual
    assert close(dense({k: now[k] for k in pair}, layer), missed)
    # of rank (K - 1) r = 4, though three clients have 6 columns
    values = torch.linalg.svdvals(matrix(now, pair))
    assert int((values > 1e-6 * values[0]).sum()) == 4


@pytest.mark.parametrize(("name", "cap"), [("fedex_lora", 6), ("flora", 7)])
def test_three_rounds_stay_exact_while_the_cap_suffices(name: str, cap: int) -> None:
    # two clients' residuals have rank (2 - 1) * 2 a round, 6 in three; 7 is a layer's smaller side.
    # As in the papers, what the trained pair does not hold is added to the layer's weight.
    both, base = averaged(untrained(0), untrained(0)), {}
    state = {**both, **merge_products.make_residuals(both, cap)}
    for r in range(3):
        own = [averaged(drawn(f"{r} {i}"), drawn(f"average {r} {i}")) for i in range(2)]
        # what is frozen has no lag, so its average is itself, wherever the factors' average is
        state = add(state, changed(getattr(merge_products, name)(cap), cohort(state, own, (1, 3))))
        assert all(
            torch.equal(state[RESIDUAL + AVERAGE + k], state[RESIDUAL + k]) for k in drawn(0)
        )
        for layer in LAYERS:
            mean = (dense(own[0], layer) + 3 * dense(own[1], layer)) / 4
            held = dense({k: state[k] for k in names(layer)}, layer)
            base[layer] = base.get(layer, 0) + mean - held
            assert close(dense({k: state[k] for k in names(layer).residual}, layer), base[layer])
    if name == "flora":
        assert all(torch.equal(state[k], v) for k, v in both.items())


@pytest.mark.parametrize("cap", [1, 2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_a_cut_residual_misses_the_tail_of_the_dense_spectrum(name: str, cap: int) -> None:
    start = untrained(4, ["linear"])
    own = [drawn(i, ["linear"]) for i in "abc"]
    updates = cohort({**start, **merge_products.make_residuals(start, cap)}, own, (1, 2, 4))
    change = changed(getattr(merge_products, name)(cap), updates)
    now = add(updates[0].order.received, change)
    whole = ideal(updates, "linear")
    tail = torch.linalg.svdvals(whole - dense({k: now[k] for k in LINEAR}, "linear"))[cap:]
    expected = float(tail.norm() / whole.norm())
    assert expected > 0.01
    assert merge_products.measure_errors(updates, now) == {
        "linear": pytest.approx(expected, rel=1e-5)
    }


@every_layer
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
def test_the_correction_is_the_dense_ridge_solution(layer: str, ridge: float) -> None:
    # rows of B + D are least squares of [ideal - B A, 0] on [A; sqrt(ridge) I]
    updates = cohort_of(5, 3, untrained(5))
    b, a = get_product(after("mean", updates), names(layer))
    shares = [w / sum(weights(updates)) for w in weights(updates)]
    ends = [matrix(add(u.order.received, u.delta), names(layer)) for u in updates]
    whole = torch.stack([end * w for end, w in zip(ends, shares, strict=True)]).sum(0)
    wide = torch.cat([a, ridge**0.5 * torch.eye(2)], 1)
    missed = torch.cat([whole - b @ a, torch.zeros(7, 2)], 1)
    solved = torch.linalg.lstsq(wide.T, missed.T).solution.T
    start = updates[0].order.received
    found = get_product(add(start, merge_products.lora_fair(ridge)(start, updates)), names(layer))
    torch.testing.assert_close(found.b, b + solved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.a, a, rtol=1e-5, atol=1e-6)


# --- against PEFT


def peft_model(own: Sequence[Leaves]) -> PeftModel:
    """A model of the four layers with one adapter a client, of scale 6 / 2."""
    base = nn.ModuleDict(
        {
            "linear": nn.Linear(9, 7),
            "pointwise": nn.Conv2d(9, 7, 1),
            "convolution": nn.Conv2d(4, 7, 3),
            "embedding": nn.Embedding(9, 7),
        }
    )
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(LAYERS))
    model = get_peft_model(base, config, "client 0")  # pyright: ignore[reportArgumentType]
    for i in range(1, len(own)):
        model.add_adapter(f"client {i}", config)
    for i, adapter in enumerate(own):
        for name, value in adapter.items():
            layer, kind = name.split(".")
            held = getattr(model.base_model.model[layer], kind)[f"client {i}"]
            (held if isinstance(held, nn.Parameter) else held.weight).data.copy_(value)
    return model


def test_peft_combines_adapters_to_the_same_products() -> None:
    # PEFT works with alpha / rank = 3 inside and gives its result a scale of 1; it puts all
    # singular values into B ("svd"), or keeps all ranks ("cat"). The updates of the weights agree.
    updates = cohort_of(6, 3, {**untrained(6), **merge_products.make_residuals(untrained(6), 99)})
    own = [add({k: u.order.received[k] for k in u.delta}, u.delta) for u in updates]
    model, shares = peft_model(own), [w / sum(weights(updates)) for w in weights(updates)]
    clients = [f"client {i}" for i in range(3)]
    for how, name in (("svd", "flexlora"), ("cat", "flora")):
        rank = {"svd_rank": 2} if how == "svd" else {}
        model.add_weighted_adapter(clients, shares, how, combination_type=how, **rank)  # pyright: ignore
        now = after(name, updates)
        for layer in LAYERS:
            found = model.base_model.model[layer].get_delta_weight(how)  # pyright: ignore
            assert close(found.double(), 3 * dense(now, layer), 1e-5)
