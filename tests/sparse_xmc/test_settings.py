import dataclasses
import re

import pytest

from sparse_xmc.settings import check, setting


@dataclasses.dataclass(frozen=True)
class Example:
    name: str = setting("a", choices=("a", "b"))
    rate: float = setting(0.5, above=0, at_most=1)
    bound: float | None = setting(None, above=0, or_else=(None,))
    interval: int = setting(3, at_least=1, or_else=(-1,))
    plain: bool = False

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
    ],
)
def test_what_is_not(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Example(**options)
