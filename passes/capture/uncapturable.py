"""Name what in a model's own code no graph can hold, after every front end was rejected.

The model runs once more in each mode, under an observer of its calls of torch. It notices

- derivatives that forward takes itself (`torch.autograd.grad`), and hooks on gradients,
- generators that forward passes to torch, or draws from beside torch,
- another result of a second run from the same random state,
- random numbers that Python decides by:

      keep = torch.rand(1)          drawn
      if keep < 0.1:                decided: a graph has one of the branches, for ever
          return x

The front ends stop at the same lines, but say what they see: a truth value, a fake tensor, a
constant.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from passes.ir.example_inputs import ExampleInputs
from passes.ir.isolation import preserved, random_sources, same_values, seed_everything
from passes.ir.module_walk import named_submodules, set_mode
from passes.ir.program import is_user_code, tensor_leaves
from passes.ir.run_step import output_tensors

_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
_RUNS = 6
"""Runs from one random state: what a hidden generator decides may be the same in a few of them."""
_DROPPING = ("torch.dropout", "torch.feature_dropout", "torch.alpha_dropout", "torch.rrelu")
"""Functions whose results are values of the model, some of which are changed at random."""
_READS = ("__bool__", "item", "tolist", "__float__", "__int__", "__index__", "numpy")
"""Methods of a tensor that make Python values of its numbers."""


def find_uncapturable_line(model: nn.Module, inputs: ExampleInputs, *, train: bool) -> str:
    """Return what in the code of a model no graph can hold, with the line; "" if nothing is seen.

    The ladder runs this last, when every rung has failed and no mode alone was captured.

    Args:
        model: A copy of the model.
        inputs: Its example inputs.
        train: Whether to look in training mode.
    """
    mode = f"in {'training' if train else 'evaluation'} mode"
    observer = _Observer()
    results = [_run(model, inputs, observer, train=train) for _ in range(_RUNS)]
    if observer.obstacle:
        return f"{mode}, {observer.obstacle}"
    if not all(_same(results[0], other) for other in results[1:]):
        return (
            f"{mode}, another run from the same random state has another result (forward draws "
            "from a generator of its own, reads a clock, or counts its calls outside of the model)"
        )
    return ""


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(same_values, first, second))


def _run(
    model: nn.Module, inputs: ExampleInputs, observer: _Observer, *, train: bool
) -> list[torch.Tensor]:
    """Run a model under an observer; return its output tensors, none if it fails."""
    args, kwargs = inputs.copied()
    output = None
    with preserved(model), _watch(model, observer), contextlib.suppress(Exception), observer:
        seed_everything(0)
        set_mode(model, train)
        output = model(*args, **kwargs)
    return [tensor.detach() for tensor in output_tensors(output)]


class _Observer(TorchFunctionMode):
    """Observe calls of torch; the first obstacle counts.

    Attributes:
        obstacle: What was seen, with the line of the user's code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.obstacle = ""
        # Tensors computed from random numbers, and the function that drew them.
        self._drawn: dict[int, tuple[torch.Tensor, str]] = {}

    def note(self, obstacle: str) -> None:
        """Keep an obstacle if it is the first."""
        self.obstacle = self.obstacle or obstacle

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch and note what it says about the code that called it."""
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        arguments = pytree.tree_leaves((args, kwargs or {}))
        sources = [self._drawn[id(leaf)][1] for leaf in arguments if id(leaf) in self._drawn]
        if func in _DERIVATIVES:
            line = "torch.autograd.grad" if func is torch.autograd.grad else "backward"
            self.note(f"forward calls {line}{_line()}, and no graph holds a derivative of itself")
        if func is torch.Tensor.register_hook:
            self.note(
                f"forward registers a hook on a gradient{_line()}, and no graph holds one (write a "
                "torch.autograd.Function with that backward)"
            )
        if any(isinstance(leaf, torch.Generator) for leaf in arguments):
            self.note(
                f"forward passes a torch.Generator to {name}{_line()}, and no graph can hold one "
                "(use torch's own, which torch.manual_seed seeds)"
            )
        if sources and name in _READS and sources[0].startswith(_DROPPING):
            self.note(
                f"Python reads{_line()} values of the model, and a graph would decide by those of "
                "the example for ever (let torch.where decide, or move what decides into a "
                "submodule of its own, which stays one call)"
            )
        elif sources and name in _READS:
            self.note(
                f"Python reads{_line()} random numbers that it draws by {sources[0]}, and a graph "
                "would repeat them for ever (multiply by a random mask, or move what is random "
                "into a submodule of its own)"
            )
        before = torch.get_rng_state()
        result = func(*args, **(kwargs or {}))
        if not sources and not torch.equal(before, torch.get_rng_state()):
            sources = [f"torch.{name}{_line()}"]
        if sources:
            self._drawn |= {id(tensor): (tensor, sources[0]) for tensor in tensor_leaves(result)}
        return result


def _line() -> str:
    """Return ` at file:line` of the innermost user code, "" if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if is_user_code(frame.f_code.co_filename):
            return f" at {frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextlib.contextmanager
def _watch(model: nn.Module, observer: _Observer) -> Any:
    """Note the innermost module whose forward draws from a generator that is not torch's own."""
    states: list[list[bytes]] = []

    def enter(module: nn.Module, args: Any) -> None:
        states.append([source.state() for source in random_sources(model)])

    def leave(path: str) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, output: Any) -> None:
            pairs = zip(random_sources(model), states.pop(), strict=False)
            drawn = next((source.name for source, state in pairs if source.state() != state), "")
            if drawn:
                place = f"forward of {path}" if path else "forward"
                observer.note(
                    f"{place} ({type(module).__name__}) uses random numbers that it draws from "
                    f"{drawn}, and a graph would repeat them for ever (use torch's functions on "
                    "tensors, or move what is random into a submodule of its own)"
                )

        return compare

    handles = [module.register_forward_pre_hook(enter) for module in nn.Module.modules(model)]
    handles += [
        module.register_forward_hook(leave(path), always_call=True)
        for path, module in named_submodules(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
