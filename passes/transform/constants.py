"""Compare what a call passes besides tensors with the constants that a graph holds in its place.

>>> same_constant({"taps": {1, 3}}, {"taps": {3, 1}}), same_constant([1], [1.0])
(True, False)
>>> check_constants("Net", "batch", {"scale": 2.0}, {"scale": 3.0})
Traceback (most recent call last):
passes.errors.OptionError: batch['scale'] is 2.0, but Net was compiled with 3.0, which is part of \
its graph: leave it out, or compile another network for it
"""

from __future__ import annotations

import pickle
from contextlib import suppress
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.errors import OptionError

PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Types of constants that every process compares alike."""


def check_constants(model: str, name: str, value: Any, example: Any) -> None:
    """Check everything in a nested argument that is not a tensor.

    Args:
        model: Name of the model.
        name: Name of the argument.
        value: What the call passes.
        example: What the model was compiled with.

    Raises:
        OptionError: A constant is another one, or one of the two holds what the other does not.
    """
    if isinstance(value, torch.Tensor | fx.Proxy) and isinstance(example, torch.Tensor):
        return
    leaves, expected = (
        {f"{name}{pytree.keystr(path)}": leaf for path, leaf in pytree.tree_flatten_with_path(x)[0]}
        for x in (value, example)
    )
    if different := leaves.keys() ^ expected.keys():
        raise OptionError(
            f"{min(different)} is {'' if min(different) in leaves else 'not '}in the batch, unlike "
            f"the example inputs of {model}: pass {name} with the structure of the example"
        )
    for path, constant in expected.items():
        check_constant(model, path, leaves[path], constant)


def check_constant(model: str, name: str, value: Any, constant: Any) -> None:
    """Check that a value is the one that a graph holds in its place.

    Raises:
        OptionError: It is another one.
    """
    if isinstance(value, torch.Tensor | fx.Proxy) and isinstance(constant, torch.Tensor):
        return
    if isinstance(constant, torch.Tensor):
        raise OptionError(f"{name} is {_shown(value)}, but {model} takes a tensor there")
    if not same_constant(value, constant):
        raise OptionError(
            f"{name} is {_shown(value)}, but {model} was compiled with {_shown(constant)}, "
            "which is part of its graph: leave it out, or compile another network for it"
        )


def same_constant(value: Any, constant: Any) -> bool:
    """Whether two values are one constant: of one type, and equal in all that they hold."""
    if value is constant:
        return True
    if isinstance(value, dict) and isinstance(constant, dict):
        return value.keys() == constant.keys() and all(
            same_constant(value[key], constant[key]) for key in value
        )
    if any(isinstance(value, kind) and isinstance(constant, kind) for kind in (list, tuple)):
        return len(value) == len(constant) and all(map(same_constant, value, constant))
    if type(value) is not type(constant) or isinstance(value, torch.Tensor):
        return False
    with suppress(Exception):  # objects compare as they like
        equal: Any = value == constant
        if equal is True or (value != value and constant != constant) is True:
            return True
        if value.shape == constant.shape and equal.all():  # an array of numpy
            return True
    if isinstance(value, PLAIN):
        return False
    with suppress(Exception):  # and some know nothing but who they are
        return pickle.dumps(value) == pickle.dumps(constant)
    return False


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)[:80]
