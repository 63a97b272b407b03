"""Flags made from configuration dataclasses, with their names, types, defaults, choices and help texts."""

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_origin, get_type_hints

from absl import flags

# The value of a flag for a setting of None. A flag of `define_kinds` with the value None was not given.
NONE = "none"


def define_flags(settings: type, prefix: str = "", flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define a flag for each field; flags of nested configurations have the field's name as a prefix."""
    for field, kind in _fields(settings):
        name = f"{prefix}{field.name}"
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            define_flags(kind, f"{name}_", flag_values)
        else:
            _define(name, field.default, kind, field, _help(settings, field.name), flag_values)


def read_flags(settings: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Make a configuration from the values of the flags of `define_flags`, given by name.

    Raises:
      ValueError: a value is not allowed.
    """
    arguments = {}
    for field, kind in _fields(settings):
        is_nested = dataclasses.is_dataclass(kind)
        name = f"{prefix}{field.name}"
        arguments[field.name] = read_flags(kind, values, f"{name}_") if is_nested else _setting(values[name])
    return settings(**arguments)


def define_kinds(
    name: str,
    kinds: Mapping[str, type],
    default: str,
    help: str,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Define a flag that chooses one of several configuration classes, and a flag for each of their fields.

    The flags of fields have no default: a field that is not given has the default of the chosen class.
    Classes with a field of the same name share a flag; its choices and help text are from the first class.

    Raises:
      TypeError: fields of the same name have different types.
    """
    flags.DEFINE_enum(name, default, list(kinds), help, flag_values=flag_values)
    found: dict[str, tuple] = {}
    for kind, settings in kinds.items():
        for field, field_type in _fields(settings):
            first_type, _, first, defaults = found.setdefault(field.name, (field_type, field, settings, []))
            if field_type != first_type:
                raise TypeError(
                    f"{field.name} must have the same type in all classes, got {first_type} in "
                    f"{first.__name__} and {field_type} in {settings.__name__}"
                )
            defaults.append(f"{kind} {field.default}")
    for field_name, (field_type, field, settings, defaults) in found.items():
        text = f"{_help(settings, field_name)} By default: {', '.join(defaults)}."
        _define(field_name, None, field_type, field, text, flag_values)


def read_kind(name: str, kinds: Mapping[str, type], values: Mapping[str, Any]) -> Any:
    """Make a configuration of the chosen class from the values of the flags of `define_kinds`."""
    return kinds[values[name]](**_given(kinds[values[name]], values))


def fields_of_kind(name: str, kinds: Mapping[str, type], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields of the chosen configuration, unchecked; fields that are not given have defaults."""
    settings = kinds[values[name]]
    return {field.name: field.default for field, _ in _fields(settings)} | _given(settings, values)


def field_names(kinds: Mapping[str, type]) -> list[str]:
    """Return the names of the fields of all classes, sorted."""
    return sorted({field.name for settings in kinds.values() for field, _ in _fields(settings)})


def fields_of_other_kinds(name: str, kinds: Mapping[str, type], values: Mapping[str, Any]) -> list[str]:
    """Return the names of fields that are given but are not fields of the chosen class, sorted."""
    used = {field.name for field, _ in _fields(kinds[values[name]])}
    return [field for field in field_names(kinds) if field not in used and values[field] is not None]


def _given(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        field.name: _setting(values[field.name])
        for field, _ in _fields(settings)
        if values[field.name] is not None
    }


def _setting(value: Any) -> Any:
    """Return the value of a setting, given the value of its flag."""
    return None if value == NONE else value


class _OptionalFloatParser(flags.FloatParser):
    """A parser of a finite number or "none"."""

    def parse(self, argument):
        return NONE if argument == NONE else super().parse(argument)


def _fields(settings: type) -> Iterable[tuple[dataclasses.Field, Any]]:
    hints = get_type_hints(settings)
    return [(field, hints[field.name]) for field in dataclasses.fields(settings)]


def _define(
    name: str, default: Any, kind: Any, field: dataclasses.Field, help: str, flag_values: flags.FlagValues
) -> None:
    if get_origin(kind) is types.UnionType:
        assert kind == float | None, f"{name}: no flag for {kind}"
        parser = _OptionalFloatParser()
        serializer: flags.ArgumentSerializer = flags.ArgumentSerializer()
        flags.DEFINE(parser, name, default, f'{help} "none" for None.', flag_values, serializer)
        return
    if choices := field.metadata.get("choices"):
        flags.DEFINE_enum(name, default, list(choices), help, flag_values=flag_values)
        return
    define: dict[type, Callable[..., Any]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
        str: flags.DEFINE_string,
    }
    define[kind](name, default, help, flag_values=flag_values)


def _help(settings: type, name: str) -> str:
    """Return the help text of an attribute from the docstring of a class or of its base classes."""
    for base in settings.__mro__:
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        if found := re.search(rf"^  {name}: (.*?)(?=^  \w|\Z)", text, re.MULTILINE | re.DOTALL):
            sentence = " ".join(found.group(1).split())
            return sentence[0].upper() + sentence[1:]
    return ""
