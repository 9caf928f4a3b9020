"""What steps of a known machine teach is that machine."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fedgen_edge.config import Settings
from fedgen_edge.planning import speed
from fedgen_edge.planning.count import OperationCost, OperationCounter, make_fake_mode
from fedgen_edge.planning.speed import Speed, Trial, calibrate, fit_speed, load_speed

factors = some.floats(1e-3, 1e3)
COSTS = [
    OperationCost(1e3, 1e2, 1e7, 1e6),
    OperationCost(5e3, 1e3, 1e9, 2e7),
    OperationCost(2e3, 9e1, 4e10, 3e9),
    OperationCost(9e3, 4e2, 7e8, 8e9),
    OperationCost(1e4, 3e3, 6e11, 1e8),
]


@given(some.tuples(factors, factors, factors, factors))
@settings(deadline=None, max_examples=30)
def test_times_of_a_known_machine_give_its_factors_back(of: tuple[float, ...]) -> None:
    made = Speed(of[0] * 1e-6, of[1] * 1e-5, of[2] * 1e-11, of[3] * 1e-10, "made up")
    found = fit_speed(COSTS, [made.estimate_seconds(cost) for cost in COSTS], "")
    for cost in COSTS:
        assert found.estimate_seconds(cost) == pytest.approx(made.estimate_seconds(cost), rel=0.02)


def test_no_factor_is_negative() -> None:
    # the second takes ten times the work in a tenth of the time
    found = fit_speed(
        [OperationCost(1.0, 1.0, 1.0, 1.0), OperationCost(10.0, 10.0, 10.0, 10.0)], [1.0, 0.1], ""
    )
    assert min(found.per_op, found.per_product, found.per_flop, found.per_byte) >= 0


def test_seconds_are_a_sum_of_products() -> None:
    # 10 * 1 + 4 * 2 + 100 * 0.5 + 1000 * 0.01
    assert Speed(1.0, 2.0, 0.5, 0.01, "").estimate_seconds(
        OperationCost(10.0, 4.0, 100.0, 1000.0)
    ) == pytest.approx(78)


def test_a_calibration_is_kept_for_this_machine_and_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speed, "TRIALS", (Trial(32, 1, 64, 1, 8), Trial(32, 2, 64, 2, 8)))
    cpu = torch.device("cpu")
    assert load_speed(torch.float32, cpu) is None
    found = calibrate(Settings(), torch.float32, cpu)
    assert load_speed(torch.float32, cpu) == found
    assert load_speed(torch.bfloat16, cpu) is None
    assert found.estimate_seconds(OperationCost(1e3, 1e2, 1e6, 1e6)) > 0
    for path in (tmp_path / "fedgen-edge").glob("speed-*"):
        path.write_text("damaged")
    assert load_speed(torch.float32, cpu) is None


def test_live_bytes_operations_and_flops_are_counted() -> None:
    # A 4 x 8 and B 8 x 2 of float32 are 128 and 64 bytes; their product, 4 x 2, is 32 more and
    # takes 2 * 4 * 8 * 2 = 128 flops; it reads 192 bytes and writes 32. A view is nothing.
    with make_fake_mode(), (counter := OperationCounter()):
        a, b = torch.zeros(4, 8), torch.zeros(8, 2)
        counter.enter("product")
        c = a @ b
        assert counter.live_bytes == 128 + 64 + 32
        del a, b
        assert counter.live_bytes == 32
        assert c.T.shape == (2, 4)
        counter.enter("after")
        assert c.sum().item() == 1  # what is asked of a value that is not there
    seen = counter.stages
    assert seen["product"].cost == OperationCost(1.0, 1.0, 128.0, 224.0)
    assert (seen["product"].peak, seen["after"].peak) == (224, 36)


def test_what_was_there_before_counts_for_nothing() -> None:
    with make_fake_mode():
        weight = torch.zeros(8, 2)
        with (counter := OperationCounter([weight])):
            kept = weight.T
            assert (kept.shape, counter.live_bytes) == ((2, 8), 0)
            made = weight + 1
            assert (made.shape, counter.live_bytes) == ((8, 2), 64)
