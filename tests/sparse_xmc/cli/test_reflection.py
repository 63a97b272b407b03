"""Tests of flags that are defined from dataclasses."""

import dataclasses

import pytest
from absl import flags

from sparse_xmc.cli import reflection
from sparse_xmc.settings import check, setting


@dataclasses.dataclass(frozen=True)
class Inner:
    """Settings within settings.

    Attributes:
      speed: how fast. Over
        two lines.
    """

    speed: float = setting(1.5, above=0)

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
      size: how large.
      name: one of two.
      bound: a number or none.
      moves: whether it moves.
      inner: more.
    """

    size: int = 3
    name: str = setting("a", choices=("a", "b"))
    bound: float | None = None
    moves: bool = True
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Round:
    """A kind.

    Attributes:
      radius: of the circle.
      colour: of the line.
    """

    radius: int = 1
    colour: str = "red"


@dataclasses.dataclass(frozen=True)
class Square:
    """Another."""

    side: int = 2
    colour: str = "blue"
    weight: float | None = 0.5


KINDS = {"round": Round, "square": Square}


@pytest.fixture
def parse():
    """Return a function that parses arguments; it returns the values by name, and the FlagValues."""
    values = flags.FlagValues()
    reflection.define_flags(Settings, flag_values=values)
    reflection.define_kinds("kind", KINDS, "round", "Which.", flag_values=values)

    def parse(*arguments):
        values.unparse_flags()
        values(["program", *arguments])
        return {name: values[name].value for name in values}, values

    return parse


def test_defaults_match_dataclass(parse):
    values, _ = parse()
    assert reflection.read_flags(Settings, values) == Settings()
    assert reflection.read_kind("kind", KINDS, values) == Round()


def test_given_flags_are_read(parse):
    arguments = ["--size=7", "--name=b", "--bound=0.5", "--nomoves", "--inner_speed=2"]
    values, _ = parse(*arguments, "--kind=square", "--side=5")
    assert reflection.read_flags(Settings, values) == Settings(7, "b", 0.5, False, Inner(2.0))
    assert reflection.read_kind("kind", KINDS, values) == Square(side=5)
    assert reflection.fields_of_kind("kind", KINDS, values) == {"side": 5, "colour": "blue", "weight": 0.5}


def test_none_can_be_given(parse):
    values, _ = parse("--bound=none", "--kind=square", "--weight=none")
    assert reflection.read_flags(Settings, values).bound is None
    assert reflection.read_kind("kind", KINDS, values) == Square(weight=None)
    assert reflection.fields_of_kind("kind", KINDS, values)["weight"] is None
    assert reflection.fields_of_other_kinds("kind", KINDS, values) == []
    with pytest.raises(flags.IllegalFlagValueError, match="weight"):
        parse("--weight=no")


def test_help_is_read_from_docstring(parse):
    _, flag_values = parse()
    assert flag_values["inner_speed"].help == "How fast. Over two lines."
    assert flag_values["size"].help == "How large."
    assert flag_values["colour"].help == "Of the line. By default: round red, square blue."


def test_flags_of_other_kinds_are_reported(parse):
    values, _ = parse("--kind=square", "--radius=3", "--colour=green")
    assert reflection.fields_of_other_kinds("kind", KINDS, values) == ["radius"]
    assert reflection.read_kind("kind", KINDS, values) == Square(colour="green")


def test_fields_of_one_name_with_two_types_raise():
    @dataclasses.dataclass(frozen=True)
    class Blob:
        radius: float = 1.0

    kinds = {"round": Round, "blob": Blob}
    with pytest.raises(TypeError, match=r"radius must have the same type in all classes, got .* in Round"):
        reflection.define_kinds("kind", kinds, "round", "Which.", flag_values=flags.FlagValues())


def test_invalid_values_raise(parse):
    with pytest.raises(flags.IllegalFlagValueError, match="name"):
        parse("--name=c")
    values, _ = parse("--inner_speed=-1")
    with pytest.raises(ValueError, match=r"speed must be above 0, got -1\.0"):
        reflection.read_flags(Settings, values)
