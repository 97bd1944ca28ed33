"""Run one capture front end and validate its graph against the model.

A front end sees the model in one mode. Its graph is taken in training mode, where every random
operator is part of it; operators with a training flag then become modules that follow the mode
(`refold.toggle`). If the result still differs in evaluation mode, because forward branches on
`self.training`, the graph of evaluation mode is merged into it (`train_eval.merge_modes`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.capture.equivalence import Reference, summarize
from passes.capture.model_copy import copy_model
from passes.capture.model_notes import join_few
from passes.capture.refold import attach, toggle
from passes.capture.train_eval import merge_modes
from passes.errors import CaptureError, first_line
from passes.ir.example_inputs import ExampleInputs, Leaf, placeholder_names
from passes.ir.isolation import (
    DrawObserver,
    preserved,
    random_sources,
    with_plain_transformers,
)
from passes.ir.module_walk import named_submodules
from passes.ir.program import graph_module, is_user_code, verify_graph

FrontEnd = Callable[[nn.Module, ExampleInputs], tuple[fx.Graph, Mapping[str, torch.Tensor]]]
"""Maps a model and its example inputs to a graph, and its constant tensors by name."""

MAX_TRIES = 3
"""Attempts before random numbers count as the model's own: another thread may have drawn them."""

_CONSTANTS = "traced_constants"
"""Name of the submodule that holds the tensor constants of a graph."""


class MismatchError(Exception):
    """The graph of a front end differs from the model."""


@dataclass(frozen=True)
class Attempt:
    """One run of one front end on a model.

    Attributes:
        model: A copy of the model, which becomes the root of the graph.
        original: The model.
        front_end: Makes the graph.
        reference: Runs of the model to compare the graph with.
    """

    model: nn.Module
    original: nn.Module
    front_end: FrontEnd
    reference: Reference

    def run(self) -> tuple[fx.GraphModule, list[str]]:
        """Return a graph that equals the model in both modes, with notes for the user.

        Raises:
            MismatchError: The graph differs from the model.
            Exception: Whatever the front end raises.
        """
        graph = self._trace(train=True)
        toggle(self.model, graph)
        module = self._finish(graph)
        if reason := self.reference.mismatch(module, modes=(True,)):
            raise MismatchError(reason)
        reason = self.reference.mismatch(module, modes=(False,))
        if not reason:
            return module, []
        try:
            paths = merge_modes(self.model, graph, self._trace(train=False))
        except Exception as error:
            raise MismatchError(f"{reason}; {error}") from error
        module = self._finish(graph)
        if reason := self.reference.mismatch(module):
            raise MismatchError(reason)
        return module, [
            f"forward has a branch on self.training in {join_few(paths)}: both branches are kept, "
            "and the mode chooses"
        ]

    def run_in_one_mode(self) -> fx.GraphModule:
        """Return a graph that equals the model in the model's current mode.

        Raises:
            MismatchError: The graph differs from the model.
            Exception: Whatever the front end raises.
        """
        graph = self._trace(train=self.original.training, model=self.model)
        toggle(self.model, graph)
        module = self._finish(graph)
        if reason := self.reference.mismatch(module, modes=(self.original.training,)):
            raise MismatchError(reason)
        return module

    def _trace(self, *, train: bool, model: nn.Module | None = None) -> fx.Graph:
        """Run the front end in one mode; its constants become buffers of the model."""
        model = model or (self.model if train else copy_model(self.original))
        for attempt in range(MAX_TRIES):
            # Numbers that forward itself draws while it is traced are constants of the graph. All
            # threads share the generators, so a changed state alone does not say who drew: the
            # next attempts observe the operators of this thread.
            observer = DrawObserver() if attempt else nullcontext()
            sources = random_sources(self.original, model)
            with preserved(self.original, model), with_plain_transformers(), observer:
                model.train(train)
                before, states = torch.get_rng_state(), [source.state() for source in sources]
                graph, constants = self.front_end(model, self.reference.inputs)
                pairs = zip(sources, states, strict=True)
                drawn = [source.name for source, state in pairs if source.state() != state]
                changed = not torch.equal(before, torch.get_rng_state())
            if observer.drawn if isinstance(observer, DrawObserver) else changed:
                drawn.append("torch")
            if not drawn:
                break
        else:
            raise MismatchError(
                "forward depends on random numbers that it draws outside the graph, from "
                + " and ".join(drawn)
            )
        for node in graph.nodes:
            if node.name == "self":  # the code of the graph has it for the module
                node._rename("self_1")
        _adopt_constants(self.model, graph, constants, "" if train else "evaluation_")
        for index in self.reference.written:
            _copy_before_write(graph, self.reference.inputs.leaves[index])
        return graph

    def _finish(self, graph: fx.Graph) -> fx.GraphModule:
        module = graph_module(self.model, graph, type(self.model).__name__)
        verify_graph(module)
        targets = {node.target for node in graph.nodes if node.op == "placeholder"}
        missing = [name for name in placeholder_names(self.reference.inputs) if name not in targets]
        if missing:
            raise CaptureError(f"the graph does not take the arguments {', '.join(missing)}")
        return module


