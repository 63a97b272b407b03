import dataclasses
import json
import re
from typing import get_args, get_type_hints

import numpy as np
import pytest

from sparse_xmc import ClassifierConfig, EncoderConfig, RewireConfig, TrainingConfig
from sparse_xmc.encoders.pretrained_files import PretrainedConfig
from sparse_xmc.heads import HEADS
from sparse_xmc.model import PretrainedSettings
from sparse_xmc.settings import check, check_seed, setting

NETWORK = PretrainedConfig("bert", 100, 8, 1, 2, 16, 32)
SETTINGS = [
    ClassifierConfig(num_features=8, num_labels=4),
    EncoderConfig(),
    NETWORK,
    PretrainedSettings(NETWORK),
    RewireConfig(),
    TrainingConfig(),
    *(config() for config in HEADS.values()),
]
# -1 is a valid bias, and a rewiring interval of -1 means once per epoch.
NEGATIVE = {"output_bias", "rewire_interval"}


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
def test_valid_values_are_accepted(options):
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
def test_invalid_values_raise(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Example(**options)


def test_numbers_become_int_and_float_of_python():
    example = Example(rate=np.float32(0.5), interval=np.int64(4), offset=2)
    assert [type(value) for value in (example.rate, example.interval, example.offset)] == [float, int, float]
    assert (example.rate, example.interval, example.offset) == (0.5, 4, 2.0)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_every_field_rejects_invalid_values(settings):
    hints = get_type_hints(type(settings))
    for name in [field.name for field in dataclasses.fields(settings)]:
        kinds = get_args(hints[name]) or (hints[name],)
        wrong = [float("nan"), float("inf"), -float("inf"), object()]
        if int in kinds or float in kinds:
            wrong += ["1", True] + [-1] * (name not in NEGATIVE) + [1.5] * (float not in kinds)
        else:
            wrong += [-1, "no such choice"]
        for value in wrong:
            with pytest.raises(ValueError, match=rf"\b({name}|activation)\b"):
                dataclasses.replace(settings, **{name: value})


def test_numpy_scalars_become_python_scalars():
    example = Example(
        name=np.str_("b"),
        rate=np.float32(0.5),
        bound=np.float64(2),
        interval=np.int64(-1),
        plain=np.True_,
        offset=np.int32(3),
    )
    assert example == Example("b", 0.5, 2.0, -1, True, 3.0)
    assert [type(value) for value in vars(example).values()] == [str, float, float, int, bool, float]
    assert json.dumps(dataclasses.asdict(TrainingConfig(epochs=np.int64(2), rewire_interval=np.int64(-1))))
    config = ClassifierConfig(num_features=np.int64(8), num_labels=np.int64(4), bag_of_words=np.False_)
    assert json.dumps(config.to_json())
    assert json.dumps(dataclasses.asdict(HEADS["fixed_fan_in"](fan_in=np.int64(2))))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, None, True, "1"])
def test_seed_out_of_range_raises(seed):
    with pytest.raises(ValueError, match="seed must be a whole number between 0 and 4294967295, got"):
        check_seed(seed)


def test_check_seed_returns_int():
    assert check_seed(np.uint32(2**32 - 1)) == 2**32 - 1
    assert type(check_seed(np.int64(1))) is int
