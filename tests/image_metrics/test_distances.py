import math
from itertools import combinations, pairwise, product

import pytest
import scipy.linalg
import torch
from torch import Tensor

from fedgen_edge.errors import DataError
from fedgen_edge.image_metrics import distances as module
from fedgen_edge.image_metrics.distances import (
    Moments,
    collapse,
    discrepancy,
    explain_too_few,
    floor,
    frechet,
    kernel_distance,
    moments,
    overlap,
    radii,
)
from fedgen_edge.seeds import generator


def cloud(count: int, width: int, *key: int | str) -> Tensor:
    """Correlated features whose mean is not 0."""
    rng = generator("cloud", *key)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64)
    return torch.randn(count, width, generator=rng, dtype=torch.float64) @ mix + mix[0]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(2, mean, covariance)


# ---- moments


@pytest.mark.parametrize("cuts", [[100], [1, 99], [0, 40, 3, 57, 0]])
def test_moments_add_up_however_the_pictures_are_cut(cuts: list[int]) -> None:
    features = cloud(100, 7)
    first, *others = (moments(part) for part in features.split(cuts))
    whole = sum(others, first)
    assert whole.count == 100
    torch.testing.assert_close(whole.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.covariance, features.mT.cov(), rtol=1e-12, atol=1e-12)


def test_large_means_do_not_eat_the_covariance() -> None:
    # squares near 1e12 are kept to 1e-4 in float64, so plain sums lose a variance of 1e-2
    features = 1e6 + 0.1 * cloud(400, 3)
    apart = features - features.mean(0)
    two_passes = apart.mT @ apart / 399
    parts = [moments(part) for part in features.split(50)]
    merged = sum(parts[1:], parts[0]).covariance
    plain = (features.mT @ features - 400 * torch.outer(*[features.mean(0)] * 2)) / 399
    assert (merged - two_passes).abs().max() < 1e-8
    assert (plain - two_passes).abs().max() > 1e-5


def test_what_is_not_finite_or_alone_is_refused() -> None:
    with pytest.raises(DataError, match=r"not finite: choose another image_metrics\.features"):
        moments(column(1, math.nan))
    with pytest.raises(DataError, match="a covariance needs 2 pictures, and there are 1"):
        _ = moments(column(1)).covariance


# ---- the Frechet distance


def test_covariances_that_commute_have_a_closed_form() -> None:
    # on common axes: |m1 - m2|^2 + sum (s1 - s2)^2 = (9 + 16) + (1 - 2)^2 + (3 - 1)^2 = 30
    turned, _ = torch.linalg.qr(cloud(2, 2))
    one, two = (
        gaussian(torch.tensor(mean).double(), turned @ (column(*spread) * turned.mT))
        for mean, spread in (((3.0, 0.0), (1, 9)), ((0.0, 4.0), (4, 1)))
    )
    assert frechet(one, two) == pytest.approx(30, rel=1e-12)


@pytest.mark.parametrize("width", [2, 64])
def test_the_distance_is_that_of_scipys_matrix_root(width: int) -> None:
    one, two = (moments(cloud(3 * width, width, name)) for name in ("one", "two"))
    root = scipy.linalg.sqrtm((one.covariance @ two.covariance).numpy())
    spread = one.covariance.trace() + two.covariance.trace() - 2 * root.real.trace()
    expected = float((one.mean - two.mean).square().sum() + spread)
    assert frechet(one, two) == pytest.approx(expected, rel=1e-6)
    assert frechet(two, one) == pytest.approx(expected, rel=1e-6)


