"""The command line: `pnn-compile MODEL` compiles; every other task is a command.

In: words. Out: text or JSON on stdout, progress on stderr, an exit code. Read `compiling.py` first;
`common.py` contains what the commands share.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import itertools
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from passes.errors import OptionError, PnnError, VerificationError, printable
from passes.interrupt import INTERRUPTED, end_interrupted, raise_on_interrupt
from pnn_compile.cli.benching import bench_command, run_command
from pnn_compile.cli.compiling import compile_command
from pnn_compile.cli.exporting import export_command
from pnn_compile.cli.fitting import assess, dial_command, fit_command, probe
from pnn_compile.cli.forecasting import forecast_command, profile_command
from pnn_compile.cli.inspecting import inspect, verify

__all__ = ["main"]


_SYNONYMS = {
    "benchmark": "bench", "calibrate": "compile", "check": "verify", "convert": "compile",
    "distill": "fit", "iterate": "dial", "plan": "compile", "predict": "forecast",
    "report": "inspect", "show": "inspect", "simulate": "forecast", "train": "fit",
}  # fmt: skip
"""Words that users may try, and the commands that do it."""


class _ModelFirst(click.Group):
    """Group of commands whose first word is a model unless it names a command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Insert the command `compile` before a model."""
        if args and args[0] not in self.commands:
            self._check_mistyped(args[0])
            args = ["compile", *args]
        return super().resolve_command(ctx, args)

    def _check_mistyped(self, word: str) -> None:
        """Refuse a word that looks like a command and not like a model, with the command meant."""
        if any(mark in word for mark in "./:\\-") or Path(word).exists():
            return
        close = difflib.get_close_matches(word, self.commands, 1)
        if meant := _SYNONYMS.get(word) or next(iter(close), None):
            raise OptionError(
                f"no command or model {word!r}: did you mean 'pnn-compile {meant}'? A model is "
                "typed file.py, package.module:name, timm:NAME, torchvision:NAME or hf:NAME"
            )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept options of `compile` before the model, and --debug and --json before a command."""
        group_options = {"--help", "-h", "--version"}
        flags = list(itertools.takewhile(lambda word: word in ("--debug", "--json"), args))
        words = args[len(flags) :]
        if words and words[0] in self.commands:
            args = [words[0], *flags, *words[1:]]
        if args and args[0].startswith("-") and args[0] not in group_options:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt ends it without the empty line of click."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error


_HELP = """Compile PyTorch models into parareal neural networks.

\b
pnn-compile model.py -n 4             compile build_model() of model.py into 4 stages
pnn-compile model.py:Net --input 1x3x224x224
pnn-compile package.module:name -n 8 -o out --emit graph,onnx
pnn-compile timm:resnet50 -n 4        also torchvision:vgg16, hf:llama, or a .pt2 file
"""  # \b keeps click from filling the lines that follow


@click.group(
    cls=_ModelFirst,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
    help=_HELP,
    subcommand_metavar="MODEL [OPTIONS] | COMMAND",
)
@click.version_option(package_name="pnn-compile")
def cli() -> None:
    """Compile, inspect, verify and fit parareal neural networks."""


def _prepared(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command import torch first; an interrupt until then ends the process in one line."""

    @functools.wraps(callback)
    def run(*args: Any, **kwargs: Any) -> Any:
        importlib.import_module("pnn_compile.compiled")
        raise_on_interrupt()
        return callback(*args, **kwargs)

    return run


for _command in (
    compile_command, inspect, verify, assess, probe, fit_command, dial_command, bench_command,
    run_command, forecast_command, profile_command, export_command,
):  # fmt: skip
    assert _command.callback is not None
    _command.callback = _prepared(_command.callback)
    cli.add_command(_command)


class _Formatter(logging.Formatter):
    """Writes out control characters: messages hold names from models and files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words; those of the process if None.

    Returns:
        The exit code: 0 done, 1 a bug of this program, 2 a mistake in the input, 3 a failed
        verification, 130 interrupted.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])
    code = _run(lambda: cli.main(words, "pnn-compile", standalone_mode=False), debug)
    if arguments is not None:
        return code
    if code == INTERRUPTED:
        end_interrupted()
    sys.exit(code)


def _show_usage_error(error: click.ClickException) -> None:
    """Print a mistake in the words in one line, as all other errors; without words, the help."""
    context = getattr(error, "ctx", None)
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())) or context is None:
        error.show()
        return
    message = error.format_message()
    text = message[:1].lower() + message[1:].removesuffix(".")
    click.echo(f"error: {text}; {context.command_path} --help shows what there is", err=True)


def _run(action: Callable[[], Any], debug: bool) -> int:
    """Run a command; print its error and return the exit code."""
    try:
        result = action()
    except click.ClickException as error:
        _show_usage_error(error)
        return 2
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except PnnError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        return 3 if isinstance(error, VerificationError) else 2
    except Exception as error:
        traceback.print_exc()
        click.echo(
            f"this is a bug in pnn-compile ({type(error).__name__}); please report it with the "
            "traceback above",
            err=True,
        )
        return 1
    return result if isinstance(result, int) else 0
