"""Captured and compiled models for the tests, made once: to be read, never to be changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.node_facts import observe
from passes.ir.observer import Fact
from passes.ir.program import Program
from passes.options import Options
from passes.pipeline import COMPILE, Compilation, run_passes
from passes.transform.split import Stages
from tests.models.zoo import by_name

P = ParamSpec("P")
T = TypeVar("T")


def copies(build: Callable[P, T]) -> Callable[P, T]:
    """Build once what a function builds, and return a copy at every call: tests may change it."""

    built: dict[Any, T] = {}

    def copy_of(*args: P.args, **kwargs: P.kwargs) -> T:
        key = args, tuple(sorted(kwargs.items()))
        if key not in built:
            with torch.random.fork_rng(devices=[]):  # the first test goes on as the others do
                torch.manual_seed(0)
                built[key] = build(*args, **kwargs)
        return copy.deepcopy(built[key])

    return copy_of


@cache
def program(name: str) -> Program:
    """Capture a model of the zoo at batch size 2."""
    case = by_name(name)
    return capture(case.build(), case.args(2), case.kwargs(2))


@cache
def analysis(name: str) -> Analysis:
    """Analyse a model of the zoo, by FLOPs."""
    return analyze(program(name), observe(program(name)), "flops")


@cache
def compiled(name: str, **options: Any) -> Compilation:
    """Compile a model of the zoo, with every graph verified between passes."""
    return compile_program(program(name), **options)


def compile_program(captured: Program, **options: Any) -> Compilation:
    """Run all passes on a program, with every graph verified between them.

    Compilations by FLOPs share one analysis of the program.
    """
    start = Compilation(program=captured, options=Options(**options))
    if "cost" in options or "devices" in options:
        return run_passes(start, COMPILE, check=True)[0]
    if id(captured) not in _analyses:
        _analyses[id(captured)] = analyze(captured, observe(captured), "flops")
    start = replace(start, analysis=_analyses[id(captured)])
    return run_passes(start, COMPILE[1:], check=True)[0]


_analyses: dict[int, Analysis] = {}
"""By the id of the program, which the analysis keeps alive."""


def compile_model(model: nn.Module, *args: Any, **options: Any) -> Compilation:
    """Capture and compile a model."""
    return compile_program(capture(model, args), **options)


def analyze_model(model: nn.Module, *args: Any) -> Analysis:
    """Capture and analyse a model, by FLOPs."""
    captured = capture(model, args)
    return analyze(captured, observe(captured), "flops")


def call(name: str, batch: int) -> dict[str, Any]:
    """Return the inputs of a model of the zoo by argument name."""
    case = by_name(name)
    names = [str(node.target) for node in program(name).inputs]
    return dict(zip(names, case.args(batch), strict=False)) | case.kwargs(batch)


def parts(compilation: Compilation) -> tuple[Stages, fx.GraphModule, fx.GraphModule]:
    """Return the stages, their composition and the parareal network."""
    assert compilation.stages is not None
    assert compilation.sequential is not None
    assert compilation.module is not None
    return compilation.stages, compilation.sequential, compilation.module


def node(captured: Program, name: str) -> fx.Node:
    """Return the node of this name."""
    return next(one for one in captured.graph.nodes if one.name == name)


def facts_by_name(captured: Program) -> dict[str, Fact]:
    """Observe a program; facts by the names of the nodes."""
    return {one.name: fact for one, fact in observe(captured).items()}


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share their memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
