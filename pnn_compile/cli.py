"""The command line: `pnn-compile MODEL`, `inspect`, `verify`, `fit`, `dial`."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console

from passes.errors import OptionError, PnnError, VerificationError

if TYPE_CHECKING:
    from pnn_compile.api import Compiled
    from pnn_compile.verdict import Verdict
    from pnn_compile.verify import VerifyReport

__all__ = ["main"]

EMITTED = ("graph", "onnx")
_CALIBRATION_BATCH = 128


class _ModelFirst(click.Group):
    """A group whose first word is a model unless it names a command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Insert the command `compile` in front of a model."""
        if args and args[0] not in self.commands:
            args = ["compile", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let options of `compile` stand in front of the model, and --debug before any command."""
        known = {"--help", "-h", "--version"}
        flags = list(itertools.takewhile(lambda word: word in ("--debug", "--json"), args))
        rest = args[len(flags) :]
        if rest and rest[0] in self.commands:
            args = [rest[0], *flags, *rest[1:]]
        if args and args[0].startswith("-") and args[0] not in known:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


_HELP = """Compile PyTorch models into parareal neural networks.

\b
pnn-compile model.py -n 4             compile build_model() of model.py into 4 stages
pnn-compile model.py:Net --input 1x3x224x224
pnn-compile package.module:attribute -n 8 -o out --emit graph,onnx
pnn-compile timm:resnet50 -n 4        also torchvision:vgg16, hf:llama, a folder or file .pt2
"""  # \b keeps click from filling the lines that follow


@click.group(
    cls=_ModelFirst,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=_HELP,
    subcommand_metavar="MODEL [OPTIONS] | COMMAND",
)
@click.version_option(package_name="pnn-compile")
def cli() -> None:
    """Compile, inspect, verify and fit parareal neural networks."""


