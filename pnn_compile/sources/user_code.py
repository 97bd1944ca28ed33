"""Call the user's code, and report what it raises: type, message, file and line."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from passes.errors import SourceError, first_line, suggest

_stdlib = Path(sysconfig.get_path("stdlib")).resolve()
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Read `--arg name=value` texts; a value is a Python literal, else text.

    >>> parse_arguments(["num_layers=24", "kind=small"])
    {'num_layers': 24, 'kind': 'small'}

    Raises:
        SourceError: A text has no name, or a name occurs twice.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise SourceError(f"bad --arg {text!r}: type name=value, as in num_layers=24")
        if name in arguments:
            raise SourceError(f"--arg sets {name!r} twice ({' '.join(texts)}): drop one of them")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments[name] = value
    return arguments


def refuse_arguments(arguments: Mapping[str, Any], origin: str, reason: str) -> None:
    """Refuse arguments where nothing is called.

    Raises:
        SourceError: There are arguments.
    """
    if arguments:
        raise SourceError(f"{origin} takes no --arg ({', '.join(arguments)}): {reason}")


def call(factory: object, origin: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Call a factory with keyword arguments.

    Raises:
        SourceError: It cannot be called with them, or it fails; what it raised is the cause.
    """
    arguments = arguments or {}
    if not callable(factory):
        raise SourceError(f"{origin} is of type {type(factory).__name__}: name a model or factory")
    _check_names(factory, origin, arguments)
    if signature := missing_arguments(factory, arguments):
        raise SourceError(
            f"{origin} needs arguments {signature}: add defaults, or set values by --arg name=value"
        )
    with report_errors(origin):
        return factory(**arguments)


def _check_names(factory: Callable[..., Any], origin: str, arguments: Mapping[str, Any]) -> None:
    signature = _signature(factory)
    if signature is None:
        return
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name not in names:
            raise SourceError(f"{origin} takes no argument {name!r}; {suggest(name, names)}")


def missing_arguments(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Return the signature of a callable that needs more arguments; "" if it needs none."""
    signature = _signature(factory)
    if signature is None:  # written in C, without a signature: the call will tell
        return ""
    required = any(
        parameter.default is parameter.empty
        and parameter.kind not in VARIADIC
        and parameter.name not in arguments
        for parameter in signature.parameters.values()
    )
    shown = signature.replace(return_annotation=inspect.Signature.empty)
    return brief(shown) if required else ""


def _signature(factory: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError):
        return None


@contextmanager
def report_errors(origin: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a `SourceError` with type, message and line."""
    try:
        yield
    except SourceError:
        raise
    except (Exception, SystemExit) as error:
        message = error.msg if isinstance(error, SyntaxError) else brief(error)
        summary = f"{type(error).__name__}: {message}" if message else type(error).__name__
        advice = "--debug shows the traceback"
        cause = error.__cause__
        while cause is not None and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(error, ImportError) and cause is not None:  # as transformers tells it
            summary += f" The cause is {type(cause).__name__}: {brief(cause)}"
        elif isinstance(error, ModuleNotFoundError):
            advice = f"install it for {sys.executable}, or correct its name"
        elif isinstance(error, ImportError) and "relative import" in message:
            advice = "name a file of a package as package.module:name"
        elif isinstance(error, SystemExit):
            advice = 'put what runs the program under `if __name__ == "__main__":`'
        raise SourceError(f"{origin} raises {summary}{_location(error)}; {advice}") from error


def _location(error: BaseException) -> str:
    """Return " (file:line)" of the innermost line of the user's own code, "" if there is none."""
    lines = [
        (Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
    ]
    lines = [line for line in lines if line[0].is_file() and not _is_internal(line[0])]
    lines = [line for line in lines if not is_library(line[0])] or lines
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        lines.append((Path(error.filename), error.lineno or 1))
    if not lines:
        return ""
    file, number = lines[-1]
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f" ({shown}:{number})"


def _is_internal(file: Path) -> bool:
    """Whether a frame of this file belongs to the import, not to the user's code."""
    return file.is_relative_to(Path(__file__).parent) or file == Path(importlib.__file__)


def is_library(file: Path) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    return file.is_relative_to(_stdlib) or bool({"site-packages", "dist-packages"} & {*file.parts})


def brief(value: object) -> str:
    """Return the first line of a value's text that is not blank, at most 200 characters."""
    return first_line(value)[:200]
