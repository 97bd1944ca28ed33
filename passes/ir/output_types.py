"""Give the outputs of a network the types that the model's have.

A graph holds dicts, lists and tuples of values. A model may return more: an OrderedDict, a named
tuple, a dataclass, an output class of transformers. `plain` takes such containers apart, and
`output_types` keeps how they are made again:

>>> from collections import OrderedDict
>>> output = [OrderedDict(b=1, a=2)]
>>> plain(output)
[{'b': 1, 'a': 2}]
>>> types, _ = output_types(output)
>>> typed(plain(output), types) == output
True
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

_PLAIN = (dict, list, tuple, torch.Size)
Path = tuple[Any, ...]
"""Keys and indices that lead to a container in a plain output."""


class OutputType(NamedTuple):
    """A container of an output that a graph holds as a dict, list or tuple.

    Attributes:
        path: Where it lies in the plain output.
        name: Name of its class.
        make: Makes it of a dict, list or tuple; raises an exception where it cannot.
    """

    path: Path
    name: str
    make: Callable[[Any], Any]


def is_container(value: Any) -> bool:
    """Whether a value holds others, and is taken apart."""
    if isinstance(value, type | torch.Tensor):
        return False
    registered = type(value) in pytree.SUPPORTED_NODES
    return registered or isinstance(value, Mapping | list | tuple) or is_dataclass(value)


def plain(value: Any) -> Any:
    """Replace the containers in a value by dicts, lists and tuples."""
    if type(value) is torch.Size or not is_container(value):
        return value
    content = _content(value)
    if isinstance(content, dict):
        return {key: plain(item) for key, item in content.items()}
    return type(content)(map(plain, content))


def _content(value: Any) -> Any:
    """Return the dict, list or tuple of what a container holds."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return list(value) if isinstance(value, list) else tuple(value)
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    children, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return tuple(children)


def _containers(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if not is_container(value):
        return
    content = _content(value)
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, item in items:
        yield from _containers(item, (*path, key))
    yield path, value  # after what it holds


def _maker(value: Any) -> Callable[[Any], Any]:
    kind: Any = type(value)
    if isinstance(value, defaultdict):
        return functools.partial(defaultdict, value.default_factory)
    if is_dataclass(value):
        return functools.partial(_call, kind)
    if hasattr(kind, "_make"):
        return functools.partial(_make, kind)
    if isinstance(value, Mapping | list | tuple):
        return kind  # type: ignore[no-any-return]
    node = pytree.SUPPORTED_NODES[kind]
    return functools.partial(_unflatten, node.unflatten_fn, node.flatten_fn(value)[1])


def _call(kind: Callable[..., Any], content: dict[str, Any]) -> Any:
    return kind(**content)


def _make(kind: Any, content: tuple[Any, ...]) -> Any:
    return kind._make(content)


def _unflatten(function: Callable[..., Any], context: Any, content: tuple[Any, ...]) -> Any:
    return function(content, context)


def typed(output: Any, types: Iterable[OutputType]) -> Any:
    """Return a plain output with its containers of the types given; None for no output."""
    for path, _, make in () if output is None else types:
        output = _replaced(output, path, make)
    return output


def _replaced(output: Any, path: Path, make: Callable[[Any], Any]) -> Any:
    if not path:
        return make(output) if type(output) in _PLAIN else output
    key, *rest = path
    content = {**output} if isinstance(output, dict) else [*output]
    content[key] = _replaced(output[key], tuple(rest), make)
    return content if isinstance(content, dict) else type(output)(content)


def output_types(output: Any) -> tuple[tuple[OutputType, ...], tuple[str, ...]]:
    """Find what makes the containers of an output that are no dicts, lists or tuples.

    Returns:
        What makes them, those inside of others first, and the classes of those that cannot be made.
    """
    types, unknown = [], []
    for path, value in _containers(output, ()):
        if type(value) in _PLAIN:
            continue
        make = _maker(value)
        try:
            again = make(_content(value))
            same = type(again) is type(value) and _same_items(_content(again), _content(value))
        except Exception:
            same = False
        if same:
            types.append(OutputType(path, type(value).__name__, make))
        else:
            unknown.append(type(value).__name__)
    return tuple(types), tuple(unknown)


def _same_items(first: Any, second: Any) -> bool:
    pairs: Sequence[Sequence[Any]] = [
        [*content.items()] if isinstance(content, dict) else [*enumerate(content)]
        for content in (first, second)
    ]
    return len(pairs[0]) == len(pairs[1]) and all(
        k == m and v is w for (k, v), (m, w) in zip(*pairs, strict=True)
    )


def ordered_dicts(types: Iterable[OutputType]) -> list[Path]:
    """Return the paths of the OrderedDicts, which need no code of the model."""
    return [path for path, _, make in types if make is OrderedDict]


def ordered_dict(path: Path) -> OutputType:
    """Return the type of an OrderedDict.

    Args:
        path: Its path.
    """
    return OutputType(path, "OrderedDict", OrderedDict)
