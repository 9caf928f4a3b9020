"""What is kept, and on average of what."""

import pytest
import torch

from fedgen_edge.compression.sparsify import RandomK, TopK
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator


def test_the_largest_magnitudes_are_kept_in_the_order_of_their_places() -> None:
    values = torch.tensor([0.1, -3.0, 0.2, 2.0, -0.3])
    kept, parts = TopK(0.4).encode(values, 0)
    assert kept.tolist() == [-3.0, 2.0]
    assert TopK(0.4).decode(kept, parts, 5, 0).tolist() == [0.0, -3.0, 0.0, 2.0, 0.0]


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    kept, parts = TopK(0.5).encode(torch.tensor([1.0, -1.0, 1.0, -1.0]), 0)
    assert TopK(0.5).decode(kept, parts, 4, 0).tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("stage", [TopK, RandomK])
@pytest.mark.parametrize(
    ("density", "count", "kept"),
    [(0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (0.001, 30, 1), (1.0, 7, 7), (0.5, 1, 1)],
)
def test_a_share_is_rounded_up_and_is_one_at_least(
    stage: type[TopK] | type[RandomK], density: float, count: int, kept: int
) -> None:
    assert stage(density).count_kept(count) == kept
    assert len(stage(density).encode(torch.arange(count).float(), 0)[0]) == kept


@pytest.mark.parametrize("stage", [TopK, RandomK])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_a_density_that_is_no_share_is_refused(
    stage: type[TopK] | type[RandomK], density: float
) -> None:
    with pytest.raises(ConfigError, match=rf"^density={density} "):
        stage(density)


def test_both_sides_draw_the_same_places_from_a_seed_and_others_from_another() -> None:
    values = torch.arange(1.0, 101.0)
    stage = RandomK(0.2, scaled=False)
    kept, parts = stage.encode(values, 7)
    assert parts == {}
    found = stage.decode(kept, {}, 100, 7)
    assert torch.equal(found[found != 0], kept)
    assert torch.equal(found[found != 0], values[found != 0])
    assert int((found != 0).sum()) == 20
    assert not torch.equal(stage.encode(values, 8)[0], kept)


def test_scaled_random_values_are_right_on_average_and_the_others_a_share_of_that() -> None:
    # Each place is kept with probability 1/4: times 4 its mean is the value, its deviation
    # |value| sqrt(3). Over 1500 seeds the mean deviates by 0.0447 |value|: 5 times that is allowed.
    values = torch.randn(20, generator=generator("values"))
    for scaled, share in ((True, 1.0), (False, 0.25)):
        stage = RandomK(0.25, scaled)
        found = [stage.decode(stage.encode(values, s)[0], {}, 20, s) for s in range(1500)]
        off = torch.stack(found).mean(0) - share * values
        assert (off.abs() < 5 * 0.0447 * share * values.abs()).all()
