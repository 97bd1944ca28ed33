"""`pnn-compile inspect` and `verify`: look at what was compiled."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from passes.errors import OptionError, VerificationError
from pnn_compile.cli.common import (
    CALIBRATION_BATCH,
    Progress,
    checks,
    console,
    open_target,
    write_file,
)
from pnn_compile.cli.exporting import is_onnx, show_onnx
from pnn_compile.cli.options import ARG, DEBUG, JSON, stages_option

if TYPE_CHECKING:
    from passes.plan.schema import Plan
    from pnn_compile.compiled import Compiled

__all__ = ["inspect", "verify"]

_FILE = partial(click.option, type=click.Path(path_type=Path), metavar="FILE")


@click.command()
@click.argument("target")
@click.option("-n", "--stages", default="auto", callback=stages_option, help="For a model: stages.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="For a model.")
@ARG
@click.option("--depth", default=2, type=int, help="Levels of the module path to show.")
@_FILE("--html", help="Write the report: one page that opens from disk.")
@_FILE("--samples", help="Measure accuracy against K for the report, on these samples.")
@_FILE("--dot", help="Write the partition graph as DOT.")
@_FILE("--mermaid", help="Write it as a Mermaid flowchart, modules collapsed to --depth levels.")
@_FILE("--graphml", help="Write it as GraphML.")
@_FILE("--trace", help="Write one simulated training step, for ui.perfetto.dev.")
@click.option("--against", metavar="OTHER", help="Compare with an artifact, a plan or a model.")
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
    """Show the partition of a saved artifact, of a model compiled on the spot, or of a .onnx.

    With --json the partition graph as node-link data, or what --against found.
    """
    files = [output[name] for name in ("html", "dot", "mermaid", "graphml", "trace")]
    if is_onnx(target):
        if any(files) or output["samples"] or against:
            raise OptionError(
                f"{target} holds operators and no plan: it can only be shown; give the artifact "
                "that it was exported from"
            )
        show_onnx(target, as_json)
        return
    if output["samples"] is not None and output["html"] is None:
        raise OptionError("--samples are for the report: add --html FILE")
    if output["depth"] < 1:
        raise OptionError(f"--depth must be at least 1 (got {output['depth']})")
    opened = partial(open_target, stages=stages, inputs=inputs, arguments=arguments, debug=debug)
    if against is not None and not any(files):
        _compare(_plan(against, opened), _plan(target, opened), (against, target), as_json)
        return
    compiled = opened(target)
    _write_files(compiled, **output)
    if against is not None:
        _compare(_plan(against, opened), compiled.plan, (against, target), as_json)
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
    if html is not None:
        from pnn_compile.inputs import read_batches
        from pnn_compile.report.html import write_report

        progress = Progress(False)
        rows: tuple[Any, ...] = ()
        if samples is not None:
            with progress("measuring"):
                batches = read_batches(samples, compiled.program, size=CALIBRATION_BATCH, least=1)
                rows = compiled.dial(batches)
        with progress("writing the report"):
            write_report(compiled, html, rows)
    if dot is not None:
        from pnn_compile.export.graph_formats import to_dot

        write_file(dot, to_dot(compiled.graph))
    if mermaid is not None:
        from pnn_compile.export.graph_formats import to_mermaid

        write_file(mermaid, to_mermaid(compiled.graph, depth))
    if graphml is not None:
        from pnn_compile.export.graph_formats import to_graphml

        write_file(graphml, to_graphml(compiled.graph))
    if trace is not None:
        from passes.schedule.trace import step_trace

        write_file(trace, json.dumps(step_trace(compiled.plan)))


def _plan(target: str, opened: partial[Compiled]) -> Plan:
    """The plan of an artifact, of a file with a plan alone, or of a model compiled on the spot."""
    from passes.plan.schema import Plan
    from pnn_compile.artifact.directory import load_plan

    path = Path(target)
    if path.is_dir():
        return load_plan(path)
    if path.suffix != ".json":
        return opened(target).plan
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the plan {path} cannot be read ({error})") from error


def _compare(before: Plan, after: Plan, names: tuple[str, str], as_json: bool) -> None:
    from pnn_compile.report.compare import compare, comparison_table

    found = compare(before, after)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        console().print(comparison_table(found, names))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@JSON
@DEBUG
def verify(directory: Path, as_json: bool, debug: bool) -> None:
    """Run the oracles on a saved artifact."""
    from pnn_compile.compiled import load

    compiled = load(directory)
    with Progress(as_json)("verifying"):
        checked = compiled.verify()
    if as_json:
        click.echo(json.dumps(checks(checked), indent=2))
    else:
        from pnn_compile.report.terminal import checks_table

        console().print(checks_table(checked))
    if not checked.ok:
        raise VerificationError(f"{compiled.plan.model} failed verification; see the table")
