"""Call what builds a model, with the keyword arguments from the command line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from passes.errors import SourceError
from pnn_compile.sources.errors import advise, blame, first_line

__all__ = ["call", "lacks", "parse_arguments", "refuse_arguments"]

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Read `--arg name=value` texts; a value is a Python literal, else text.

    Raises:
        SourceError: A text has no name, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise SourceError(f"bad --arg {text!r}: type name=value, as in num_layers=24")
        if name in found:
            raise SourceError(f"--arg gives {name!r} twice ({' '.join(texts)}): drop one of them")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = value
    return found


def refuse_arguments(arguments: Mapping[str, Any], origin: str, why: str) -> None:
    """Refuse arguments where nothing is called.

    Raises:
        SourceError: There are arguments.
    """
    if arguments:
        raise SourceError(f"{origin} takes no --arg ({', '.join(arguments)}): {why}")


def call(factory: object, origin: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Call a factory with keyword arguments.

    Raises:
        SourceError: It cannot be called so, or it fails; what it raised is the cause.
    """
    arguments = arguments or {}
    if not callable(factory):
        raise SourceError(f"{origin} is of type {type(factory).__name__}: name a model or factory")
    _check_known(factory, origin, arguments)
    if missing := lacks(factory, arguments):
        raise SourceError(
            f"{origin} needs arguments {missing}: give each of them a default, or a value by "
            "--arg name=value"
        )
    with blame(origin):
        return factory(**arguments)


def _check_known(factory: Callable[..., Any], origin: str, arguments: Mapping[str, Any]) -> None:
    signature = _signature(factory)
    if signature is None:
        return
    parameters = signature.parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name not in names:
            raise SourceError(f"{origin} takes no argument {name!r}; {advise(name, names)}")


def lacks(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Return the signature of a callable that needs more arguments, "" of another."""
    signature = _signature(factory)
    if signature is None:  # written in C, without one: a call will tell
        return ""
    required = any(
        each.default is each.empty and each.kind not in _REST and each.name not in arguments
        for each in signature.parameters.values()
    )
    shown = signature.replace(return_annotation=inspect.Signature.empty)
    return first_line(shown) if required else ""


def _signature(factory: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError):
        return None
