"""Timing of calls, shared by all measurements."""

import concurrent.futures
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from sparse_xmc.cli.environment import threads

TIME_BOX_SECONDS = 20.0
_COPY_BYTES = 1 << 28

Clock = Callable[[], float]
_Key = TypeVar("_Key", bound=Hashable)


def interleaved_times(
    calls: Mapping[_Key, Callable[[], Any]],
    repeats: int | None,
    *,
    calls_per_round: int = 1,
    seconds: float = TIME_BOX_SECONDS,
    min_rounds: int = 1,
    failures: dict[_Key, str] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[_Key, list[float]]:
    """Time calls in turn, so that other load of the machine affects all of them equally.

    Before the first round, each call runs once for compilation and warm-up, which is not counted.

    Args:
      calls: functions without arguments that return arrays.
      repeats: maximum number of rounds of a call; None for no limit except `seconds`.
      calls_per_round: number of calls in a round. They are queued, and only the last result is waited for, so
        that a device is never idle.
      seconds: time limit of a call; it is not called again once its rounds add up to this time.
      min_rounds: minimum number of rounds of a call.
      failures: dictionary for the reasons of failed calls, while other calls continue; None to raise errors.
      clock: function that returns the time in seconds.

    Returns:
      For each call that did not fail, the seconds per call in each of its rounds.
    """
    times: dict[_Key, list[float]] = {}
    active = dict(calls)
    while active:
        for key, call in list(active.items()):
            try:
                if key not in times:
                    _elapsed(call, 1, clock)
                    times[key] = []
                    continue
                times[key].append(_elapsed(call, calls_per_round, clock) / calls_per_round)
            except Exception as error:
                if failures is None:
                    raise
                failures[key] = reason(error)
                times.pop(key, None)
                del active[key]
                continue
            rounds, total = len(times[key]), calls_per_round * sum(times[key])
            if rounds == repeats or (total >= seconds and rounds >= min_rounds):
                del active[key]
    return times


def _elapsed(call: Callable[[], Any], count: int, clock: Clock) -> float:
    start = clock()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return clock() - start


def median_seconds(call: Callable[[], Any], repeats: int | None, **options: Any) -> float:
    """Return the median time of a call; arguments are as for `interleaved_times`."""
    return float(np.median(interleaved_times({"call": call}, repeats, **options)["call"]))


def copy_gb_per_second(size: int = _COPY_BYTES) -> float:
    """Return the GB per second, read plus written, of copying memory with all threads; best of ten runs."""
    source = np.ones(size, np.uint8)
    target = np.zeros_like(source)
    count = threads()
    pairs = list(zip(np.array_split(target, count), np.array_split(source, count), strict=True))
    with concurrent.futures.ThreadPoolExecutor(count) as pool:

        def copy():
            list(pool.map(lambda pair: np.copyto(*pair), pairs))

        return 2 * size / min(interleaved_times({"copy": copy}, 10)["copy"]) / 1e9


def reason(error: Exception) -> str:
    """Return an error as one line of at most 200 characters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
