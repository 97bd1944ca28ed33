"""`pnn-compile inspect` and `verify`: show, draw, compare and check compiled networks."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from passes.errors import OptionError, VerificationError
from pnn_compile.cli.command import Command
from pnn_compile.cli.common import (
    CALIBRATION_BATCH,
    DEBUG,
    DIRECTORY,
    JSON,
    Progress,
    checks_data,
    console,
    open_target,
    read_plan,
    show,
    target_options,
    write_text,
)
from pnn_compile.cli.exporting import is_onnx, show_onnx

if TYPE_CHECKING:
    from passes.plan.schema import Plan
    from pnn_compile.compiled import Compiled

_FILE = partial(click.option, type=click.Path(path_type=Path), metavar="FILE")


def _read_depth(_: click.Context, __: click.Parameter, value: str) -> int:
    if value == "all":
        return sys.maxsize
    if not value.isdecimal() or int(value) < 1:
        raise OptionError(f"--depth must be a number of at least 1, or all (got {value})")
    return int(value)


@click.command(
    cls=Command,
    examples=[
        ("build/model", "stages and modules"),
        ("build/model --html report.html --dot graph.dot", "a page and a drawing"),
        ("build/model --against build/other", "what differs"),
    ],
)
@click.argument("target")
@target_options("auto")
@click.option(
    "--depth",
    default="2",
    callback=_read_depth,
    metavar="NUMBER|all",
    help="Levels of modules that the tree and drawings show open; all for every node.",
)
@_FILE("--html", help="Write the report as one HTML page that opens from disk.")
@_FILE(
    "--samples",
    help="Samples to show for --html: error by number of iterations, pictures.",
)
@_FILE("--dot", help="Write the partition graph as DOT.")
@_FILE("--mermaid", help="Write it as a Mermaid flowchart.")
@_FILE("--graphml", help="Write it as GraphML.")
@_FILE("--trace", help="Write a simulated training step, for ui.perfetto.dev.")
@click.option("--against", metavar="OTHER", help="Artifact, plan or model to compare with.")
@JSON
@DEBUG
def inspect(
    target: str,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    against: str | None,
    as_json: bool,
    debug: bool,
    **output: Any,
) -> None:
    """Show the partition of TARGET.

    TARGET is the directory of an artifact, a model as in `pnn-compile compile`, or a .onnx file.
    With --json, the output is the partition graph as node-link data, or the result of --against.
    """
    files = [output[name] for name in ("html", "dot", "mermaid", "graphml", "trace")]
    if is_onnx(target):
        if any(files) or output["samples"] or against:
            raise OptionError(
                f"{target} contains operators and no plan: it can only be shown; name the artifact "
                "that it was exported from"
            )
        show_onnx(target, as_json)
        return
    if output["samples"] is not None and output["html"] is None:
        raise OptionError("--samples belong to the report: add --html FILE")
    open_network = partial(
        open_target, stages=stages, inputs=inputs, arguments=arguments, debug=debug
    )
    if against is not None and not any(files):
        _compare(
            _plan(against, open_network), _plan(target, open_network), (against, target), as_json
        )
        return
    compiled = open_network(target)
    _write_files(compiled, **output)
    if against is not None:
        _compare(_plan(against, open_network), compiled.plan, (against, target), as_json)
    elif as_json:
        from pnn_compile.export.graph_formats import to_node_link

        click.echo(to_node_link(compiled.graph), nl=False)
    else:
        from pnn_compile.report.terminal import report, stage_tree

        screen = console()
        screen.print(stage_tree(compiled, output["depth"]))
        screen.print(report(compiled, screen.width))


def _write_files(
    compiled: Compiled,
    depth: int,
    html: Path | None,
    samples: Path | None,
    dot: Path | None,
    mermaid: Path | None,
    graphml: Path | None,
    trace: Path | None,
) -> None:
    from passes.schedule.simulate import step_trace
    from pnn_compile.export.graph_formats import to_dot, to_graphml, to_mermaid

    if html is not None:
        from pnn_compile.inputs import read_batches
        from pnn_compile.report.html import write_report
        from pnn_compile.report.pictures import sample_pictures

        progress = Progress(False)
        rows: tuple[Any, ...] = ()
        pictures: tuple[Any, ...] = ()
        if samples is not None:
            with progress("measuring"):
                batches = read_batches(samples, compiled.program, size=CALIBRATION_BATCH, least=1)
                rows = compiled.dial(batches)
                pictures = sample_pictures(compiled, batches[0])
        with progress("writing the report"):
            write_report(compiled, html, rows, pictures)
    if dot is not None:
        write_text(dot, to_dot(compiled.graph, depth))
    if mermaid is not None:
        write_text(mermaid, to_mermaid(compiled.graph, depth))
    if graphml is not None:
        write_text(graphml, to_graphml(compiled.graph))
    if trace is not None:
        write_text(trace, json.dumps(step_trace(compiled.plan)))


def _plan(target: str, open_network: partial[Compiled]) -> Plan:
    """Return the plan of an artifact, of a file with a plan alone, or of a model."""
    from pnn_compile.artifact.directory import load_plan

    path = Path(target)
    if path.is_dir():
        return load_plan(path)
    if path.suffix != ".json":
        return open_network(target).plan
    return read_plan(path)


def _compare(before: Plan, after: Plan, names: tuple[str, str], as_json: bool) -> None:
    from pnn_compile.report.compare import compare, comparison_table

    comparison = compare(before, after)
    show(as_json, comparison, comparison_table(comparison, names))


@click.command(
    cls=Command,
    examples=[
        ("build/model", "exit code 3 if a check fails"),
        ("build/model --json", "as one JSON document"),
        ("build/model --debug", "with tracebacks"),
    ],
)
@DIRECTORY
@JSON
@DEBUG
def verify(directory: Path, as_json: bool, debug: bool) -> None:
    """Check the artifact DIRECTORY against its original.

    The checks do not depend on the weights: they show that the model was cut and assembled
    correctly. The exit code is 3 if one fails.
    """
    from pnn_compile.compiled import load
    from pnn_compile.report.terminal import checks_table

    compiled = load(directory)
    with Progress(as_json)("verifying"):
        checked = compiled.verify()
    show(as_json, checks_data(checked), checks_table(checked))
    if not checked.ok:
        raise VerificationError(f"{compiled.plan.model} failed verification; see the table")