def _stages(_: click.Context, __: click.Parameter, value: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return int(value)
    except ValueError as error:
        raise OptionError(f"-n must be a number or 'auto' (got {value!r})") from error


def _emitted(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    wanted = tuple(part.strip() for part in value.split(",") if part.strip())
    unknown = [part for part in wanted if part not in EMITTED]
    if unknown:
        raise OptionError(f"--emit knows {', '.join(EMITTED)} (got {', '.join(unknown)})")
    return wanted


_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_ARG = click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument of what builds the model, such as num_layers=24; repeatable.",
)
_DEBUG = click.option("--debug", is_flag=True, help="Tracebacks, and graph checks between passes.")


@cli.command(name="compile")
@click.argument("model")
@click.option("-n", "--stages", default="auto", callback=_stages, help="Number of stages, or auto.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SHAPE[:DTYPE]",
    help="Example input, such as 1x3x224x224 or mask=1x128:bool; repeatable.",
)
@_ARG
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to save to.")
@click.option(
    "--emit",
    default="graph",
    callback=_emitted,
    metavar="graph,onnx",
    help="What to write into the directory.",
)
@click.option("--cost", default="flops", help="flops or measured.")
@click.option(
    "--coarse",
    default="auto",
    help="auto, linear, lowrank, conv, a sum of these (linear+lowrank), units, thinned (every m-th "
    "trained block, its branch scaled by m), exact or zero.",
)
@click.option("--coarse-budget", default=0.05, type=float, help="Largest share of the sweep.")
@click.option("--units", default=1, type=int, help="Repeating blocks to copy or keep (N_c).")
@click.option("--rank", default=32, type=int, help="Rank of family lowrank.")
@click.option(
    "--preprocess", default="auto", help="auto, convolution, linear, lowrank, conv, or a sum."
)
@click.option("--prologue", default=None, type=float, help="Share of first layers in a guess.")
@click.option("--correction", default="residual", help="residual or difference.")
@click.option("--sweep", default="chain", help="chain or collapsed.")
@click.option("--iterations", default=1, type=int, help="Parareal iterations K.")
@click.option("--cut-at", metavar="NAMES", help="Modules that start stages 1.., by comma.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Replay this plan.")
@click.option("--seed", default=0, type=int, help="Seed of the coarse networks.")
@click.option(
    "--calibrate",
    "samples",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Fit guesses and corrections to the weights, on samples (.safetensors or .npz).",
)
@click.option("--verify/--no-verify", "check", default=True, help="Run the oracles (default).")
@click.option("-q", "--quiet", is_flag=True, help="No report.")
@_JSON
@_DEBUG
def compile_command(
    model: str,
    output: Path | None,
    emit: tuple[str, ...],
    samples: Path | None,
    check: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    r"""Compile MODEL.

    \b
    MODEL is one of
      file.py, file.py:name, package.module:name
      timm:NAME, torchvision:NAME    random weights
      hf:NAME                        a model type or class of transformers, small and random,
                                     or a folder with a config.json
      file.pt2                       written by torch.export.save, without pickled objects
    """
    if output is None and "onnx" in emit:
        raise OptionError("--emit onnx needs a directory to write to: add -o DIR")
    from pnn_compile.artifact import check_replaceable
    from pnn_compile.samples import read_batches

    if output is not None:
        check_replaceable(output)
    progress = _Progress(quiet or as_json)
    if samples is not None:
        options["calibration"] = partial(read_batches, samples, size=_CALIBRATION_BATCH, least=5)
    with progress("compiling" if samples is None else "compiling and calibrating"):
        compiled = _compile(model, options, debug)
    checked = None
    if check:
        with progress("verifying"):
            checked = compiled.verify()
    if output is not None:
        with progress("saving"):
            compiled.save(output)
        if "onnx" in emit:
            with progress("exporting to ONNX"):
                compiled.export_onnx(output / "model.onnx")
    verdict = None
    if samples is not None:
        with progress("judging"):
            verdict = compiled.assess(options["calibration"](compiled.program))
    _show(compiled, checked, verdict, output, quiet, as_json)
    if checked is not None and not checked.ok:
        raise VerificationError(f"{compiled.plan.model} failed verification; see the table")


def _compile(model: str, options: dict[str, Any], debug: bool) -> Compiled:
    from pnn_compile.api import compile as compile_model
    from pnn_compile.sources import load_source

    # What the user's own file prints belongs to stderr: stdout is the report's, or the JSON's.
    with redirect_stdout(sys.stderr):
        source = load_source(model, options.pop("inputs"), options.pop("arguments"))
    cuts = options.pop("cut_at")
    plan_file = options.pop("plan_file")
    return compile_model(
        source.model,
        args=source.args,
        kwargs=source.kwargs,
        cuts=[name.strip() for name in cuts.split(",")] if cuts else None,
        plan=_read_plan(plan_file) if plan_file else None,
        debug=debug,
        **options,
    )


def _read_plan(path: Path) -> Any:
    from passes.plan import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"the plan {path} cannot be read: {error.strerror}") from error


@cli.command()
@click.argument("target")
@click.option("-n", "--stages", default="auto", callback=_stages, help="For a model: stages.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="For a model.")
@_ARG
@click.option("--depth", default=2, type=int, help="Levels of the module path to show.")
@click.option("--dot", type=click.Path(path_type=Path), help="Write the partition graph as DOT.")
@_JSON
@_DEBUG
def inspect(
    target: str,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    depth: int,
    dot: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Show the partition of a saved artifact, or of a model compiled on the spot."""
    compiled = _open(target, stages, inputs, arguments, debug)
    if dot is not None:
        from pnn_compile.export.dot import to_dot

        _write(dot, to_dot(compiled.graph))
    if as_json:
        import networkx as nx

        click.echo(json.dumps(nx.node_link_data(compiled.graph, edges="edges"), indent=2))
        return
    from pnn_compile.report.terminal import report, stage_tree

    console = _console()
    console.print(stage_tree(compiled, depth))
    console.print(report(compiled, console.width))


def _open(
    target: str,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    debug: bool,
) -> Compiled:
    from pnn_compile.api import compile as compile_model
    from pnn_compile.api import load
    from pnn_compile.sources import load_source

    if Path(target).is_dir():
        return load(target)
    with redirect_stdout(sys.stderr):
        source = load_source(target, inputs, arguments)
    return compile_model(
        source.model, args=source.args, kwargs=source.kwargs, stages=stages, debug=debug
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}") from error


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@_JSON
@_DEBUG
def verify(directory: Path, as_json: bool, debug: bool) -> None:
    """Run the oracles on a saved artifact."""
    from pnn_compile.api import load

    compiled = load(directory)
    with _Progress(as_json)("verifying"):
        checked = compiled.verify()
    if as_json:
        click.echo(json.dumps(_checks(checked), indent=2))
    else:
        from pnn_compile.report.terminal import checks_table

        _console().print(checks_table(checked))
    if not checked.ok:
        raise VerificationError(f"{compiled.plan.model} failed verification; see the table")


@cli.command()
@click.argument("model")
@click.argument("samples", type=click.Path(path_type=Path))
@click.option("-n", "--stages", default="2,3,4", metavar="N,N,...", help="Numbers of stages.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="Example input.")
@click.option("--coarse-budget", default=0.05, type=float, help="Largest share of the sweep.")
@click.option("--iterations", default=2, type=click.IntRange(min=1), help="Largest K to try.")
@_JSON
@_DEBUG
def assess(
    model: str,
    samples: Path,
    stages: str,
    inputs: tuple[str, ...],
    coarse_budget: float,
    iterations: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Tell what MODEL, trained, keeps as a parareal network, on SAMPLES, without training it."""
    from pnn_compile.api import compile as compile_model
    from pnn_compile.report.verdict import verdict_table
    from pnn_compile.samples import read_batches
    from pnn_compile.sources import load_source

    numbers = _numbers(stages)
    read = partial(read_batches, samples, size=_CALIBRATION_BATCH, least=5)
    with redirect_stdout(sys.stderr):
        source = load_source(model, inputs)
    with _Progress(as_json)("judging"):
        compiled = compile_model(
            source.model, args=source.args, kwargs=source.kwargs, stages=numbers[0],
            coarse_budget=coarse_budget, calibration=read, debug=debug,
        )  # fmt: skip
        verdict = compiled.assess(
            read(compiled.program),
            stages=numbers[1:],
            iterations=iterations,
            coarse_budget=coarse_budget,
        )
    if as_json:
        click.echo(json.dumps(asdict(verdict), indent=2))
    else:
        _console().print(verdict_table(verdict))


def _numbers(text: str) -> list[int]:
    """Numbers of stages, by comma."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise OptionError(f"-n must be numbers by comma, such as 2,3,6 (got {text!r})")
    return [int(word) for word in words]


@cli.command(name="fit")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("samples", type=click.Path(path_type=Path))
@click.option("--epochs", default=1, type=click.IntRange(min=1), help="Times through the samples.")
@click.option(
    "--interface-epochs",
    default=0,
    type=click.IntRange(min=0),
    help="Times before that, for every guess and correction by itself.",
)
@click.option("--batch", default=64, type=click.IntRange(min=1), help="Samples per step.")
@click.option("--learning-rate", default=1.5e-3, type=float, help="Peak learning rate.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File to save to and resume.")
@click.option("--seed", default=0, type=int, help="Seed of the order of the samples.")
@_JSON
@_DEBUG
def fit_command(
    directory: Path,
    samples: Path,
    epochs: int,
    interface_epochs: int,
    batch: int,
    learning_rate: float,
    checkpoint: Path | None,
    seed: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a saved artifact to the outputs of its original on SAMPLES, and save it again."""
    from pnn_compile.api import load
    from pnn_compile.fit import fit
    from pnn_compile.samples import read_batches

    compiled = load(directory)
    batches = read_batches(samples, compiled.program, batch, shuffle_seed=seed)
    with _Progress(as_json).bar("fitting") as advance:
        report = fit(
            compiled,
            batches,
            epochs=epochs,
            interface_epochs=interface_epochs,
            learning_rate=learning_rate,
            checkpoint=checkpoint,
            progress=advance,
        )
    compiled.save(directory)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    from pnn_compile.report.terminal import interfaces_table

    console = _console()
    if report.interfaces:
        console.print(interfaces_table(report))
    console.print(
        f"{report.steps} steps on {report.samples} samples: loss {report.first_loss:.4g} to "
        f"{report.last_loss:.4g}; saved to {directory}"
    )


@cli.command(name="dial")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("samples", type=click.Path(path_type=Path))
@click.option("--batch", default=64, type=click.IntRange(min=1), help="Samples per call.")
@_JSON
@_DEBUG
def dial_command(directory: Path, samples: Path, batch: int, as_json: bool, debug: bool) -> None:
    """Measure on SAMPLES what a saved artifact gives at every number of iterations."""
    from pnn_compile.api import load
    from pnn_compile.samples import read_batches

    compiled = load(directory)
    batches = read_batches(samples, compiled.program, batch)
    with _Progress(as_json)("iterating"):
        rows = compiled.dial(batches)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from pnn_compile.report.dial import dial_table

    _console().print(dial_table(compiled.plan.model, rows))


def _show(
    compiled: Compiled,
    checked: VerifyReport | None,
    verdict: Verdict | None,
    output: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    if as_json:
        document = {
            "plan": json.loads(compiled.plan.to_json()),
            "capture": asdict(compiled.program.capture),
            "passes": [asdict(result) for result in compiled.passes],
            "verify": _checks(checked) if checked else None,
            "calibration": asdict(compiled.calibration) if compiled.calibration else None,
            "verdict": asdict(verdict) if verdict else None,
            "output": str(output) if output else None,
        }
        click.echo(json.dumps(document, indent=2))
        return
    if quiet:
        return
    calibrated = compiled.calibration
    from pnn_compile.report.terminal import calibration_table, checks_table, report
    from pnn_compile.report.verdict import verdict_table

    console = _console()
    console.print(report(compiled, console.width))
    if calibrated is not None:
        console.print(calibration_table(calibrated))
    if verdict is not None:
        console.print(verdict_table(verdict))
    if checked is not None:
        console.print(checks_table(checked))
    if output is not None:
        console.print(f"saved to {output}", highlight=False)


def _checks(report: VerifyReport) -> list[dict[str, Any]]:
    return [asdict(check) | {"passed": check.passed} for check in report.checks]


def _console() -> Console:
    """The terminal's own width; 100 columns where the output is no terminal."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(highlight=False, width=width)


class _Progress:
    """A spinner on stderr, for a terminal only."""

    def __init__(self, silent: bool) -> None:
        self._console = Console(stderr=True, quiet=silent or not sys.stderr.isatty())

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        with self._console.status(f"{what} ..."):
            yield

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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 done, 1 a bug of this program, 2 a mistake in the input, 3 verification failed.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s")
    code = _guarded(lambda: cli.main(words, "pnn-compile", standalone_mode=False), debug)
    if arguments is None:
        sys.exit(code)
    return code


def _guarded(action: Callable[[], Any], debug: bool) -> int:
    try:
        result = action()
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
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
