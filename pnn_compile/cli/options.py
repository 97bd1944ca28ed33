"""Options that commands share; those of the compiler are made from its own description of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar

import click

from passes.coarse.family import family_help
from passes.errors import OptionError
from passes.options import Options

__all__ = ["ARG", "CACHE", "DEBUG", "JSON", "compiler_options", "stages_option"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
ARG = click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument of what builds the model, such as num_layers=24; repeatable.",
)
CACHE = click.option(
    "--cache/--no-cache", default=True, help="Keep measured seconds, and take those kept (default)."
)
DEBUG = click.option("--debug", is_flag=True, help="Tracebacks, and graph checks between passes.")


def stages_option(_: click.Context, __: click.Parameter, value: str) -> int | Literal["auto"]:
    """Read a number of stages, or auto."""
    if value == "auto":
        return "auto"
    try:
        return int(value)
    except ValueError as error:
        raise OptionError(f"-n must be a number or 'auto' (got {value!r})") from error


def compiler_options(*names: str) -> Callable[[_Command], _Command]:
    """Give a command options of the compiler, with the defaults and texts of `Options`.

    Args:
        names: Fields of `Options` that are plain values; `coarse_budget` becomes `--coarse-budget`.
    """
    defaults = {field.name: field for field in dataclasses.fields(Options)}

    def decorate(command: _Command) -> _Command:
        for name in reversed(names):
            field = defaults[name]
            text = descriptions()[name]
            if name == "coarse":
                text = family_help("coarse")
            elif name == "preprocess":
                text = family_help("preprocess")
            kind = float if "float" in str(field.type) else type(field.default)
            flag = f"--{name.replace('_', '-')}"
            command = click.option(flag, default=field.default, type=kind, help=text)(command)
        return command

    return decorate


@cache
def descriptions() -> Mapping[str, str]:
    """Return what the docstring of `Options` says of every option."""
    text = inspect.getdoc(Options) or ""
    attributes = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    parts = re.split(r"^ {4}(\w+): ", attributes, flags=re.MULTILINE)[1:]
    texts = (" ".join(part.split()) for part in parts[1::2])
    return dict(zip(parts[::2], texts, strict=True))
