"""Check one model: capture, legal cuts, balance, and the oracles at N = 4."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from examples.coverage.catalog import Specification
from examples.coverage.operators import declare
from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.node_facts import observe
from passes.errors import CaptureError, PnnError
from passes.ir.program import Program
from passes.ir.run_step import relative_error
from passes.options import Options
from passes.partition.choose_cuts import choose_cut
from passes.pipeline import REPLAY, Compilation, run_passes
from passes.plan.build import make_plan
from passes.plan.schema import Plan
from pnn_compile.compiled import Compiled, gather
from pnn_compile.sources import Source, load_source
from tests.models import zoo
from tests.support.parity import Step, step

__all__ = ["STAGES", "check"]

STAGES = (2, 4, 8)
"""Numbers of stages whose best balance is reported; at the middle one the oracles run."""

_OUTPUTS, _GRADIENTS = 1e-4, 1e-3
"""Largest error over the largest magnitude, in float32."""


def check(specification: Specification) -> dict[str, Any]:
    """Compile one model and hold it against the original.

    Returns:
        One row of the table, ready for JSON. `phase` is "done", or where it failed: "build",
        "run" (the model itself), "capture", "analyze", "cut", "compile" or "oracles";
        `seconds` are of processor time.
    """
    row: dict[str, Any] = {"model": specification.text, "group": specification.group}
    start = time.process_time()
    try:
        for phase, facts in _phases(specification):
            row |= facts | {"phase": phase}
    except Exception as error:
        row |= {"cause": _first_line(error), "error": _essence(error)}
    failed = [name for name, reason in row.get("oracles", {}).items() if reason]
    alone = row.get("evaluation_alone", "")
    row["ok"] = row.get("phase") == "done" and not failed and not alone
    if alone:
        row["cause"] = f"in evaluation mode alone, with every oracle green: {alone}"
    if failed:
        row["cause"] = f"{failed[0]}: {row['oracles'][failed[0]]}"
    row["seconds"] = round(time.process_time() - start, 1)
    return row


def _phases(specification: Specification) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the name of each phase before it begins, with what the one before found."""
    yield "build", {}
    source = _load(specification)
    model = source.model
    facts = {
        "family": type(model).__module__.rpartition(".")[2],
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    yield "run", facts
    with torch.no_grad(), torch.random.fork_rng():
        model.eval()(*source.args, **source.kwargs)
        model.train()
    yield "capture", {}
    program, reason = _captured(source)
    report = program.capture
    facts = {"rung": report.rung, "rejected": report.rejected, "notes": report.notes}
    yield "analyze", facts | ({"evaluation_alone": reason} if reason else {})
    analysis = analyze(program, observe(program), "flops")
    frontiers = analysis.frontiers
    facts = {
        "nodes": len(frontiers.order),
        "positions": len({position.state for position in frontiers.positions}),
        "refused": dict(frontiers.refused),
    }
    yield "cut", facts
    plans = {stages: _cut(analysis, stages) for stages in STAGES}
    balance = {
        str(stages): round(plan.forecast.imbalance, 3) if isinstance(plan, Plan) else plan
        for stages, plan in plans.items()
    }
    yield "compile", {"imbalance": balance}
    plan = plans[STAGES[1]]
    if isinstance(plan, str):
        raise PnnError(plan)
    compiled = _compile(program, analysis, plan)
    yield "oracles", {}
    yield "done", {"oracles": dict(_oracles(source, compiled, trains=not reason))}


def _captured(source: Source) -> tuple[Program, str]:
    """Capture the model, and say why in evaluation mode alone, "" where in both modes."""
    try:
        return capture(source.model, source.args, source.kwargs), ""
    except CaptureError as error:
        source.model.eval()
        try:
            return capture(source.model, source.args, source.kwargs), _first_line(error)
        except CaptureError:
            raise error from None


def _load(specification: Specification) -> Source:
    torch.manual_seed(0)
    if specification.library != "zoo":
        declare()
        return load_source(specification.source, specification.inputs, specification.arguments)
    case = zoo.by_name(specification.source.partition(":")[2])
    return Source(case.build(), case.args(4), case.kwargs(4), specification.source)


def _cut(analysis: Analysis, stages: int) -> Plan | str:
    """Return the plan, or why there is none."""
    options = Options(stages=stages)
    try:
        return make_plan(analysis, choose_cut(analysis, options), options)
    except PnnError as error:
        return f"{type(error).__name__}: {error}"


def _compile(program: Program, analysis: Analysis, plan: Plan) -> Compiled:
    start = Compilation(
        program=program, options=Options(stages=len(plan.stages)), analysis=analysis, plan=plan
    )
    compilation, results = run_passes(start, REPLAY)
    return gather(compilation, results)


def _oracles(source: Source, compiled: Compiled, *, trains: bool) -> Iterator[tuple[str, str]]:
    """Give the name of each oracle, and why it failed, "" if it did not."""
    through = not trains or _runs(source, through=True) or not _runs(source, through=False)
    trains = trains and _runs(source, through=through)
    for mode in (True, False, True):  # and back again: what one mode leaves must not be seen
        if mode and not trains:
            continue
        wanted = step(source.model, source.args, source.kwargs, train=mode, through=through)
        with _mode(compiled.sequential, mode) as forward:
            got = step(
                compiled.program.module,
                (),
                compiled.program.args,
                train=mode,
                forward=forward,
                through=through,
            )
        word = "training" if mode else "evaluation"
        yield f"forward, {word}", _outputs_differ(got, wanted)
        yield f"gradients, {word}", _gradients_differ(got, wanted, source.model)
        yield f"buffers, {word}", _differ(got.buffers, wanted.buffers, _OUTPUTS)
    keys = set(source.model.state_dict()) ^ set(compiled.original_state_dict())
    yield "keys", f"{len(keys)} differ ({', '.join(sorted(keys)[:3])})" if keys else ""
    for own in compiled.verify().checks:
        yield own.name, own.reason


def _runs(source: Source, *, through: bool) -> bool:
    """Whether the model trains on its example, with gradients through the inputs or without."""
    try:
        step(source.model, source.args, source.kwargs, train=True, through=through)
    except (RuntimeError, ValueError):
        return False
    return True


@contextmanager
def _mode(network: nn.Module, train: bool) -> Iterator[Callable[..., Any]]:
    network.train(train)
    yield network


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _outputs_differ(got: Step, wanted: Step) -> str:
    mine, own = _tensors(got.output), _tensors(wanted.output)
    if len(mine) != len(own):
        return f"{len(mine)} outputs instead of {len(own)}"
    names = [f"output {number}" for number in range(len(own))]
    return _differ(
        dict(zip(names, mine, strict=True)), dict(zip(names, own, strict=True)), _OUTPUTS
    )


def _gradients_differ(got: Step, wanted: Step, model: nn.Module) -> str:
    first: dict[Tensor, str] = {}  # a shared parameter may go by any of its names
    names = {n: first.setdefault(p, n) for n, p in model.named_parameters(remove_duplicate=False)}
    mine, own = (
        {names[name]: g for name, g in each.gradients.items() if not name.startswith("input ")}
        for each in (got, wanted)
    )
    largest = max((float(g.abs().max()) for g in own.values() if g.numel()), default=0.0)
    for name in own.keys() | mine.keys():
        a, b = (each.get(name, torch.zeros(())) for each in (mine, own))
        error = float((a.double() - b.double()).abs().max()) if a.numel() and b.numel() else 0.0
        if error > _GRADIENTS * largest:
            return f"{name}: {error:.1e} beside gradients up to {largest:.1e}"
    return ""


def _differ(mine: dict[str, Tensor], own: dict[str, Tensor], limit: float) -> str:
    for name in mine.keys() & own.keys():
        a, b = mine[name], own[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name}: {a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
        if (error := relative_error(a, b)) > limit:
            return f"{name}: relative error {error:.1e} (limit {limit:.0e})"
    return ""


def _first_line(error: BaseException) -> str:
    """The message in one line; of a refused capture, the last reason that names code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    rungs = [line for line in lines if line.startswith("torch.")]
    rungs = [line for line in rungs if ".py:" in line] or rungs
    return _portable((rungs or lines or [type(error).__name__])[-1 if rungs else 0])[:400]


def _essence(error: BaseException) -> str:
    """The whole message and the last frames that led to it."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = "\n".join(f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
    return _portable(f"{type(error).__name__}: {error}\n{places}")[:4000]


def _portable(text: str) -> str:
    """Files as Python's path finds them: what stands before differs from machine to machine."""
    for folder in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text
