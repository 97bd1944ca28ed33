"""Share options, console, progress and files among the commands.

Options of the compiler are made from its own description of them, the docstring of `Options`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from passes.errors import OptionError, why
from passes.options import CHOICES, Options
from pnn_compile import atomic

if TYPE_CHECKING:
    from rich.console import RenderableType

    from passes.plan.schema import Plan
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.report.terminal import PlainConsole
    from pnn_compile.sources import Source

CALIBRATION_BATCH = 128
"""Samples of one batch of calibration."""

_Command = TypeVar("_Command", bound=Callable[..., Any])

JSON = click.option("--json", "as_json", is_flag=True, help="Write one JSON document to stdout.")
INPUT = click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SHAPE[:DTYPE]",
    help="Example input of a model, such as 1x3x224x224 or mask=1x128:bool; repeatable.",
)
ARG = click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument of the function or class that builds the model, such as num_layers=24; "
    "repeatable.",
)
DIRECTORY = click.argument("directory", type=click.Path(path_type=Path))
SAMPLES = click.argument("samples", type=click.Path(path_type=Path))
CACHE = click.option(
    "--cache/--no-cache", default=True, help="Read and write the cache of measured seconds."
)
DEBUG = click.option(
    "--debug", is_flag=True, help="Show tracebacks, and check every graph between passes."
)
THREADS = click.option(
    "--threads", default=1, type=click.IntRange(min=1), help="Threads of every process."
)
RANKS = click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Number of processes.",
    show_default="one per stage",
)


def stages_option(default: str, text: str) -> Callable[[_Command], _Command]:
    """Return the option `-n`, a number of stages or "auto", with a default and a help text."""
    return click.option(
        "-n", "--stages", default=default, callback=_read_number, metavar="NUMBER|auto", help=text
    )


def target_options(stages: str) -> Callable[[_Command], _Command]:
    """Return the options that tell how to compile a target that is a model, not an artifact.

    Args:
        stages: Default number of stages, or "auto".
    """

    def decorate(command: _Command) -> _Command:
        number = stages_option(stages, "Number of stages of a model, or auto.")
        return number(INPUT(ARG(command)))

    return decorate


def _read_number(_: click.Context, option: click.Parameter, value: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return int(value)
    except ValueError as error:
        raise OptionError(f"{option.opts[0]} must be a number or 'auto' (got {value!r})") from error


_METAVARS = {
    "coarse": "FAMILY", "preprocess": "FAMILY", "iterations": "NUMBER|auto", "tolerance": "ERROR",
    "coarse_budget": "SHARE", "coarse_width": "SHARE", "prologue": "SHARE",
}  # fmt: skip
"""What the values of options are."""


def compiler_options(*names: str) -> Callable[[_Command], _Command]:
    """Add options of the compiler to a command, with the defaults and texts of `Options`.

    Args:
        names: Fields of `Options` that are plain values; `coarse_budget` becomes `--coarse-budget`.
    """
    fields = {field.name: field for field in dataclasses.fields(Options)}

    def decorate(command: _Command) -> _Command:
        for name in reversed(names):
            field = fields[name]
            settings: dict[str, Any] = {"default": field.default, "metavar": _METAVARS.get(name)}
            if name == "iterations":
                settings |= {"default": "1", "callback": _read_number}
            elif name in CHOICES:
                settings["type"] = click.Choice(CHOICES[name])
            elif isinstance(field.default, bool):
                settings["is_flag"] = True
            else:
                settings["type"] = float if "float" in str(field.type) else type(field.default)
            text = option_texts()[name].replace("None: ", "Default: ").replace("`cuts`", "--cut-at")
            command = click.option(f"--{name.replace('_', '-')}", help=text, **settings)(command)
        return command

    return decorate


@cache
def option_texts() -> Mapping[str, str]:
    """Return the descriptions of all options, from the docstring of `Options`."""
    text = inspect.getdoc(Options) or ""
    attributes = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    parts = re.split(r"^ {4}(\w+): ", attributes, flags=re.MULTILINE)[1:]
    texts = (" ".join(part.split()) for part in parts[1::2])
    return dict(zip(parts[::2], texts, strict=True))


def read_numbers(text: str, option: str) -> list[int]:
    """Read positive numbers separated by commas.

    >>> read_numbers("2,3, 6", "-n")
    [2, 3, 6]

    Raises:
        OptionError: A word is not a positive number.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise OptionError(f"{option} must be numbers by comma, such as 2,3,6 (got {text!r})")
    return [int(word) for word in words]


