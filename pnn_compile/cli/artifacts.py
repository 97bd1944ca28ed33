"""`pnn-compile inspect` and `verify`: look at what was compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from passes.errors import OptionError, VerificationError
from pnn_compile.cli.common import (
    ARG,
    DEBUG,
    JSON,
    Progress,
    checks,
    console,
    open_target,
    stages_option,
)

__all__ = ["inspect", "verify"]


@click.command()
@click.argument("target")
@click.option("-n", "--stages", default="auto", callback=stages_option, help="For a model: stages.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="For a model.")
@ARG
@click.option("--depth", default=2, type=int, help="Levels of the module path to show.")
@click.option("--dot", type=click.Path(path_type=Path), help="Write the partition graph as DOT.")
@JSON
@DEBUG
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
    compiled = open_target(target, stages, inputs, arguments, debug)
    if dot is not None:
        from pnn_compile.export.dot import to_dot

        _write(dot, to_dot(compiled.graph))
    if as_json:
        import networkx as nx

        click.echo(json.dumps(nx.node_link_data(compiled.graph, edges="edges"), indent=2))
        return
    from pnn_compile.report.terminal import report, stage_tree

    screen = console()
    screen.print(stage_tree(compiled, depth))
    screen.print(report(compiled, screen.width))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}") from error


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@JSON
@DEBUG
def verify(directory: Path, as_json: bool, debug: bool) -> None:
    """Run the oracles on a saved artifact."""
    from pnn_compile.api import load

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
