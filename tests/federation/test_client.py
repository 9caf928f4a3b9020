from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW

from conftest import Line, numbers
from fedgen_edge.algorithms.local_corrections import add_proximal_term
from fedgen_edge.config import Training
from fedgen_edge.data.batches import Budget, make_batches, stack
from fedgen_edge.federation.client import (
    Patience,
    Recipe,
    TrainingStep,
    clip_gradients,
    descend,
    local_update,
    make_optimizer_factory,
    personalize,
)
from fedgen_edge.network.bounds import Bounds, find_excess
from fedgen_edge.types import Batch, Leaves, PerClient

HALF = Recipe(partial(SGD, lr=0.5))


def later(name: str, epoch: int) -> bool:
    """Train nothing in the first epoch."""
    del name
    return epoch > 0


def only(leaf: str) -> Callable[[str, int], bool]:
    """Train one leaf."""
    return lambda name, _: name == leaf


def batches(*values: float) -> list[Batch]:
    return [
        {**numbers(v), "epoch": torch.tensor(0), "last": torch.tensor(i == len(values) - 1)}
        for i, v in enumerate(values)
    ]


def test_a_step_of_sgd_goes_half_of_the_way() -> None:
    # gradient w - x; from 0, lr 0.5: to x/2 = 2; then 2 + (4 - 2)/2 = 3. Losses 8 and 2.
    delta, loss = local_update(Line(), {"w": torch.tensor(0.0)}, {}, batches(4, 4), HALF)
    assert float(delta["w"]) == 3.0
    assert float(loss.total) == 10.0
    assert float(loss.count) == 2.0


class Turned(Line):
    """The sum of a leaf's values times others, by the leaf's transpose."""

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]])
        del phase
        return PerClient((adapter["w"].mT * signs).sum(), batch["mask"].sum().float())


@pytest.mark.parametrize("turned", [False, True])
def test_adamw_moves_each_value_by_its_own_gradient_however_they_lie_in_memory(
    turned: bool,
) -> None:
    # gradients are signs; the first step of Adam goes by the rate against the sign of each
    start = torch.zeros(3, 2).mT if turned else torch.zeros(2, 3)
    recipe = Recipe(make_optimizer_factory(Training(weight_decay=0.0), 0.5))
    delta, _ = local_update(Turned(), {"w": start}, {}, batches(1), recipe)
    expected = torch.tensor([[-0.5, 0.5, 0.5], [0.5, -0.5, -0.5]])
    torch.testing.assert_close(delta["w"], expected)


def test_the_mean_is_over_examples_not_over_rows() -> None:
    # one row of two is padding: gradient 0 - 6, not -3; lr 0.5 gives 3.
    batch = {**batches(6)[0], "x": torch.tensor([6.0, 0.0]), "mask": torch.tensor([True, False])}
    delta, _ = local_update(Line(), {"w": torch.tensor(0.0)}, {}, [batch], HALF)
    assert float(delta["w"]) == 3.0


def test_fedprox_pulls_by_mu_times_the_distance_from_the_start() -> None:
    # first step: no distance yet, to 2. Second: gradient (2 - 4) + 1 * (2 - 0) = 0: it stays.
    recipe = Recipe(partial(SGD, lr=0.5), corrects=add_proximal_term(1.0))
    delta, _ = local_update(Line(), {"w": torch.tensor(0.0)}, {}, batches(4, 4), recipe)
    assert float(delta["w"]) == 2.0


def test_clipping_is_by_each_clients_own_norm_over_all_leaves() -> None:
    # norms 5 and 0.5, limit 1: the first is divided by 5, the second is left.
    grads = {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[4.0], [0.4]])}
    found = clip_gradients(grads, 1.0, 1)
    torch.testing.assert_close(found["a"], torch.tensor([[0.6], [0.3]]))
    torch.testing.assert_close(found["b"], torch.tensor([[0.8], [0.4]]))
    assert clip_gradients(grads, 0.0, 1) is grads


@pytest.mark.parametrize(("clip", "expected"), [(20.0, 0.5), (0.0, 0.5), (0.8, 0.4)])
def test_a_survey_is_one_clipped_step_down_the_sum_of_gradients_at_the_start(
    clip: float, expected: float
) -> None:
    # gradients 0 - 4 and 0 - 6, not 2 - 6: the sum is -10, clipped to 1 or 0.8, times rate 0.5
    recipe = Recipe(partial(SGD, lr=0.5), clip, sums_gradients=True)
    start = {"w": torch.tensor(0.0), "still": torch.tensor(3.0)}
    delta, loss = local_update(Line(), start, {}, batches(4, 6), replace(recipe, trains=only("w")))
    assert float(delta["w"]) == pytest.approx(expected, rel=1e-5)
    assert float(delta["still"]) == 0.0
    assert float(start["w"]) == 0.0
    assert (float(loss.total), float(loss.count)) == (8.0 + 18.0, 2.0)


