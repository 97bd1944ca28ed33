"""Read JSON from strangers: a value has the type that an annotation says, or its place is named.

>>> decode(tuple[int, ...], [1, 2], "shape")
(1, 2)
>>> decode(tuple[int, ...], [1, True], "shape")
Traceback (most recent call last):
passes.errors.ArtifactError: shape[1] should be int, found bool
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import cache
from typing import Any

from passes.errors import ArtifactError

Refine = Callable[[Any, dict[str, Any], str], dict[str, Any]]
"""Function from a dataclass, its data and its place to types of fields that depend on the data."""

_LIMIT = 2**63
_LARGEST = 1e300


def parse(text: str) -> Any:
    """Parse JSON without NaN, infinities and texts that are not Unicode.

    Raises:
        ArtifactError: It is no such JSON.
    """
    try:
        data = json.loads(text, parse_constant=_refuse)
        if "\\ud" in text.lower():  # a pair of escapes is a character, one alone is none
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not JSON ({type(error).__name__}: {error})") from error
    return data


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def decode(kind: Any, data: Any, where: str, refine: Refine | None = None) -> Any:
    """Turn JSON data into a value of an annotated type.

    Args:
        kind: A dataclass, a TypedDict, `tuple`, `list` or `Mapping` of types, a union, a literal,
            bool, int, float or str, or Any.
        data: The data.
        where: Its place, for the message.
        refine: Types of fields of dataclasses that depend on the data.

    Raises:
        ArtifactError: The data is of another type, or a number is not finite or too large.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, data, where, refine)
    if typing.is_typeddict(kind):
        return _decode_fields(kind, data, where, refine)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(arguments, data, where, refine)
    if origin is typing.Literal:
        if not any(type(data) is type(item) and data == item for item in arguments):
            allowed = ", ".join(map(repr, arguments))
            raise ArtifactError(f"{where} is {str(data)[:40]!r}; possible here: {allowed}")
        return data
    if origin in (tuple, list) and isinstance(data, (list, tuple)):
        kinds = arguments[:1] * len(data) if origin is list or ... in arguments else arguments
        if len(kinds) != len(data):
            raise ArtifactError(f"{where} should have {len(kinds)} items, found {len(data)}")
        pairs = enumerate(zip(kinds, data, strict=True))
        return origin(decode(inner, item, f"{where}[{i}]", refine) for i, (inner, item) in pairs)
    if origin in (Mapping, dict) and isinstance(data, dict):
        inner = arguments[1]
        return {key: decode(inner, item, f"{where}.{key}", refine) for key, item in data.items()}
    if kind is float and type(data) is int and abs(data) < _LIMIT:
        return float(data)
    if isinstance(kind, type) and type(data) is kind:  # True is not an int
        if isinstance(data, (int, float)) and not abs(data) < (_LIMIT if kind is int else _LARGEST):
            raise ArtifactError(f"{where} is {str(data)[:40]}, which is not a number or too large")
        return data
    names = {tuple: "list", Mapping: "object", dict: "object"}
    name = names.get(origin or kind) or getattr(kind, "__name__", str(kind))
    raise ArtifactError(f"{where} should be {name}, found {type(data).__name__}")


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str, refine: Refine | None) -> Any:
    if type(None) in kinds:
        return None if data is None else decode(kinds[0], data, where, refine)
    kind = next((kind for kind in kinds if type(data) is kind), kinds[0])
    return decode(kind, data, where, refine)


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind, include_extras=typing.is_typeddict(kind))


def _decode_record(kind: Any, data: Any, where: str, refine: Refine | None) -> Any:
    """Rebuild a dataclass; fields with defaults may be missing."""
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} should be an object, found {type(data).__name__}")
    fields = dataclasses.fields(kind)
    hints = {field.name: _hints(kind)[field.name] for field in fields}
    needed = [f.name for f in fields if f.default is f.default_factory is MISSING]
    for name in needed:
        if name not in data:
            raise ArtifactError(f"{where}.{name} is missing: it needs {', '.join(needed)}")
    if unknown := sorted(set(data) - set(hints)):
        raise ArtifactError(f"{where} has unknown fields ({', '.join(unknown)})")
    if refine is not None:
        hints |= refine(kind, data, where)
    return kind(
        **{name: decode(hints[name], data[name], f"{where}.{name}", refine) for name in data}
    )


def _decode_fields(kind: Any, data: Any, where: str, refine: Refine | None) -> dict[str, Any]:
    """Check the fields of a TypedDict; others are left as they are."""
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} should be an object, found {type(data).__name__}")
    checked = dict(data)
    for name, hint in _hints(kind).items():
        needed = typing.get_origin(hint) is not typing.NotRequired
        if name in data:
            hint = hint if needed else typing.get_args(hint)[0]
            checked[name] = decode(hint, data[name], f"{where}.{name}", refine)
        elif needed:
            raise ArtifactError(f"{where}.{name} is missing")
    return checked
