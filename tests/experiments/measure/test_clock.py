"""Tests of the timing functions, with a fake clock that advances only in calls."""

import jax.numpy as jnp
import pytest

from experiments.measure.clock import copy_gb_per_second, interleaved_times, median_seconds


class FakeClock:
    """A clock that advances only in calls, which it records."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def call(self, name, *seconds):
        """Return a function whose calls take these times in order, and after that the last of them."""
        left = list(seconds)

        def run():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return jnp.zeros(1)

        return run


@pytest.fixture
def clock():
    return FakeClock()


def fail():
    raise ValueError("no gradient\nand many more lines")


def test_interleaved_times_alternates_calls_after_warm_up(clock):
    calls = {"a": clock.call("a", 100, 1, 2, 3), "b": clock.call("b", 7)}
    times = interleaved_times(calls, repeats=3, clock=clock)
    assert clock.calls == ["a", "b"] * 4
    assert times == {"a": [1, 2, 3], "b": [7, 7, 7]}


def test_interleaved_times_limits_time_and_records_failures(clock):
    calls = {
        "fast": clock.call("fast", 0.25),
        "slow": clock.call("slow", 2),
        "failing": fail,
        "too slow": clock.call("too slow", 100),
    }
    failures = {}
    times = interleaved_times(calls, repeats=8, seconds=5, failures=failures, clock=clock)
    assert times["fast"] == [0.25] * 8
    assert times["slow"] == [2] * 3  # 6 seconds
    assert times["too slow"] == [100]
    assert "failing" not in times
    assert failures == {"failing": "ValueError: no gradient"}


def test_interleaved_times_drops_calls_that_fail_later(clock):
    ours = clock.call("ours", 1)

    def third_fails():
        if clock.calls.count("ours") == 3:
            fail()
        return ours()

    failures = {}
    calls = {"a": third_fails, "b": clock.call("b", 1)}
    assert interleaved_times(calls, repeats=4, failures=failures, clock=clock) == {"b": [1] * 4}
    assert failures == {"a": "ValueError: no gradient"}


def test_error_of_call_is_raised_by_default(clock):
    with pytest.raises(ValueError, match="no gradient"):
        interleaved_times({"a": clock.call("a", 1), "b": fail}, repeats=1, clock=clock)
    with pytest.raises(ValueError, match="no gradient"):
        median_seconds(fail, repeats=1, clock=clock)


def test_interleaved_times_divides_round_by_number_of_calls(clock):
    calls = {"a": clock.call("a", 9, 1, 2, 6), "b": clock.call("b", 5)}
    times = interleaved_times(calls, repeats=2, calls_per_round=3, seconds=20, clock=clock)
    assert times == {"a": [3, 6], "b": [5, 5]}
    assert clock.calls == ["a", "b", *["a"] * 3, *["b"] * 3, *["a"] * 3, *["b"] * 3]
    # The limit applies to the 15 seconds of a whole round of b.
    assert interleaved_times(calls, 2, calls_per_round=3, seconds=15, clock=clock)["b"] == [5]


def test_median_seconds_respects_time_limit_and_min_rounds(clock):
    assert median_seconds(clock.call("a", 50, 1, 3, 8), None, seconds=12, clock=clock) == 3
    assert median_seconds(clock.call("a", 50, 10, 30, 20), None, seconds=1, min_rounds=3, clock=clock) == 20
    assert median_seconds(clock.call("a", 1), None, seconds=10, clock=clock) == 1


def test_copy_gb_per_second_is_positive():
    assert copy_gb_per_second(1 << 16) > 0
