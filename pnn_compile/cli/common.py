"""What the commands share: options, the console, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from passes.errors import OptionError
from pnn_compile.atomic import write_text

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.report.terminal import PlainConsole

__all__ = [
    "CALIBRATION_BATCH",
    "Progress",
    "checks",
    "console",
    "numbers",
    "open_target",
    "write_file",
]

CALIBRATION_BATCH = 128
"""Samples of one batch of calibration."""


def numbers(text: str, option: str) -> list[int]:
    """Read positive numbers by comma."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise OptionError(f"{option} must be numbers by comma, such as 2,3,6 (got {text!r})")
    return [int(word) for word in words]


def write_file(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    try:
        write_text(path, text)
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror or error}") from error


def checks(report: VerifyReport) -> list[dict[str, Any]]:
    """The checks of a verification as plain data."""
    return [asdict(check) | {"passed": check.passed} for check in report.checks]


def console() -> PlainConsole:
    """The terminal's own width; 100 columns where the output is no terminal."""
    from pnn_compile.report.terminal import PlainConsole

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return PlainConsole(width=width)


def open_target(
    target: str,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    debug: bool,
) -> Compiled:
    """Load a saved artifact, or compile a model on the spot."""
    from pnn_compile.compiled import compile as compile_model
    from pnn_compile.compiled import load
    from pnn_compile.sources import load_source

    if Path(target).is_dir():
        return load(target)
    with redirect_stdout(sys.stderr):
        source = load_source(target, inputs, arguments)
    return compile_model(
        source.model, args=source.args, kwargs=source.kwargs, stages=stages, debug=debug
    )


class Progress:
    """A spinner on stderr, for a terminal only."""

    def __init__(self, silent: bool) -> None:
        from pnn_compile.report.terminal import PlainConsole

        self._console = PlainConsole(stderr=True, quiet=silent or not sys.stderr.isatty())

    @contextmanager
    def __call__(self, what: str) -> Iterator[Callable[[str], object]]:
        """Spin while something is done; what is given says what it is by now."""
        with self._console.status(f"{what} ...") as status:
            yield lambda now: status.update(f"{now} ...")

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int, float], None]]:
        """A progress bar of steps with the loss beside it."""
        from rich.progress import Progress, TextColumn

        columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4g}"))
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=None, loss=float("nan"))

            def advance(step: int, total: int, loss: float) -> None:
                progress.update(task, completed=step, total=total, loss=loss)

            yield advance
