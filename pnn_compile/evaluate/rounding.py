"""A network in which adding and subtracting whole states rounds hardly at all.

Where a guess is far larger than the state that it stands for, the digits of the state are lost when
both are added and subtracted, though the wiring be right. Here the states are in float64, and every
guess has the magnitude of its state: what differs still is wired wrongly.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes.ir.interpreter import Interpreter
from passes.ir.isolation import preserved
from passes.ir.program import Program
from passes.plan.schema import Plan
from passes.transform.split import Stages
from passes.transform.synthesize import Operators

__all__ = ["even_operators", "in_double"]


def in_double(program: Program, stages: Stages) -> tuple[Program, Stages]:
    """Return copies of a program and its stages in float64: inputs, weights, precisions asked for.

    Raises:
        RuntimeError: The module of a node cannot be converted.
    """
    args = pytree.tree_map(_widened, dict(program.args))
    fine = tuple(map(_doubled, stages.fine))
    doubled = dataclasses.replace(program, module=_doubled(program.module), args=args)
    return doubled, Stages(fine, _doubled(stages.head))


def _doubled(module: fx.GraphModule) -> fx.GraphModule:
    module = copy.deepcopy(module).double()
    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _widened)
        if node.op == "call_method" and node.target in _METHODS:
            node.target = "double"
    module.recompile()
    return module


_METHODS = ("float", "half", "bfloat16")


def _widened(value: Any) -> Any:
    """A precision, or a tensor of it, in float64; anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    floating = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if floating else value


class _Even(nn.Module):
    """Gives the guess another gives, each tensor with the magnitude of its state."""

    def __init__(self, guess: nn.Module, magnitudes: Sequence[float]) -> None:
        super().__init__()
        self.guess = guess
        self.magnitudes = tuple(magnitudes)

    def forward(self, *values: Tensor) -> Any:
        """Guess the states, in the shapes that the guess gives them."""
        made = self.guess(*values)
        if isinstance(made, Tensor):
            return _scaled(made, self.magnitudes[0])
        return tuple(map(_scaled, made, self.magnitudes))


def _scaled(guess: Tensor, magnitude: float) -> Tensor:
    largest = _magnitude(guess)
    return guess * (magnitude / largest) if largest else guess


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0


class _Magnitudes(Interpreter):
    """Runs a program and notes the largest magnitude of every floating point value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = _magnitude(value.detach())
        return value


def even_operators(program: Program, plan: Plan, operators: Operators) -> Operators:
    """Return operators whose guesses have the magnitudes of the states, on the example inputs.

    Args:
        program: What the states are measured on, in evaluation mode.
        plan: Where it is cut.
        operators: The guesses and corrections.
    """
    meter = _Magnitudes(program.module)
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        meter.run(*(program.args[str(node.target)] for node in program.inputs))
    guesses = {
        number: _Even(guess, [meter.found[v.name] for v in plan.interfaces[number - 1].state])
        for number, guess in operators.preprocess.items()
    }
    return Operators(guesses, operators.coarse)
