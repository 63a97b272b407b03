import dataclasses
import re

import numpy as np
import pytest

from sparse_xmc.settings import check, setting


@dataclasses.dataclass(frozen=True)
class Example:
    name: str = setting("a", choices=("a", "b"))
    rate: float = setting(0.5, above=0, at_most=1)
    bound: float | None = setting(None, above=0, or_else=(None,))
    interval: int = setting(3, at_least=1, or_else=(-1,))
    plain: bool = False
    offset: float = 0.0

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    "options", [{}, {"name": "b"}, {"rate": 1}, {"bound": 0.1}, {"interval": -1}, {"interval": 1}]
)
def test_what_is_allowed(options):
    Example(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "c"}, "name must be one of a, b, got 'c'"),
        ({"name": None}, "name must be one of a, b, got None"),
        ({"rate": 0}, "rate must be above 0 and at most 1, got 0"),
        ({"rate": 1.01}, "rate must be above 0 and at most 1, got 1.01"),
        ({"rate": float("nan")}, "rate must be above 0 and at most 1, got nan"),
        ({"rate": "1"}, "rate must be above 0 and at most 1, got '1'"),
        ({"rate": True}, "rate must be above 0 and at most 1, got True"),
        ({"bound": 0.0}, "bound must be above 0, or None, got 0.0"),
        ({"bound": float("inf")}, "bound must be above 0, or None, got inf"),
        ({"interval": 0}, "interval must be at least 1, or -1, got 0"),
        ({"interval": -2}, "interval must be at least 1, or -1, got -2"),
        ({"interval": 1.5}, "interval must be a whole number, at least 1, or -1, got 1.5"),
        ({"plain": 1}, "plain must be True or False, got 1"),
        ({"offset": float("nan")}, "offset must be a finite number, got nan"),
    ],
)
def test_what_is_not(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Example(**options)


def test_numbers_of_other_types_become_pythons():
    example = Example(rate=np.float32(0.5), interval=np.int64(4), offset=2)
    assert [type(value) for value in (example.rate, example.interval, example.offset)] == [float, int, float]
    assert (example.rate, example.interval, example.offset) == (0.5, 4, 2.0)
