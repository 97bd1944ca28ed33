"""A command whose help has groups of options and examples, and whose options a file can set.

The file is TOML, with a line for every option, under the name that it has on the command line:

    stages = 4
    coarse-budget = 0.05
    emit = ["graph", "onnx"]
"""

from __future__ import annotations

import difflib
import inspect
import json
import reprlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from passes.errors import OptionError, why
from pnn_compile.cli.common import write_text

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": ("inputs", "arguments", "dynamic"),
    "Cut": ("stages", "windows", "cost", "cut_at", "cut_inside_blocks", "plan_file"),
    "Coarse networks": (
        "coarse", "coarse_budget", "coarse_width", "units", "rank", "preprocess", "prologue",
        "correction", "sweep", "iterations", "tolerance", "calibrate", "seed",
    ),
    "Devices": ("devices", "kind", "ranks", "threads", "streams", "cache"),
    "Output": (
        "output", "onnx", "per_stage", "opset", "fp16", "bf16", "emit", "samples", "html", "dot",
        "mermaid", "graphml", "trace", "depth", "validate", "check", "config", "config_file",
        "quiet", "as_json", "debug",
    ),
}  # fmt: skip
"""Headings of options in the help, and the options below them; others come first."""


class Command(click.Command):
    """A command of `pnn-compile`.

    Args:
        examples: Pairs of words after the command, and what they do.
        settings: Further settings of a command.
    """

    def __init__(self, *, examples: Sequence[tuple[str, str]], **settings: Any) -> None:
        super().__init__(**settings)
        self.examples = examples
        self.short_help = inspect.cleandoc(self.help or "").partition("\n\n")[0]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups."""
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Options", *GROUPS)}
        for option in self.get_params(ctx):
            names = (name for name, listed in GROUPS.items() if option.name in listed)
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if record is not None:
                rows[next(names, "Output" if "--help" in option.opts else "Options")].append(record)
        for name, records in rows.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        path = "pnn-compile" if self.name == "compile" else f"pnn-compile {self.name}"
        with formatter.section("Examples"):
            for words, text in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{path} {words}  # {text}\n")


def read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Take the options of a file as defaults of the command.

    Raises:
        OptionError: The file cannot be read, or names an option that the command does not have.
    """
    if path is None:
        return None
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {why(error)}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not a TOML file of options: {error}") from error
    options = _options(ctx.command)
    defaults = {}
    for name, value in table.items():
        if (option := options.get(name.replace("_", "-"))) is None:
            close = difflib.get_close_matches(name, options, 1)
            advice = f"did you mean {close[0]}?" if close else f"there is {', '.join(options)}"
            raise OptionError(f"{path} has an unknown option {name!r}; {advice}")
        defaults[str(option.name)] = _as_words(path, name, value, option)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _as_words(path: Path, name: str, value: Any, option: click.Option) -> Any:
    """Return the value of an option as the words that it has on the command line.

    Raises:
        OptionError: It is neither text nor a number, nor a list of these, nor true or false for an
            option without a value.
    """
    words = [*map(str, value)] if isinstance(value, list) else [str(value)]
    items = value if isinstance(value, list) else [value]
    plain = all(type(item) in (str, int, float) for item in items)
    if option.is_flag and isinstance(value, bool):
        return value
    if option.is_flag or not plain or not all(word.isprintable() for word in words):
        expected = "true or false" if option.is_flag else "text, a number, or a list of them"
        raise OptionError(f"{path}: {name} must be {expected} (got {reprlib.repr(value)})")
    return words if option.multiple else ",".join(words)


def save_config(ctx: click.Context, path: Path) -> None:
    """Write the options that were set, on the command line or by a file.

    Raises:
        OptionError: The file cannot be written.
    """
    lines = []
    for name, option in _options(ctx.command).items():
        source = ctx.get_parameter_source(str(option.name))
        if source in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
            value = ctx.params[str(option.name)]
            if value is not None:
                text = json.dumps(value, default=str, ensure_ascii=False)
                lines.append(f"{name} = {text}\n")
    try:
        text = "".join(lines).replace("\x7f", "\\u007f")
        tomllib.loads(text)
        write_text(path, text)
    except ValueError as error:
        raise OptionError(f"the options have no form in TOML ({error})") from error


def _options(command: click.Command) -> dict[str, click.Option]:
    """Return the options that a file may set, by their names on the command line."""
    options = (option for option in command.params if isinstance(option, click.Option))
    return {
        max(option.opts, key=len).removeprefix("--"): option
        for option in options
        if option.name not in ("config", "config_file")
    }
