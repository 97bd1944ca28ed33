"""What modules hold besides parameters, buffers and submodules: list it, and put it back.

A forward may count its calls in a list, keep a tensor in a dict or in an object of its own, or draw
from a generator that lies in one. All of them are looked into; objects of torch and of the standard
library are not, which have states of their own that no forward means.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes in which nn.Module keeps its parameters, buffers, submodules, hooks and its mode."""

PLAIN = frozenset({bool, int, float, str, type(None)})

Attribute = tuple[nn.Module, str, Any]
"""A module, the name of one of its attributes, and its value."""

_CONTAINERS = (list, dict, set, deque)
_CLOSED: tuple[type, ...] = (
    nn.Module, torch.Tensor, type, types.ModuleType, functools.partial,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType,
)  # fmt: skip
_FOREIGN = (sys.stdlib_module_names | {"torch", "numpy", "passes", "pnn_compile"}) - {
    "types",
    "__main__",
}


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module besides those that every module has."""
    return {name: value for name, value in vars(module).items() if name not in _EVERY_MODULE}


def complex_attributes(children: Sequence[nn.Module]) -> list[Attribute]:
    """Return the attributes of modules besides torch's, numbers, texts and tuples of these.

    Looking into a plain value takes longer than looking at it, and a deep model has thousands.
    """
    return [
        (child, name, value)
        for child in children
        for name, value in vars(child).items()
        if type(value) not in PLAIN and name not in _EVERY_MODULE
        if type(value) is not tuple or not all(type(item) in PLAIN for item in value)
    ]


def contents(values: Iterable[Any], seen: set[int] | None = None) -> Iterator[Any]:
    """Yield values, and what their containers and plain objects hold, once each.

    Of a plain object, its table of attributes is one of the values.

    Args:
        values: The values; they must outlive the iteration.
        seen: Ids of what is left out, extended by what is yielded.
    """
    seen = set() if seen is None else seen
    pending = [*values]
    while pending:
        value = pending.pop()
        if id(value) in seen or type(value) in PLAIN:
            continue
        seen.add(id(value))
        yield value
        items: Iterable[Any] = ()
        if isinstance(value, dict):
            items = value.values()
        elif isinstance(value, (tuple, *_CONTAINERS)):
            items = value
        elif is_open(value):
            items = (vars(value),)
        if not {*map(type, items)} <= PLAIN:
            pending += items


def is_open(value: Any) -> bool:
    """Whether a value is an object of the user's, whose attributes a forward may set."""
    return (
        type(value).__dictoffset__ != 0
        and not isinstance(value, _CLOSED)
        and not is_foreign(type(value))
    )


def is_foreign(value: Any) -> bool:
    """Whether a class or function is one of torch, of the standard library, or of the compiler."""
    return str(value.__module__).partition(".")[0] in _FOREIGN


def nested_codes(code: types.CodeType) -> list[types.CodeType]:
    """Return the code of a function, and of all functions that are written in it."""
    inner = [value for value in code.co_consts if isinstance(value, types.CodeType)]
    return [code, *(nested for one in inner for nested in nested_codes(one))]


def snapshot(values: Iterable[Any]) -> list[tuple[Any, Callable[[], bool]]]:
    """Return the containers among some values, and what puts the contents of each back.

    Such a call returns whether the contents had changed.
    """
    return [
        (value, functools.partial(_put_back, value, value.copy()))
        for value in values
        if isinstance(value, _CONTAINERS) and type(value).__module__ in ("builtins", "collections")
    ]


def _put_back(container: Any, content: Any) -> bool:
    if isinstance(container, dict):
        changed = not has_entries(container, content)
    elif isinstance(container, set):
        changed = container != content
    else:
        changed = len(container) != len(content) or not all(map(operator.is_, container, content))
    if changed:
        container.clear()
        add = container.extend if isinstance(container, list | deque) else container.update
        add(content)
    return changed


def has_entries(table: Mapping[str, Any], entries: Mapping[str, Any]) -> bool:
    """Whether a table still holds the very objects that it held."""
    # Without a loop in Python: a deep model has tens of thousands of entries.
    return [*table] == [*entries] and all(map(operator.is_, table.values(), entries.values()))