def test_a_survey_moves_no_farther_than_the_gate_allows_of_one_step_of_adamw() -> None:
    training = Training(clip=20.0, lr=0.5)
    recipe = Recipe(partial(AdamW, lr=0.5), training.clip, sums_gradients=True)
    start = {"w": torch.tensor(0.0)}
    delta, _ = local_update(Line(), start, {}, batches(6), recipe)
    assert find_excess(Bounds(1, training, training.lr), 1, start, delta) is None


def test_untrained_leaves_stay() -> None:
    recipe = Recipe(partial(SGD, lr=0.5), trains=later)
    again = [{**b, "epoch": torch.tensor(i)} for i, b in enumerate(batches(4, 4))]
    delta, _ = local_update(Line(), {"w": torch.tensor(0.0)}, {}, again, recipe)
    assert float(delta["w"]) == 2.0  # the second batch alone


@pytest.mark.parametrize("optimiser", [partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.1)])
def test_a_finished_client_no_longer_changes(optimiser: partial) -> None:
    # momentum and AdamW move a row even at zero gradient: the short client must stop all the same.
    shards = [numbers(1, 2, 3, 4), numbers(5)]

    def stream(x: Batch) -> list[Batch]:
        return list(make_batches(x, Budget(1, epochs=2), 0))

    alone = [
        local_update(Line(), {"w": torch.tensor(0.0)}, {}, stream(x), Recipe(optimiser))
        for x in shards
    ]
    many, loss = local_update(
        Line(),
        {"w": torch.zeros(2)},
        {},
        stack([iter(stream(x)) for x in shards]),
        Recipe(optimiser),
    )
    torch.testing.assert_close(many["w"], torch.stack([delta["w"] for delta, _ in alone]))
    torch.testing.assert_close(loss.total, torch.stack([one.total for _, one in alone]))
    assert loss.count.tolist() == [8.0, 2.0]


def test_clients_of_one_stack_must_train_the_same_leaves() -> None:
    recipe = Recipe(partial(SGD, lr=0.5), trains=later)
    mixed = {
        "x": torch.ones(2, 1),
        "mask": torch.ones(2, 1, dtype=torch.bool),
        "epoch": torch.tensor([0, 1]),
        "last": torch.tensor([False, False]),
    }
    with pytest.raises(ValueError, match="same leaves"):
        local_update(Line(), {"w": torch.zeros(2)}, {}, [mixed], recipe)


def walk(*values: float) -> list[TrainingStep]:
    """Epochs that end at these leaves."""
    none = PerClient(torch.tensor(0.0), torch.tensor(1.0))
    return [TrainingStep({"w": torch.tensor(v)}, none, torch.tensor(True)) for v in values]


def own_loss(_: int, own: Leaves) -> float:
    return float(own["w"])


@pytest.mark.parametrize(
    ("path", "patience", "best", "chosen"),
    [
        ((3.0, 2.0, 4.0, 1.0), 1, 2.0, 2),  # stops after 4.0, so never sees 1.0
        ((3.0, 2.0, 4.0, 1.0), 2, 1.0, 4),  # waits once more
        ((6.0, 7.0), 1, 5.0, 0),  # nothing helps: the global adapter is kept
        ((float("nan"), 1.0), 1, 5.0, 0),  # not finite is not better
    ],
)
def test_tuning_keeps_the_best_and_stops(
    path: tuple[float, ...], patience: int, best: float, chosen: int
) -> None:
    start = {"w": torch.tensor(5.0)}
    ((own, history, kept),) = personalize(walk(*path), [start], own_loss, Patience(patience))
    assert float(own["w"]) == best
    assert kept == chosen
    assert history[0] == 5.0


def test_without_fallback_the_first_epoch_is_kept_at_least() -> None:
    start = {"w": torch.tensor(5.0)}
    ((own, _, chosen),) = personalize(
        walk(6.0, 7.0), [start], own_loss, Patience(1, fallback=False)
    )
    assert (float(own["w"]), chosen) == (6.0, 1)


def test_personalising_a_stack_equals_one_by_one() -> None:
    held = [numbers(1.0, 1.2), numbers(-2.0, -1.0, -3.0)]

    def judge(place: int, own: Leaves) -> float:
        return float((own["w"] - held[place]["x"].mean()) ** 2)

    def steps(x: Batch) -> list[Batch]:
        return list(make_batches(x, Budget(1, epochs=4), 0))

    order = (1, 0)  # the longer client first
    start = {"w": torch.tensor(0.0)}
    alone = [
        personalize(
            descend(Line(), start, {}, steps(held[c]), HALF),
            [start],
            lambda _, own, c=c: judge(c, own),
            Patience(1),
        )[0]
        for c in order
    ]
    many = personalize(
        descend(
            Line(), {"w": torch.zeros(2)}, {}, stack([iter(steps(held[c])) for c in order]), HALF
        ),
        [start, start],
        lambda place, own: judge(order[place], own),
        Patience(1),
    )
    for one, stacked_one in zip(alone, many, strict=True):
        torch.testing.assert_close(one[0]["w"], stacked_one[0]["w"])
        assert one[1:] == stacked_one[1:]