def _adopt_constants(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, torch.Tensor], prefix: str
) -> None:
    """Register the tensors that a graph holds as constants as buffers that are not saved.

    Args:
        model: Gets a submodule with the buffers.
        graph: Its nodes are made to read the buffers.
        constants: The tensors by the targets of the nodes that read them.
        prefix: Prefix for a name that already has another value, from the graph of the other mode.
    """
    if _CONSTANTS not in dict(model.named_children()):
        attach(model, _CONSTANTS, nn.Module())
    holder = model.get_submodule(_CONSTANTS)
    for node in graph.nodes:
        if node.op == "get_attr" and (value := constants.get(str(node.target))) is not None:
            name = str(node.target).replace(".", "_").lstrip("_")
            existing = holder._buffers.get(name)
            if existing is not None and not _equal(existing, value):
                name = f"{prefix}{name}"
            holder.register_buffer(name, value, persistent=False)
            node.target = f"{_CONSTANTS}.{name}"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _copy_before_write(graph: fx.Graph, leaf: Leaf) -> None:
    """Make the graph write into a copy of an input, which other stages read concurrently."""
    node = next(n for n in graph.nodes if n.op == "placeholder" and n.target == leaf.argument)
    for key in leaf.path:
        node = next(user for user in node.users if user.args == (node, key))
    last_placeholder = node
    while last_placeholder.next.op == "placeholder":
        last_placeholder = last_placeholder.next
    with graph.inserting_after(last_placeholder):
        clone = graph.call_method("clone", (node,))
    node.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)


def describe_error(model: nn.Module, error: BaseException) -> str:
    """Describe in one line what failed, in which module, at which line of the user's code."""
    if isinstance(error, MismatchError):
        return first_line(error)
    if (location := locate_error(model, error)) is None:
        return summarize(error)
    class_name = type(model.get_submodule(location.path)).__name__
    return (
        f"{summarize(error)} in {location.path or class_name} ({class_name}) at {location.source}"
    )


@dataclass(frozen=True)
class ErrorLocation:
    """Where in a model an error was raised.

    Attributes:
        path: Qualified name of the innermost module whose code was running.
        source: `file:line` of the user's code.
    """

    path: str
    source: str


def locate_error(model: nn.Module, error: BaseException) -> ErrorLocation | None:
    """Find the innermost module in whose forward an error was raised; None if there is none.

    A frame belongs to a module if its first argument (`self`) is that module.
    """
    names = {id(module): name for name, module in named_submodules(model)}
    location = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        arguments = frame.f_code.co_varnames
        owner = frame.f_locals.get(arguments[0]) if arguments else None
        filename = frame.f_code.co_filename
        if id(owner) in names and is_user_code(filename):
            location = ErrorLocation(names[id(owner)], f"{filename}:{line}")
    return location