def checks_data(report: VerifyReport) -> list[dict[str, Any]]:
    """Return the checks of a verification as plain data."""
    return [dataclasses.asdict(check) | {"passed": check.passed} for check in report.checks]


def console() -> PlainConsole:
    """Create a console of the terminal's width; of 100 columns where stdout is not a terminal."""
    from pnn_compile.report.terminal import PlainConsole

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return PlainConsole(width=width)


def show(as_json: bool, result: Any, table: RenderableType) -> None:
    """Write a result to stdout: plain data or dataclasses as one JSON document, or a table."""
    if as_json:
        click.echo(json.dumps(result, indent=2, default=dataclasses.asdict))
    else:
        console().print(table)


def build_source(text: str, inputs: tuple[str, ...], arguments: tuple[str, ...]) -> Source:
    """Build a model and its inputs; what the user's code prints goes to stderr.

    Stdout belongs to the report, or to the JSON document.
    """
    from pnn_compile.sources import load_source

    with redirect_stdout(sys.stderr):
        return load_source(text, inputs, arguments)


def compile_source(source: Source, **options: Any) -> Compiled:
    """Compile a model with its inputs; the options are those of `pnn.compile`."""
    from pnn_compile.compiled import compile as compile_model

    return compile_model(source.model, args=source.args, kwargs=source.kwargs, **options)


def is_artifact(target: str) -> bool:
    """Whether a word names the directory of an artifact: it exists, or cannot name a model."""
    return Path(target).is_dir() or not ("." in Path(target).name or ":" in target)


def open_target(
    target: str,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    debug: bool,
    progress: Callable[[str], object] = lambda _: None,
) -> Compiled:
    """Load a saved artifact, or compile a model."""
    from pnn_compile.compiled import load

    if is_artifact(target):
        return load(target)
    source = build_source(target, inputs, arguments)
    return compile_source(source, stages=stages, debug=debug, progress=progress)


def read_plan(path: Path) -> Plan:
    """Read a file that contains a plan alone.

    Raises:
        OptionError: The file cannot be read.
    """
    from passes.plan.schema import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {why(error)}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not the text of a plan: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all.

    Raises:
        OptionError: The file cannot be written.
    """
    try:
        atomic.write_text(path, text)
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {why(error)}") from error


class Progress:
    """Show progress on stderr, step by step with seconds; on a terminal, what runs as well.

    Args:
        silent: Whether to show nothing.
    """

    def __init__(self, silent: bool) -> None:
        from pnn_compile.report.terminal import PlainConsole

        self._console = PlainConsole(stderr=True, quiet=silent)

    @contextmanager
    def __call__(self, text: str) -> Iterator[Callable[[str], object]]:
        """Show a step; yield a function that starts the next one.

        A line is written after every step that took a tenth of a second.
        """
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as live:
            task, step, start = live.add_task(text), text, time.perf_counter()

            def begin(new_step: str) -> None:
                nonlocal step, start
                if (seconds := time.perf_counter() - start) >= _SHORTEST:
                    self._console.print(f"{step}: {seconds:.1f} s", style="dim")
                live.reset(task, description=new_step)
                step, start = new_step, time.perf_counter()

            yield begin
            begin("")

    @contextmanager
    def bar(self, text: str) -> Iterator[Callable[[int, int, float], None]]:
        """Show steps as a bar, or in ten lines; yield a function of step, all steps and loss."""
        from rich.progress import Progress, TextColumn

        columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4g}"))
        start, terminal = time.perf_counter(), self._console.is_terminal
        with Progress(*columns, console=self._console, disable=not terminal) as progress:
            task = progress.add_task(text, total=None, loss=float("nan"))

            def advance(step: int, total: int, loss: float) -> None:
                progress.update(task, completed=step, total=total, loss=loss)
                if not terminal and step * 10 // total > (step - 1) * 10 // total:
                    seconds = time.perf_counter() - start
                    self._console.print(
                        f"{text}: step {step} of {total}, loss {loss:.4g}, {seconds:.1f} s"
                    )

            yield advance


_SHORTEST = 0.1
"""Seconds of a step that is worth a line."""
