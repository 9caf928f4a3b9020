"""Merging by products against sums by hand, dense matrices, PEFT, and what must not matter."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedgen_edge.adapters.lora import KINDS
from fedgen_edge.algorithms import merge, products
from fedgen_edge.algorithms.factors import Pair, product
from fedgen_edge.leaves import add, subtract
from fedgen_edge.seeds import generator
from fedgen_edge.types import RESIDUAL, Leaves, Order, Update

RULES: dict[str, Callable[[Sequence[Update]], Leaves]] = {
    "mean": merge.mean,
    "by_svd": products.by_svd,
    "refined": products.refined(0.1),
    "with_residual": products.with_residual(99),
    "stacked": products.stacked(99),
}
EXACT = ("with_residual", "stacked")
LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (nn.Linear, (2, 9), (7, 2)),
    "pointwise": (nn.Conv2d, (2, 9, 1, 1), (7, 2, 1, 1)),
    "convolution": (nn.Conv2d, (2, 4, 3, 3), (7, 2, 1, 1)),
    "embedding": (nn.Embedding, (2, 9), (7, 2)),
}
LINEAR = Pair("linear.lora_A", "linear.lora_B")
patient = settings(deadline=None, max_examples=15)
seeds, several = st.integers(0, 999), st.integers(2, 4)
every_rule = pytest.mark.parametrize("name", RULES)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def names(layer: str) -> Pair:
    kind = KINDS[LAYERS[layer][0]]
    return Pair(f"{layer}.{kind.a}", f"{layer}.{kind.b}")


def drawn(seed: object, layers: Sequence[str] = tuple(LAYERS), rank: int | None = None) -> Leaves:
    """Random factors of some layers."""
    rng, found = generator("adapter", str(seed)), {}
    for layer in layers:
        _, a, b = LAYERS[layer]
        if rank:
            a, b = (rank, *a[1:]), (b[0], rank, *b[2:])
        pair = names(layer)
        found |= {pair.a: torch.randn(a, generator=rng), pair.b: torch.randn(b, generator=rng)}
    return found


def untrained(seed: object, layers: Sequence[str] = tuple(LAYERS)) -> Leaves:
    """Fresh factors: their product is zero."""
    zero = [names(k).a if k == "embedding" else names(k).b for k in layers]
    return {k: v * (k not in zero) for k, v in drawn(seed, layers).items()}


def cohort(received: Leaves, own: Sequence[Leaves], weights: Sequence[float]) -> list[Update]:
    """What comes back of clients that ended with these factors."""
    return [
        Update(Order((i,), 0, received), subtract(end, received), {}, float(w), 0.0, 1, 0)
        for i, (end, w) in enumerate(zip(own, weights, strict=True))
    ]


def cohort_of(seed: object, clients: int, received: Leaves | None = None) -> list[Update]:
    """Random clients of different weights, and a residual that is not zero."""
    if received is None:
        beside = {RESIDUAL + k: v for k, v in drawn(f"{seed} beside", rank=7).items()}
        received = {**drawn(seed), **beside}
    own = [drawn(f"{seed} {i}") for i in range(clients)]
    return cohort(received, own, [1.0, 5.0, 2.0, 4.0][:clients])


def dense(adapter: Leaves, layer: str) -> Tensor:
    """The whole update of a layer's weight, with its residual, as the model computes it."""
    kind, found = KINDS[LAYERS[layer][0]], torch.zeros(())
    for pair in (names(layer), names(layer).residual):
        if pair.a in adapter:
            found = found + kind.dense(adapter[pair.a].double(), adapter[pair.b].double())
    return found


def ideal(updates: Sequence[Update], layer: str) -> Tensor:
    """The mean of the products that clients computed with."""
    ends = [dense(add(u.order.received, u.delta), layer) for u in updates]
    total = sum(u.weight for u in updates)
    return torch.stack([end * u.weight / total for end, u in zip(ends, updates, strict=True)]).sum(
        0
    )


def after(name: str, updates: Sequence[Update]) -> Leaves:
    """The global adapter after a rule."""
    return add(updates[0].order.received, RULES[name](updates))


def close(left: Tensor, right: Tensor, relative: float = 1e-6) -> bool:
    return float((left - right).norm()) <= relative * float(right.norm())


