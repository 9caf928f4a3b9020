import pytest

from fedgen_edge.runs.pace import Pace, count_validations_left

ROUNDS, EVERY = 30, 5


def seconds_of(round_: int) -> tuple[float, float]:
    """Training and validation of a round: the first warms up, the others vary by a tenth."""
    training = 90.0 if round_ == 1 else 40.0 + 4.0 * (-1) ** round_
    return training, 6.0 if round_ % EVERY == 0 else 0.0


def test_after_the_second_round_the_time_left_is_right_within_a_third() -> None:
    ends = [0.0]
    for number in range(1, ROUNDS + 1):
        ends.append(ends[-1] + sum(seconds_of(number)))
    pace = Pace(ROUNDS, 0.0)
    assert pace.estimate_remaining(10.0) is None
    for number in range(1, ROUNDS):
        pace.add(ends[number], validation_seconds=seconds_of(number)[1])
        for now in (ends[number], ends[number] + 20):
            left = pace.estimate_remaining(now, count_validations_left(number, ROUNDS, EVERY))
            assert left is not None
            assert number < 2 or left == pytest.approx(ends[-1] - now, rel=1 / 3)


def test_rounds_that_take_alike_leave_what_arithmetic_says() -> None:
    # A round of 40 s and one of 40 + 6 s: of ten, eight are left, four of them with validation.
    pace = Pace(10, 0.0, warms_up=False)
    pace.add(40.0)
    pace.add(86.0, validation_seconds=6.0)
    assert pace.estimate_remaining(86.0, count_validations_left(2, 10, 2)) == pytest.approx(
        8 * 40 + 4 * 6
    )
    assert pace.estimate_remaining(96.0, 4) == pytest.approx(8 * 40 + 4 * 6 - 10)
    assert pace.estimate_remaining(1000.0, 4) == 0  # later than thought, and never below nothing


def test_clients_that_come_in_stacks_count_by_their_steps() -> None:
    # The longest are together and come first: 2 x 300 steps at 0.1 s, then 4 x 50.
    pace = Pace(800.0, 0.0, warms_up=False)
    pace.add(60.0, 300.0)
    pace.add(60.0, 300.0)
    assert pace.estimate_remaining(60.0) == pytest.approx(20.0)
    assert pace.estimate_remaining(65.0) == pytest.approx(15.0)


@pytest.mark.parametrize(("total", "every"), [(10, 1), (10, 3), (10, 10), (10, 20), (1, 1)])
def test_validations_to_come_are_those_that_the_run_makes(total: int, every: int) -> None:
    judged = [r for r in range(1, total + 1) if r % every == 0 or r == total]
    for done in range(total + 1):
        assert count_validations_left(done, total, every) == sum(r > done for r in judged)
