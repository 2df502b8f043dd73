"""The learning rate as a function of the update."""

from __future__ import annotations

import pytest

from utils.schedules import learning_rate_factor


def factors(total: int, warmup: int, scheduler: str, cycles: float = 3.5, floor: float = 0.0) -> list[float]:
    return [learning_rate_factor(step, total, warmup, scheduler, cycles, floor) for step in range(total)]


def test_the_warm_up_is_linear_and_its_last_update_is_at_the_peak() -> None:
    assert factors(8, 4, "constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_without_a_warm_up_the_first_update_is_at_the_peak(scheduler: str) -> None:
    assert factors(5, 0, scheduler)[0] == 1


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_linear_falls_evenly_to_the_floor(floor: float) -> None:
    expected = [floor + (1 - floor) * share for share in (1, 0.75, 0.5, 0.25, 0)]
    assert factors(7, 2, "linear", floor=floor)[2:] == pytest.approx(expected)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_cosine_of_half_a_period_more_ends_at_the_floor(floor: float) -> None:
    for cycles in (0.5, 1.5, 3.5):
        values = factors(701, 0, "cosine", cycles, floor)
        assert values[-1] == pytest.approx(floor, abs=1e-9)
        assert min(values) >= floor - 1e-9
        assert max(values) <= 1 + 1e-9


def test_a_cosine_returns_to_the_peak_once_a_cycle() -> None:
    values = factors(701, 0, "cosine", 3.5, 0.1)
    assert [step for step, value in enumerate(values) if value > 1 - 1e-9] == [0, 200, 400, 600]
    assert [step for step, value in enumerate(values) if value < 0.1 + 1e-9] == [100, 300, 500, 700]
    assert values[50] == pytest.approx(0.55)


def test_a_cosine_of_whole_periods_ends_at_the_peak() -> None:
    assert factors(101, 0, "cosine", 2.0)[-1] == pytest.approx(1)


def test_the_cosine_starts_after_the_warm_up() -> None:
    values = factors(106, 5, "cosine", 0.5)
    assert values[4] == values[5] == 1
    assert values[55] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 2), (2, 5)])
def test_the_shortest_trainings_have_rates_too(scheduler: str, total: int, warmup: int) -> None:
    assert all(0 < value <= 1 for value in factors(total, warmup, scheduler, floor=0.1))


def test_updates_past_the_end_stay_at_the_end() -> None:
    assert learning_rate_factor(99, 10, 0, "linear", min_ratio=0.2) == pytest.approx(0.2)


def test_an_unknown_scheduler_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="'polynomial'; valid: constant, linear, cosine"):
        learning_rate_factor(5, 10, 0, "polynomial")