def axes(weights: Sequence[float] = (1, 1), cap: int = 2) -> list[Update]:
    """Two clients of rank 1 whose products are e1 e1' and e2 e2'."""
    end = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    own = [{LINEAR.a: e, LINEAR.b: e.T} for e in end]
    zero = {k: torch.zeros_like(v) for k, v in own[0].items()}
    return cohort({**zero, **products.residuals(zero, cap)}, own, weights)


# --- by hand


def test_the_best_product_of_one_rank_is_the_heavier_axis_split_evenly() -> None:
    # 3/4 e1 e1' + 1/4 e2 e2': rank 1 keeps 3/4, as sqrt(3/4) in both factors
    change = products.by_svd(axes((3, 1)))
    torch.testing.assert_close(change[LINEAR.b], torch.tensor([[0.75**0.5], [0.0]]))
    torch.testing.assert_close(change[LINEAR.a], torch.tensor([[0.75**0.5, 0.0]]))


def test_a_sign_is_in_a_where_the_largest_of_b_is_positive() -> None:
    # B = -2 e1, A = 8 e2': 16, and the sign goes to A
    own = {LINEAR.b: torch.tensor([[-2.0], [0.0]]), LINEAR.a: torch.tensor([[0.0, 8.0]])}
    change = products.by_svd(cohort({k: v * 0 for k, v in own.items()}, [own], [1]))
    torch.testing.assert_close(change[LINEAR.b], torch.tensor([[4.0], [0.0]]))
    torch.testing.assert_close(change[LINEAR.a], torch.tensor([[0.0, -4.0]]))


def test_the_residual_is_the_covariance_weighed_by_examples() -> None:
    # p1 p2 (B1 - B2) (A1 - A2) = 3/16 [1, -1]' [1, -1]; without weights it would be 4/16
    # (published code averages uniformly: mistake 5)
    now = after("with_residual", [*axes((3, 1))])
    torch.testing.assert_close(now[LINEAR.b], torch.tensor([[0.75], [0.25]]))
    b, a = product(now, LINEAR.residual)
    torch.testing.assert_close(b @ a, torch.tensor([[3.0, -3], [-3, 3]]).double() / 16)


def test_a_stack_joins_the_residual_and_the_trained_pair_stays() -> None:
    updates = axes((3, 1))
    change = RULES["stacked"](updates)
    assert not change[LINEAR.a].any()
    assert not change[LINEAR.b].any()
    b, a = product(change, LINEAR.residual)
    torch.testing.assert_close(b @ a, torch.tensor([[0.75, 0], [0, 0.25]]).double())


def test_a_correction_goes_half_of_the_way_where_the_ridge_is_as_large_as_a() -> None:
    # 1 x 1: B 1 and 0, A 2 and 0. Ideal is 1; means are 1/2 and 1, so 1/2 is missed, and with
    # ridge 1 the correction is 1/2 * 1 / (1 + 1) = 1/4
    ends = [(1.0, 2.0), (0.0, 0.0)]
    own = [{LINEAR.b: torch.tensor([[b]]), LINEAR.a: torch.tensor([[a]])} for b, a in ends]
    now = add(own[1], products.refined(1.0)(cohort(own[1], own, (2, 2))))
    assert [float(now[k]) for k in (LINEAR.b, LINEAR.a)] == [0.75, 1.0]


def test_a_square_residual_is_not_transposed() -> None:
    # mistake 3: published code adds its transpose, which a square layer takes without a word.
    # One client's product is at (1, 2), the other's zero: half of it, at (1, 2)
    own = [
        {LINEAR.b: torch.tensor([[w], [0.0]]), LINEAR.a: torch.tensor([[0.0, w]])} for w in (1, 0)
    ]
    updates = cohort({**own[1], **products.residuals(own[1], 2)}, own, (1, 1))
    for name in EXACT:
        torch.testing.assert_close(
            dense(after(name, updates), "linear"), torch.tensor([[0, 0.5], [0, 0]]).double()
        )


# --- against dense matrices


@every_layer
def test_the_svd_rule_is_the_dense_svd_cut_to_the_rank(layer: str) -> None:
    updates = cohort_of(1, 3, untrained(1))
    whole = ideal(updates, layer)
    matrix = whole.flatten(1) if layer == "convolution" else whole.squeeze()
    u, s, v = torch.linalg.svd(matrix)
    cut = (u[:, :2] * s[:2] @ v[:2]).reshape(whole.shape)
    now = after("by_svd", updates)
    assert close(dense(now, layer), cut)
    # balanced: both factors' columns have the same size, the root of the singular value
    b, a = product(now, names(layer))
    torch.testing.assert_close(b.norm(dim=0), s[:2].sqrt())
    torch.testing.assert_close(a.norm(dim=1), s[:2].sqrt())


