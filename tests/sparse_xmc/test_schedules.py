"""Tests of learning-rate schedules."""

import pytest

from sparse_xmc.train import SCHEDULES, Linear, Plateau


def test_plateau_halves_rate_after_two_epochs_without_improvement():
    plateau = Plateau(1e-3)
    rates = []
    for metric in [0.1, 0.2, 0.2005, 0.2009, 0.3, 0.3, 0.3]:
        plateau.update(metric)
        rates.append(plateau.learning_rate)
    assert rates == [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 2.5e-4]


def test_plateau_rate_has_lower_bound():
    plateau = Plateau(1e-3)
    for _ in range(30):
        plateau.update(0.5)
    assert plateau.learning_rate == 1e-4


def test_plateau_stops_after_four_epochs_without_improvement():
    plateau = Plateau(1e-3)
    for metric in [0.5, 0.50004, 0.49, 0.5]:  # an increase of 4e-5 is not an improvement
        plateau.update(metric)
        assert not plateau.should_stop
    plateau.update(0.5)
    assert plateau.should_stop
    plateau.update(0.6)
    assert not plateau.should_stop
    assert plateau.best == 0.6


def test_linear_rate_falls_to_zero():
    schedule = Linear.start(8e-3, epochs=4)
    assert [schedule.rate(progress) for progress in (0, 0.5, 1, 3.75)] == pytest.approx(
        [8e-3, 7e-3, 6e-3, 5e-4]
    )
    schedule.update(0.5)
    assert not schedule.should_stop
    assert schedule.rate(1) == 6e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_at_learning_rate(name):
    assert SCHEDULES[name].start(1e-2, epochs=3).rate(0) == 1e-2
