"""Encode argument values as JSON: plain ones unchanged, all others as `{"kind": data}`.

>>> encode((1, slice(0, None), torch.float16))
{'tuple': [1, {'slice': [0, None, None]}, {'dtype': 'float16'}]}
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from passes.errors import ArtifactError

DTYPES: Mapping[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
"""All dtypes of torch by name."""

_ENUMS: Mapping[str, Mapping[str, Any]] = {
    "dtype": DTYPES,
    "memory_format": {
        str(value).removeprefix("torch."): value
        for value in vars(torch).values()
        if isinstance(value, torch.memory_format)
    },
    "layout": {
        str(value).removeprefix("torch."): value
        for value in vars(torch).values()
        if isinstance(value, torch.layout)
    },
}
_ENUM_KINDS: Mapping[type, str] = {
    torch.dtype: "dtype",
    torch.memory_format: "memory_format",
    torch.layout: "layout",
}
_ATOM = re.compile(r"[\w +@-]+")


class UnsupportedError(ArtifactError):
    """A module, operator or value that the format of artifacts cannot represent."""


def check_identifier(name: Any) -> str:
    """Return a name if generated code may use it as a variable.

    Raises:
        UnsupportedError: It may not: it is not an identifier, or a keyword.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise UnsupportedError(f"name {name!r}")
    return name


def check_path(path: Any) -> str:
    """Return a qualified module or tensor name if generated code may quote it.

    Raises:
        UnsupportedError: It contains quotes, control characters or the like.
    """
    if not isinstance(path, str) or not all(_ATOM.fullmatch(atom) for atom in path.split(".")):
        raise UnsupportedError(f"qualified name {path!r}")
    return path


def encode(value: Any, tensor: Callable[[torch.Tensor], str] | None = None) -> Any:
    """Turn an argument into JSON data.

    Args:
        value: Nested lists, tuples and dicts of scalars, slices, dtypes, nodes and the like.
        tensor: Stores a tensor and returns its name; without it, tensors are unsupported.

    Raises:
        UnsupportedError: The value contains something of another type.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return _encode_sequence(value, tensor)
    if kind in (dict, fx.immutable_collections.immutable_dict):
        return {"dict": [[encode(k), encode(v, tensor)] for k, v in value.items()]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Tensor) and tensor is not None:
        return {"tensor": tensor(value)}
    if kind in _ENUM_KINDS:
        return {_ENUM_KINDS[kind]: str(value).removeprefix("torch.")}
    return _encode_rare(value)


def _encode_sequence(value: Any, tensor: Callable[[torch.Tensor], str] | None) -> Any:
    items = [encode(item, tensor) for item in value]
    if type(value) in (list, fx.immutable_collections.immutable_list):
        return items
    if type(value) in (tuple, torch.Size):
        return {"tuple" if type(value) is tuple else "size": items}
    raise UnsupportedError(f"value of type {type(value).__name__}")


def _encode_rare(value: Any) -> Any:
    if type(value) is float:
        return {"float": str(value)}
    if type(value) is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise UnsupportedError(f"value of type {type(value).__module__}.{type(value).__qualname__}")


def decode(
    data: Any,
    nodes: Mapping[str, fx.Node] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Turn JSON data back into the argument.

    Args:
        data: JSON data from `encode`.
        nodes: Nodes by name that the value may refer to.
        tensors: Tensors by name that the value may refer to.

    Raises:
        ArtifactError: The data is malformed, or refers to an unknown node, tensor or dtype.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item, nodes, tensors) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ArtifactError(f"malformed value ({str(data)[:80]})")
    ((kind, content),) = data.items()
    if kind == "node" and nodes is not None and content in nodes:
        return nodes[content]
    if kind == "tensor" and tensors is not None and content in tensors:
        return tensors[content]
    if kind in _ENUMS and content in _ENUMS[kind]:
        return _ENUMS[kind][content]
    if kind == "tuple":
        return tuple(decode(item, nodes, tensors) for item in content)
    if kind == "dict":
        return {decode(k): decode(v, nodes, tensors) for k, v in content}
    if kind == "slice":
        return slice(*(decode(part, nodes) for part in content))
    return _decode_rare(kind, content)


def _decode_rare(kind: str, content: Any) -> Any:
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "complex":
        real, imaginary = (decode(part) for part in content)
        return complex(real, imaginary)
    if kind == "size":
        return torch.Size(content)
    if kind == "ellipsis":
        return Ellipsis
    if kind == "device":
        return torch.device(content)
    raise ArtifactError(f"unknown value ({kind}: {str(content)[:80]})")


def few(items: Sequence[str]) -> str:
    """Join the first three items, and count the others."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{'; '.join(items[:3])}{more}"