@every_layer
@pytest.mark.parametrize("name", EXACT)
def test_a_residual_makes_the_merge_exact(name: str, layer: str) -> None:
    updates = cohort_of(2, 4)
    assert close(dense(after(name, updates), layer), ideal(updates, layer))
    assert not close(dense(after("mean", updates), layer), ideal(updates, layer), 0.1)


@every_layer
def test_what_means_miss_is_the_covariance_of_the_factors(layer: str) -> None:
    updates = cohort_of(3, 3, {**untrained(3), **products.residuals(untrained(3), 99)})
    missed = ideal(updates, layer) - dense(after("mean", updates), layer)
    now = after("with_residual", updates)
    residual = {k.removeprefix(RESIDUAL): v for k, v in now.items() if k.startswith(RESIDUAL)}
    assert close(dense(residual, layer), missed, 1e-5)
    # of rank (K - 1) r = 4, though three clients have 6 columns
    values = torch.linalg.svdvals(torch.Tensor.__matmul__(*product(residual, names(layer))))
    assert int((values > 1e-6 * values[0]).sum()) == 4


@pytest.mark.parametrize("clients", [2, 3])
def test_three_rounds_stay_exact_while_the_cap_suffices(clients: int) -> None:
    # r (K - 1) * 3 <= 12 and r K * 3 <= 18 are above 7, the smaller side: it is never cut
    both = untrained("start")
    both |= {f"average.{k}": v for k, v in both.items()}
    for name in EXACT:
        state, base = {**both, **products.residuals(both, 7)}, {}
        for r in range(3):
            own = [
                {
                    **drawn(f"{name} {r} {i}"),
                    **{f"average.{k}": v for k, v in drawn(f"{name} {r} {i} average").items()},
                }
                for i in range(clients)
            ]
            updates = cohort(state, own, [1.0, 3.0, 2.0][:clients])
            state = add(state, RULES[name](updates))
            for prefix, layer in ((p, k) for p in ("", "average.") for k in LAYERS):
                sent = [{k: v for k, v in u.items() if k.startswith(prefix + layer)} for u in own]
                bare = [{k.removeprefix(prefix): v for k, v in u.items()} for u in sent]
                step = ideal(
                    cohort({k: v * 0 for k, v in bare[0].items()}, bare, _weights(updates)), layer
                )
                # as in the papers: what the trained pair does not hold is added to the weight
                held = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                trained = dense({k: held[k] for k in names(layer)}, layer)
                base[prefix + layer] = base.get(prefix + layer, 0) + step - trained
                frozen = {k: state[RESIDUAL + prefix + k] for k in names(layer)}
                assert close(dense(frozen, layer), base[prefix + layer], 2e-6)
            if name == "stacked":
                assert all(torch.equal(state[k], v) for k, v in both.items())


def _weights(updates: Sequence[Update]) -> list[float]:
    return [u.weight for u in updates]


