"""Rebuild a network such that adding and subtracting whole states hardly rounds.

Where a guess is far larger than the state that it approximates, adding and subtracting both loses
the digits of the state, although the network is right. Guess 1e8, state 1.25, float32:

    1e8 + (1.25 - 1e8) = 0.0        1.25 + (1.25 - 1.25) = 1.25 after scaling the guess

Here the states are in float64, and every guess is scaled to the magnitude of its state: an error
that remains comes from a wrong network.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes.ir.isolation import preserved
from passes.ir.program import Interpreter, Program
from passes.plan.schema import Plan
from passes.transform.split import Stages
from passes.transform.synthesize import Operators


def in_double(program: Program, stages: Stages) -> tuple[Program, Stages]:
    """Return copies of a program and its stages in float64: inputs, weights, dtype arguments.

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
    """Return floating-point dtypes and tensors in float64, anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    floating = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if floating else value


class _ScaledPreprocess(nn.Module):
    """A preprocessing operator whose guesses are scaled to the magnitudes of the states."""

    def __init__(self, preprocess: nn.Module, magnitudes: Sequence[float]) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.magnitudes = tuple(magnitudes)

    def forward(self, *values: Tensor) -> Any:
        """Return the scaled guess: a tensor, or a tuple of them."""
        guess = self.preprocess(*values)
        if isinstance(guess, Tensor):
            return _scaled(guess, self.magnitudes[0])
        return tuple(map(_scaled, guess, self.magnitudes))


def _scaled(guess: Tensor, magnitude: float) -> Tensor:
    largest = _magnitude(guess)
    return guess * (magnitude / largest) if largest else guess


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0


class _MagnitudeRecorder(Interpreter):
    """Run a program and record the largest magnitude of every floating-point value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.by_node: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.by_node[n.name] = _magnitude(value.detach())
        return value


def scaled_operators(program: Program, plan: Plan, operators: Operators) -> Operators:
    """Return operators whose guesses have the magnitudes of the states, on the example inputs.

    Args:
        program: The original; its states are measured in evaluation mode.
        plan: Its cuts.
        operators: The preprocessing operators and coarse propagators.
    """
    recorder = _MagnitudeRecorder(program.module)
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        recorder.run_by_name(program.args)
    magnitudes = [
        [recorder.by_node[value.name] for value in face.state] for face in plan.interfaces
    ]
    preprocess = {
        number: _ScaledPreprocess(operator, magnitudes[number - 1])
        for number, operator in operators.preprocess.items()
    }
    return Operators(preprocess, operators.coarse)


def rounding_hook(generator: torch.Generator) -> Callable[..., Any]:
    """Return a forward hook that adds a random error of the size of its rounding to an output."""

    def rounded(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return value
        size = torch.finfo(value.dtype).eps * value.abs().max()
        error = 2 * torch.rand(value.shape, generator=generator, device="cpu") - 1
        return value + size * error.to(value)

    return lambda module, arguments, outputs: pytree.tree_map(rounded, outputs)
