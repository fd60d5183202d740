"""Dataclasses to and from the JSON of result files.

A field is written under its own name. ``dataclasses.field(metadata=...)`` changes that:

    OPTIONAL         the key is absent where the value is None; other fields write None as null
    FLAT             the fields of the dataclass that the field holds stand in the parent's JSON object; on reading, the
                     field is None where the key of the first of them is absent
    REST             a dictionary of the keys that no other field has
    {"key": "a.b"}   another key
    {"digits": 6}    floats are written with so many digits after the point

JSON has no NaN: a float that is not finite is written as null, and null is read as NaN where a float is expected. Keys
that no field has are ignored, and a key that is absent takes the field's default, so files of other versions are read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


OPTIONAL = {"optional": True}
FLAT = {"flat": True}
REST = {"rest": True}


def to_json(value: Any, digits: int | None = None) -> Any:
    """``value`` as dictionaries, lists, strings, numbers and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            content, about = getattr(value, field.name), field.metadata
            if "flat" in about or "rest" in about:
                found |= {} if content is None else to_json(content)
            elif content is not None or "optional" not in about:
                found[about.get("key", field.name)] = to_json(content, about.get("digits"))
        return found
    if isinstance(value, float):
        return None if not math.isfinite(value) else value if digits is None else round(value, digits)
    if isinstance(value, Mapping):
        return {key: to_json(x, digits) for key, x in value.items()}
    return [to_json(x, digits) for x in value] if isinstance(value, list | tuple) else value


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """A ``kind`` from what `to_json` made of it.

    Args:
        where: names ``value`` in error messages.

    Raises:
        ValueError: something is missing or of another type; the message names it.
    """
    return typing.cast("T", _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in parameters:
            return None
        (kind,) = (each for each in parameters if each is not types.NoneType)
        return _read(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, _expect(dict, "an object", value, where), where)
    if origin in (list, tuple):
        items = _expect(list, "a list", value, where)
        return origin(_read(parameters[0], x, f"{where}[{i}]") for i, x in enumerate(items))
    if origin is dict:
        pairs = _expect(dict, "an object", value, where).items()
        return {key: _read(parameters[1], x, f"{where}.{key}") for key, x in pairs}
    if kind is float:
        return math.nan if value is None else float(_expect(int | float, "a number", value, where))
    return value if kind is Any else _expect(kind, f"of type {kind.__name__}", value, where)


def _expect(kind: Any, words: str, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where.removeprefix('.') or 'it'} is not {words}: {str(value)[:40]!r}")
    return value


@functools.cache
def _fields(kind: Any) -> list[tuple[dataclasses.Field[Any], Any, str]]:
    """(field, its type, its key) of a dataclass."""
    hints = typing.get_type_hints(kind)
    return [(field, hints[field.name], field.metadata.get("key", field.name)) for field in dataclasses.fields(kind)]


def _read_dataclass(kind: Any, data: dict[str, Any], where: str) -> Any:
    found: dict[str, Any] = {}
    for field, hint, key in _fields(kind):
        if "rest" in field.metadata:
            known = {key for _, _, key in _fields(kind)}
            found[field.name] = {key: x for key, x in data.items() if key not in known}
        elif "flat" in field.metadata:
            inner = next((x for x in typing.get_args(hint) if x is not types.NoneType), hint)
            required = types.NoneType not in typing.get_args(hint)
            there = required or _fields(inner)[0][2] in data
            found[field.name] = _read_dataclass(inner, data, where) if there else None
        elif key in data:
            found[field.name] = _read(hint, data[key], f"{where}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{f'{where}.{key}'.removeprefix('.')} is missing")
    return kind(**found)