@pytest.mark.parametrize("cap", [1, 2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_a_cut_residual_misses_the_tail_of_the_dense_spectrum(name: str, cap: int) -> None:
    start = untrained(4, ["linear"])
    own = [drawn(i, ["linear"]) for i in "abc"]
    updates = cohort({**start, **products.residuals(start, cap)}, own, (1, 2, 4))
    change = getattr(products, name)(cap)(updates)
    now = add(updates[0].order.received, change)
    whole = ideal(updates, "linear")
    tail = torch.linalg.svdvals(whole - dense({k: now[k] for k in LINEAR}, "linear"))[cap:]
    expected = float(tail.norm() / whole.norm())
    assert expected > 0.01
    assert products.errors(updates, change) == {"linear": pytest.approx(expected, rel=1e-5)}


@every_layer
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
def test_the_correction_is_the_dense_ridge_solution(layer: str, ridge: float) -> None:
    # rows of B + D are least squares of [ideal - B A, 0] on [A; sqrt(ridge) I]
    updates = cohort_of(5, 3, untrained(5))
    b, a = product(after("mean", updates), names(layer))
    whole = torch.stack(
        [
            torch.Tensor.__matmul__(*product(add(u.order.received, u.delta), names(layer)))
            * (u.weight / sum(_weights(updates)))
            for u in updates
        ]
    ).sum(0)
    wide = torch.cat([a, ridge**0.5 * torch.eye(2)], 1)
    missed = torch.cat([whole - b @ a, torch.zeros(7, 2)], 1)
    solved = torch.linalg.lstsq(wide.T, missed.T).solution.T
    found = product(add(updates[0].order.received, products.refined(ridge)(updates)), names(layer))
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
    updates = cohort_of(6, 3, {**untrained(6), **products.residuals(untrained(6), 99)})
    own = [add({k: u.order.received[k] for k in u.delta}, u.delta) for u in updates]
    model, shares = peft_model(own), [w / sum(_weights(updates)) for w in _weights(updates)]
    clients = [f"client {i}" for i in range(3)]
    for how, name in (("svd", "by_svd"), ("cat", "stacked")):
        rank = {"svd_rank": 2} if how == "svd" else {}
        model.add_weighted_adapter(clients, shares, how, combination_type=how, **rank)  # pyright: ignore
        now = after(name, updates)
        for layer in LAYERS:
            found = model.base_model.model[layer].get_delta_weight(how)  # pyright: ignore
            assert close(found.double(), 3 * dense(now, layer), 1e-5)


# --- what must not matter


@patient
@given(seed=seeds, order=st.permutations(range(4)))
@every_rule
def test_the_order_of_clients_does_not_matter(name: str, seed: int, order: list[int]) -> None:
    updates = cohort_of(seed, 4)
    one, other = after(name, updates), after(name, [updates[i] for i in order])
    assert all(close(dense(other, k), dense(one, k), 1e-5) for k in LAYERS)


@patient
@given(
    seed=seeds, scales=st.lists(st.sampled_from((-8.0, -1.0, 0.25, 3.0)), min_size=3, max_size=3)
)
@pytest.mark.parametrize("name", ["by_svd", *EXACT])
def test_how_a_client_splits_its_product_does_not_matter(
    name: str, seed: int, scales: list[float]
) -> None:
    # A / c and c B are the same product. A mean of factors is another with each c, and `refined`,
    # which keeps the mean A, too: neither is asked.
    updates = cohort_of(seed, 3)
    received = updates[0].order.received
    own = [add({k: received[k] for k in u.delta}, u.delta) for u in updates]
    split = [
        {k: v / c if k.endswith("_A") else v * c for k, v in end.items()}
        for end, c in zip(own, scales, strict=True)
    ]
    one, other = after(name, updates), after(name, cohort(received, split, _weights(updates)))
    assert all(close(dense(other, k), dense(one, k), 2e-5) for k in LAYERS)


@patient
@given(seed=seeds, which=st.integers(0, 2))
@every_rule
def test_a_client_cut_into_two_of_half_its_weight_does_not_matter(
    name: str, seed: int, which: int
) -> None:
    updates = cohort_of(seed, 3)
    half = replace(updates[which], weight=updates[which].weight / 2)
    halves = [*updates[:which], half, half, *updates[which + 1 :]]
    one, other = after(name, updates), after(name, halves)
    assert all(close(dense(other, k), dense(one, k), 1e-5) for k in LAYERS)


@patient
@given(seed=seeds, clients=st.integers(1, 4))
@every_rule
def test_one_client_and_equal_clients_are_the_identity(name: str, seed: int, clients: int) -> None:
    # mistake 1: published code keeps client 0 times its share, p0 times the product
    own = cohort_of(seed, 1)[0]
    updates = [replace(own, weight=w) for w in (1.0, 3.0, 2.0, 2.0)[:clients]]
    assert all(close(dense(after(name, updates), k), ideal([own], k), 1e-5) for k in LAYERS)


@every_rule
def test_float32_and_float64_agree_and_the_change_is_float32(name: str) -> None:
    updates = cohort_of(7, 3)
    received = {k: v.double() for k, v in updates[0].order.received.items()}
    precise = [
        replace(
            u,
            order=replace(u.order, received=received),
            delta={k: v.double() for k, v in u.delta.items()},
        )
        for u in updates
    ]
    change = RULES[name](updates)
    assert {v.dtype for v in change.values()} == {torch.float32}
    one, other = after(name, updates), add(received, RULES[name](precise))
    assert all(close(dense(one, k), dense(other, k), 1e-6) for k in LAYERS)


# --- leaves that are no pair, and clients that count for nothing


@every_rule
def test_other_leaves_and_factors_without_their_partner_are_averaged(name: str) -> None:
    rng = generator("others")
    others = ("linear.bias", "alone.lora_B", "other.lora_embedding_A")
    received = {k: torch.randn(3, 2, generator=rng) for k in (*others, "alone.lora_A")}
    own = [{k: torch.randn(3, 2, generator=rng) for k in others} for _ in range(3)]
    updates = cohort(received, own, (1, 2, 5))
    change, plain = RULES[name](updates), merge.mean(updates)
    assert change.keys() == {*others}
    assert all(torch.equal(change[k], plain[k]) for k in others)


@every_rule
def test_clients_without_weight_are_an_error(name: str) -> None:
    for updates in ([], axes((0, 0))):
        with pytest.raises(ValueError, match="positive weight"):
            RULES[name](updates)
    with pytest.raises(ValueError, match="positive weight"):
        products.errors(axes((0, 0)), {})


def test_a_residual_of_another_rank_and_a_ridge_of_zero_are_errors() -> None:
    for rule in (products.with_residual(2), products.stacked(2)):
        with pytest.raises(ValueError, match="has rank 1, and not 2"):
            rule(axes(cap=1))
    with pytest.raises(ValueError, match="ridge=0"):
        products.refined(0.0)


def test_residuals_are_zero_and_no_wider_than_their_layer() -> None:
    found = products.residuals(drawn(0), 5)
    assert not any(v.any() for v in found.values())
    assert found["residual.convolution.lora_A"].shape == (5, 4, 3, 3)
    assert found["residual.convolution.lora_B"].shape == (7, 5, 1, 1)
    assert products.residuals(drawn(0), 50)["residual.linear.lora_A"].shape == (7, 9)
    narrow = {LINEAR.a: torch.ones(2, 3), LINEAR.b: torch.ones(7, 2)}
    assert products.residuals(narrow, 50)[LINEAR.residual.b].shape == (7, 3)


# --- ranks that the product does not use, and moving averages


def test_ranks_that_the_product_leaves_keep_a_factor_to_train_with() -> None:
    # 4 e1 e1' uses one rank: 2 e1 in both factors. A's other direction is kept, without a B.
    start = {LINEAR.a: torch.eye(2, 3), LINEAR.b: torch.zeros(4, 2)}
    own = {LINEAR.a: torch.eye(2, 3), LINEAR.b: 4 * torch.eye(4, 1) * torch.eye(1, 2)}
    now = add(start, products.by_svd(cohort(start, [own], [1])))
    torch.testing.assert_close(now[LINEAR.b], 2 * torch.eye(4, 1) * torch.eye(1, 2))
    torch.testing.assert_close(now[LINEAR.a].abs(), torch.tensor([[2.0, 0, 0], [0, 1, 0]]))
    # an embedding is drawn the other way round: B is kept
    pair = Pair("e.lora_embedding_A", "e.lora_embedding_B")
    start = {pair.a: torch.zeros(2, 3), pair.b: torch.eye(4, 2)}
    own = {pair.a: 4 * torch.eye(2, 1) * torch.eye(1, 3), pair.b: torch.eye(4, 2)}
    now = add(start, products.by_svd(cohort(start, [own], [1])))
    torch.testing.assert_close(now[pair.a], 2 * torch.eye(2, 1) * torch.eye(1, 3))
    torch.testing.assert_close(now[pair.b].abs(), torch.eye(4, 2) * torch.tensor([2.0, 1.0]))


@every_layer
def test_a_product_of_zero_can_still_be_trained(layer: str) -> None:
    # nobody moved, or all that moved cancels: one factor is zero, and the other one leads its
    # gradient into as many directions, of the same sizes, as at the start
    start, pair = untrained(8, [layer]), names(layer)
    zero, lead = pair[::-1] if layer != "embedding" else pair
    step = drawn(9, [layer])[zero]
    for steps in ([0 * step], [step, -step]):
        own = [{**start, zero: start[zero] + s} for s in steps]
        now = add(start, products.by_svd(cohort(start, own, [1.0] * len(own))))
        assert not now[zero].any()
        before, after_ = (torch.linalg.svdvals(_matrix(k[lead])) for k in (start, now))
        torch.testing.assert_close(after_, before)


def _matrix(factor: Tensor) -> Tensor:
    return factor.flatten(1)


def test_a_moving_average_keeps_to_the_factors_that_it_follows() -> None:
    # diag(3, 2), and its average diag(2, 3). By size alone the average's first column would be e2,
    # and a step that mixes it with e1 would make a product of neither: it is turned, e1 first.
    ends = {"": torch.tensor([3.0, 2.0]), "average.": torch.tensor([2.0, 3.0])}
    own = {
        prefix + name: torch.diag(values) if name == LINEAR.b else torch.eye(2)
        for prefix, values in ends.items()
        for name in LINEAR
    }
    zero = {k: 0 * v for k, v in own.items()}
    now = add(zero, products.by_svd(cohort(zero, [own], [1])))
    for prefix, values in ends.items():
        for name in LINEAR:
            torch.testing.assert_close(now[prefix + name], torch.diag(values.sqrt()))


def test_a_moving_average_has_its_own_best_product() -> None:
    updates = cohort_of(11, 2)
    both = [
        replace(
            u,
            order=replace(u.order, received=_twice(u.order.received, 1.0)),
            delta=_twice(u.delta, 1.0) | {f"average.{k}": -0.3 * v for k, v in u.delta.items()},
        )
        for u in updates
    ]
    now = after("by_svd", both)
    slow = [replace(u, delta={k: -0.3 * v for k, v in u.delta.items()}) for u in updates]
    expected = after("by_svd", slow)
    for layer in LAYERS:
        pair = names(layer)
        found = product(now, Pair(f"average.{pair.a}", f"average.{pair.b}"))
        wanted = product(expected, pair)
        assert close(found.b @ found.a, wanted.b @ wanted.a, 1e-5)


def _twice(adapter: Leaves, factor: float) -> Leaves:
    return {**adapter, **{f"average.{k}": v * factor for k, v in adapter.items()}}


# --- diagnostics


def test_the_error_of_means_is_known_and_that_of_exact_rules_is_none() -> None:
    # e1 e1' and e2 e2': I / 2 of size sqrt(1/2); the means' product is 1/4 everywhere, and misses
    # 1/4 in each of four places, together 1/2
    updates = axes()
    assert products.errors(updates, merge.mean(updates)) == {"linear": pytest.approx(0.5**0.5)}
    # by_svd keeps one of the two: 1/2 of sqrt(1/2)
    assert products.errors(updates, products.by_svd(updates)) == {"linear": pytest.approx(0.5**0.5)}
    for rule in (products.with_residual(2), products.stacked(2)):
        assert products.errors(updates, rule(updates))["linear"] < 1e-6


@every_rule
def test_the_error_is_the_dense_one(name: str) -> None:
    updates = cohort_of(12, 3)
    found, now = products.errors(updates, RULES[name](updates)), after(name, updates)
    assert found.keys() == {*LAYERS}
    for layer in LAYERS:
        whole = ideal(updates, layer)
        off = float((dense(now, layer) - whole).norm() / whole.norm())
        assert found[layer] == pytest.approx(off, rel=1e-6, abs=1e-7)


def test_the_error_of_an_ideal_of_zero_is_none_or_without_end() -> None:
    zero = {LINEAR.a: torch.ones(1, 2), LINEAR.b: torch.zeros(2, 1)}
    updates = cohort(zero, [zero], [1])
    assert products.errors(updates, {}) == {"linear": 0}
    assert products.errors(updates, {LINEAR.b: torch.ones(2, 1)}) == {"linear": float("inf")}


def test_sizes_tell_a_layers_factors_and_its_rank_with_the_residual() -> None:
    # 2 e1 e1', and beside it 2 e2 e2': two equal directions
    adapter = {LINEAR.a: torch.tensor([[1.0, 0]]), LINEAR.b: torch.tensor([[2.0], [0]])}
    assert products.sizes(adapter) == {"linear": (pytest.approx(1), 1, 2)}
    adapter[LINEAR.residual.a] = torch.tensor([[0, 2.0]])
    adapter[LINEAR.residual.b] = torch.tensor([[0], [1.0]])
    assert products.sizes(adapter) == {"linear": (pytest.approx(2), 1, 2)}
