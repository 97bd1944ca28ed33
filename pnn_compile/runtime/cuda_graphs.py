"""CUDA graphs: launches a network, or a whole training step of one, as one graph.

The graph holds addresses: inputs are copied to where they were at capture, shapes stay, and outputs
are overwritten by the next call. Of torch's own two ways, `torch.cuda.graph` is taken (the other,
`make_graphed_callables`, cuts a step into a forward and a backward graph).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import RuntimeFault

_WARM_UP = 3
"""Runs before capture, in which libraries choose their kernels and take their workspaces."""


class CapturedForward:
    """The forward pass of a module without gradients, as a CUDA graph.

    Args:
        module: Any module on a CUDA device, a `StreamNetwork` for instance. Put it into evaluation
            mode first, unless its buffers shall move.
        *args: Example inputs on that device; all later ones must have their shapes.
        **kwargs: The same, by name.

    Raises:
        RuntimeFault: There is no CUDA device, or the module cannot be captured: it waits for the
            device, as `.item()` does.
    """

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._inputs = _Inputs((args, kwargs))
        self._module = module  # its weights stand in the graph by their addresses

        @torch.no_grad()
        def run() -> Any:
            args, kwargs = self._inputs.value
            return module(*args, **kwargs)

        self._graph, self._outputs = _captured(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on other inputs; the outputs hold until the next call.

        Raises:
            RuntimeFault: The inputs have other shapes or types than the example.
        """
        self._inputs.fill((args, kwargs))
        self._graph.replay()
        return self._outputs


class CapturedStep:
    """Forward, backward and optimizer step of a module, as one CUDA graph.

    Weights, buffers and the state of the optimizer are after construction what they were before.

    Args:
        module: Any module on a CUDA device, in training mode.
        inputs: An example: a tensor, or a tuple of positional arguments.
        target: Second argument of the loss function, after the outputs, on that device.
        loss_function: From outputs and target to a scalar.
        optimizer: Of the module's parameters; Adam and its kin need `capturable=True`. Its learning
            rate may change between steps if it is a tensor.

    Raises:
        RuntimeFault: As `CapturedForward`.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        target: Any,
        loss_function: Callable[[Any, Any], torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._inputs = _Inputs((_positional(inputs), target))
        # Weights, gradients and moments stand in the graph by their addresses.
        self._addressed = module, optimizer

        def run() -> torch.Tensor:
            args, target = self._inputs.value
            optimizer.zero_grad(set_to_none=True)
            loss = loss_function(module(*args), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach()

        before = _Snapshot(module, optimizer)
        self._graph, self._loss = _captured(run)
        before.restore()

    def __call__(self, inputs: Any, target: Any) -> torch.Tensor:
        """Take a step; return its loss, which holds until the next one.

        Raises:
            RuntimeFault: As `CapturedForward.__call__`.
        """
        self._inputs.fill((_positional(inputs), target))
        self._graph.replay()
        loss: torch.Tensor = self._loss
        return loss


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


class _Inputs:
    """Copies of example inputs, whose addresses a graph holds."""

    def __init__(self, example: Any) -> None:
        leaves, self._spec = pytree.tree_flatten(example)
        self._leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self.value = pytree.tree_unflatten(self._leaves, self._spec)

    def fill(self, inputs: Any) -> None:
        """Copy other inputs there."""
        leaves, spec = pytree.tree_flatten(inputs)
        if spec != self._spec:
            raise RuntimeFault("the inputs have another structure than those that were captured")
        for captured, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(captured, torch.Tensor):
                if not isinstance(leaf, torch.Tensor) or captured.shape != leaf.shape:
                    other = list(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf
                    raise RuntimeFault(
                        f"an input is {other}, but {list(captured.shape)} was captured: a CUDA "
                        "graph has fixed shapes; capture one for each"
                    )
                captured.copy_(leaf, non_blocking=True)
            elif captured != leaf:
                raise RuntimeFault(
                    f"an argument is {leaf!r}, but {captured!r} was captured: capture a graph for "
                    "each"
                )


class _Snapshot:
    """Weights, buffers and state of an optimizer, to be put back after trial steps."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        tensors = [*module.parameters(), *module.buffers(), *_state(optimizer)]
        self._before = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._copied = {id(tensor) for tensor in tensors}

    @torch.no_grad()
    def restore(self) -> None:
        """Put all back; what the optimizer made anew begins at zero."""
        for tensor, value in self._before:
            tensor.copy_(value)
        for tensor in _state(self._optimizer):
            if id(tensor) not in self._copied:
                tensor.zero_()


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves([*optimizer.state.values()])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm a function up, and capture it; return the graph and where the outputs are."""
    if not torch.cuda.is_available():
        raise RuntimeFault("CUDA graphs need a CUDA device, and torch sees none here")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except RuntimeError as error:
        raise RuntimeFault(
            f"a CUDA graph could not be captured: {str(error).splitlines()[0]}; the module waits "
            "for the device (.item(), a copy to the CPU, a shape that depends on values)"
        ) from error
    return graph, outputs