def test_torch_fidelity_measures_the_same() -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity import metric_fid

    sets = cloud(200, 64, "one"), cloud(300, 64, "two")
    theirs = [metric_fid.fid_features_to_statistics(features) for features in sets]
    told = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)
    found = frechet(*(moments(features) for features in sets))
    assert found == pytest.approx(told["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("count", [500, 20])
def test_equal_moments_are_no_distance_apart_singular_or_not(count: int) -> None:
    found = moments(cloud(count, 32))
    assert 0 <= frechet(found, found) < 1e-6 * float(found.covariance.trace())


def test_pictures_on_a_line_are_as_far_apart_as_their_numbers() -> None:
    # singular in three dimensions; on the line, means 1 and 4, deviations 1 and 3: 9 + 4
    line = torch.tensor([[2.0, 1.0, 2.0]]).double() / 3
    one, two = column(0, 1, 2) @ line, column(1, 4, 7) @ line
    assert frechet(moments(one), moments(two)) == pytest.approx(13, rel=1e-7)


def test_the_floor_falls_with_n_and_is_that_of_the_halves() -> None:
    features = cloud(1600, 8)
    means = [
        sum(floor(features[:count], seed) for seed in range(5)) / 5 for count in (50, 200, 1600)
    ]
    assert all(more > 2 * less for more, less in pairwise(means))
    assert floor(features, 1) == floor(features, 1) != floor(features, 2)
    # of five pictures one is left out: halves of two
    assert floor(torch.ones(5, 1), 0) == 0
    with pytest.raises(DataError, match="halves needs 4 pictures, and there are 3"):
        floor(torch.ones(3, 1), 0)


def test_too_few_pictures_are_told_in_one_line() -> None:
    assert explain_too_few(65, 64) is None
    told = explain_too_few(64, 64)
    assert told is not None
    assert "64 pictures are too few for 64 features" in told
    assert "\n" not in told
    # as it says: of 64 centred rows at most 63 are independent
    assert torch.linalg.matrix_rank(moments(cloud(64, 64)).covariance) == 63
    assert torch.linalg.matrix_rank(moments(cloud(65, 64)).covariance) == 64


# ---- the kernel distance


def kernel(x: Tensor, y: Tensor) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def population(one: Tensor, two: Tensor) -> float:
    within = [
        sum(kernel(x, y) for x, y in combinations(group, 2)) / math.comb(len(group), 2)
        for group in (one, two)
    ]
    across = sum(kernel(x, y) for x, y in product(one, two)) / (len(one) * len(two))
    return sum(within) - 2 * across


def test_the_kernel_distance_of_samples_is_on_average_the_populations() -> None:
    # every sample of 3 from a population of 5, on both sides: 100 pairs
    one, two = cloud(5, 2, "one"), cloud(5, 2, "two")
    found = [
        discrepancy(one[list(a)], two[list(b)])
        for a, b in product(combinations(range(5), 3), repeat=2)
    ]
    assert len(found) == 100
    assert sum(found) / 100 == pytest.approx(population(one, two), rel=1e-10)


def truth(one: Tensor, two: Tensor) -> float:
    """Of two distributions that are even over these points."""
    means = [
        sum(kernel(x, y) for x, y in product(a, b)) / (len(a) * len(b))
        for a, b in ((one, one), (two, two), (one, two))
    ]
    return means[0] + means[1] - 2 * means[2]


@pytest.mark.parametrize(("width", "shift"), [(5, 0.0), (1, 1.0)])
def test_nineteen_intervals_in_twenty_hold_the_truth(width: int, shift: float) -> None:
    # corners of a cube, and of the same cube moved: equal, or known by counting pairs
    one = torch.tensor(list(product((-1.0, 1.0), repeat=width)), dtype=torch.float64)
    two, held = one + shift, 0
    known = truth(one, two) if shift else 0.0
    for trial in range(200):
        rng = generator("trial", trial)
        drawn = torch.randint(len(one), (2, 200), generator=rng)
        found = kernel_distance(one[drawn[0]], two[drawn[1]], trial)
        held += found.low <= known <= found.high
    # 190 expected of 200, with a deviation of 3.1
    assert 178 <= held <= 199


def test_the_kernel_distance_goes_by_its_seed_and_needs_pictures() -> None:
    one, two = cloud(40, 3, "one"), cloud(40, 3, "two")
    assert kernel_distance(one, two, 1) == kernel_distance(one, two, 1)
    assert kernel_distance(one, two, 1) != kernel_distance(one, two, 2)
    with pytest.raises(DataError, match="a kernel distance needs 20 pictures, and there are 19"):
        kernel_distance(one, two[:19], 1)


# ---- neighbours


def test_overlap_by_hand() -> None:
    # Nearest others: of 0, 1, 3 at 1, 1, 2; of 0.5, 0.75, 10 at 0.25, 0.25, 9.25.
    # 0.5 and 0.75 are in the balls of 0 and 1, and 10 in none: four of 1 * 3.
    # 1 is on the edge of 0.75's ball and 3 is in 10's; 0 is in none.
    found = overlap(column(0, 1, 3), column(0.5, 0.75, 10), k=1)
    assert found == pytest.approx((2 / 3, 2 / 3, 4 / 3, 2 / 3))


def test_radii_pass_over_the_picture_itself_but_not_over_its_twin() -> None:
    assert radii(column(0, 0, 2, 5), 1).tolist() == [0, 0, 2, 3]
    assert radii(column(0, 0, 2, 5), 2).tolist() == [2, 2, 2, 5]
    with pytest.raises(DataError, match="4 nearest neighbours needs 5 pictures, and there are 4"):
        radii(column(0, 0, 2, 5), 4)


def test_samples_as_good_as_real_have_the_density_and_coverage_of_theory() -> None:
    # Naeem et al.: density 1, coverage 1 - (n - 1)...(n - k) / ((2 n - 1)...(2 n - k)), n = 60
    runs = [overlap(*cloud(120, 2, seed).split(60)) for seed in range(100)]
    left = math.prod((60 - i) / (120 - i) for i in range(1, 6))
    assert sum(run.coverage for run in runs) / 100 == pytest.approx(1 - left, abs=0.01)
    assert sum(run.density for run in runs) / 100 == pytest.approx(1, abs=0.05)


def test_overlap_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = cloud(50, 3, "one"), cloud(40, 3, "two")
    whole = overlap(one, two)
    monkeypatch.setattr(module, "ROWS", 7)
    assert overlap(one, two) == pytest.approx(whole)


def test_a_missing_mode_lowers_recall_and_coverage_and_not_precision() -> None:
    both = torch.cat([cloud(100, 2, "mode"), cloud(100, 2, "mode") + 1000])
    alone = cloud(200, 2, "mode")
    found = overlap(both, alone)
    assert found.precision > 0.9
    assert found.recall <= 0.5
    assert found.coverage <= 0.5


# ---- mode collapse


def test_diversity_is_the_scale_of_samples_within_their_class() -> None:
    # real classes of width 1 around 0 and 100; samples half as wide, then one picture thrice
    real = torch.cat([cloud(20, 3), cloud(20, 3) + 1000])
    labels = torch.arange(2).repeat_interleave(20)
    halved = real[:20].mean(0) + (real[:20] - real[:20].mean(0)) / 2
    made = torch.cat([halved, real[20:21].expand(3, -1)])
    found = collapse(real, labels, made, labels[:23], 2)
    assert found.diversity == pytest.approx((0.5, 0), abs=1e-6)
    assert found.shares == pytest.approx((20 / 23, 3 / 23))
    assert found.real_shares == (0.5, 0.5)
    assert (found.coverage, found.recall) == overlap(real, made)[3:0:-2]


def test_samples_are_counted_where_they_lie_not_where_they_were_asked() -> None:
    # means 0, 10 and 20; all samples lie at 10 or 11, though asked as 0, 1 and 2
    real = column(-1, 0, 1, 9, 10, 11, 19, 20, 21)
    labels = torch.arange(3).repeat_interleave(3)
    made, asked = column(10, 11, 10, 11, 10, 11), torch.tensor([0, 0, 1, 1, 1, 2])
    found = collapse(real, labels, made, asked, 3)
    assert found.shares == (0, 1, 0)
    # real ones are 4 / 3 apart; 10, 11 are 1 apart, 10, 11, 10 are 2 / 3, and one is nothing
    assert found.diversity[:2] == pytest.approx((3 / 4, 1 / 2))
    assert math.isnan(found.diversity[2])


def test_a_class_without_real_pictures_is_refused() -> None:
    with pytest.raises(DataError, match="class 1's mean needs 1 pictures, and there are 0"):
        collapse(cloud(9, 2), torch.zeros(9).long(), cloud(9, 2), torch.zeros(9).long(), 2)
