"""One front end at work: its graph, made to follow the mode, and held against the model."""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.capture.equivalence import Reference
from passes.capture.refold import attach, toggle
from passes.capture.train_eval import merge_modes
from passes.errors import CaptureError
from passes.ir.example_inputs import Arguments, Leaf, placeholders
from passes.ir.isolation import masks_kept, preserved
from passes.ir.program import graph_module, is_user_code, verify_graph

__all__ = [
    "TRIES",
    "Attempt",
    "FrontEnd",
    "MismatchError",
    "Place",
    "copied",
    "explain",
    "few",
    "locate",
]

FrontEnd = Callable[[nn.Module, Arguments, bool], tuple[fx.Graph, Mapping[str, torch.Tensor]]]
"""From a model, its inputs and whether the batch size is free to a graph and its constants."""

TRIES = 3
"""How often to look again where another thread may have drawn from the generator meanwhile."""

_CONSTANTS = "traced_constants"


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        CaptureError: It cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be copied: {error}") from error


class MismatchError(Exception):
    """The graph of a front end is not the model."""


@dataclass(frozen=True)
class Attempt:
    """One front end at work on a model.

    Attributes:
        model: A copy of the model, which becomes the root of the graph.
        original: The model.
        arguments: Its example inputs.
        front_end: What makes the graph.
        reference: What the graph is held against.
    """

    model: nn.Module
    original: nn.Module
    arguments: Arguments
    front_end: FrontEnd
    reference: Reference

    def run(self) -> tuple[fx.GraphModule, list[str]]:
        """Return the graph that equals the model in both modes, with what there is to say of it.

        The graph is made in training mode, where everything random is in it, and merged with that
        of evaluation mode where flags alone do not make it follow the mode.

        Raises:
            MismatchError: The graph is not the model.
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
            f"forward has a branch on self.training in {few(paths)}: both branches are kept, and "
            "the mode chooses"
        ]

    def run_in_one_mode(self) -> fx.GraphModule:
        """Return the graph that equals the model in the mode that the model is in.

        Raises:
            MismatchError: The graph is not the model.
            Exception: Whatever the front end raises.
        """
        graph = self._trace(train=self.original.training)
        toggle(self.model, graph)
        module = self._finish(graph)
        if reason := self.reference.mismatch(module, modes=(self.original.training,)):
            raise MismatchError(reason)
        return module

    def _trace(self, *, train: bool) -> fx.Graph:
        pristine = self.model if train else copied(self.original)
        for _ in range(TRIES):
            with preserved(pristine), masks_kept():
                pristine.train(train)
                state = torch.get_rng_state(), random.getstate()
                graph, constants = self.front_end(
                    pristine, self.arguments, self.reference.dynamic_batch
                )
                after = torch.get_rng_state(), random.getstate()
            if torch.equal(state[0], after[0]) and state[1] == after[1]:
                break
            # Or another thread drew them: then they are not drawn every time.
        else:
            raise MismatchError(
                "forward decides by random numbers that it draws outside of the graph"
            )
        _adopt(self.model, graph, constants, "" if train else "evaluation_")
        for index in self.reference.written:
            _protect(graph, self.arguments.leaves[index])
        return graph

    def _finish(self, graph: fx.Graph) -> fx.GraphModule:
        module = graph_module(self.model, graph, type(self.model).__name__)
        verify_graph(module)
        unknown = [n for n in placeholders(self.arguments) if not _has_placeholder(graph, n)]
        if unknown:
            raise CaptureError(f"arguments lost ({', '.join(unknown)})")
        return module


def few(paths: Sequence[str]) -> str:
    """Join the first paths, and count the rest."""
    shown = ", ".join(path or "the model itself" for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _adopt(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, torch.Tensor], prefix: str
) -> None:
    """Give the model the tensors that the graph holds as constants, as buffers not saved.

    A constant that is there already is not taken twice.
    """
    if _CONSTANTS not in dict(model.named_children()):
        attach(model, _CONSTANTS, nn.Module())
    holder = model.get_submodule(_CONSTANTS)
    for node in graph.nodes:
        if node.op == "get_attr" and (value := constants.get(str(node.target))) is not None:
            leaf = str(node.target).replace(".", "_").lstrip("_")
            known = holder._buffers.get(leaf)
            if known is not None and not _equal(known, value):
                leaf = f"{prefix}{leaf}"
            holder.register_buffer(leaf, value, persistent=False)
            node.target = f"{_CONSTANTS}.{leaf}"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _protect(graph: fx.Graph, leaf: Leaf) -> None:
    """Let the graph write into a copy of an input, which others read at the same time."""
    node = next(n for n in graph.nodes if n.op == "placeholder" and n.target == leaf.argument)
    for key in leaf.path:
        node = next(user for user in node.users if user.args == (node, key))
    place = node
    while place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        own = graph.call_method("clone", (node,))
    node.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)


def _has_placeholder(graph: fx.Graph, name: str) -> bool:
    return any(node.op == "placeholder" and node.target == name for node in graph.nodes)


def explain(model: nn.Module, error: BaseException) -> str:
    """Say in one line what went wrong, in which module, on which line of the user's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MismatchError):
        return lines[0]
    message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if (place := locate(model, error)) is None:
        return message
    kind = type(model.get_submodule(place.path)).__name__
    return f"{message} in {place.path or kind} ({kind}) at {place.source}"


@dataclass(frozen=True)
class Place:
    """Where in a model an error came from.

    Attributes:
        path: Qualified name of the innermost module whose code was running.
        source: `file:line` of the user's code.
    """

    path: str
    source: str


def locate(model: nn.Module, error: BaseException) -> Place | None:
    """Find the innermost module whose forward an error came out of; None if it does not say."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        names_of = frame.f_code.co_varnames
        owner = frame.f_locals.get(names_of[0]) if names_of else None
        filename = frame.f_code.co_filename
        if id(owner) in names and is_user_code(filename):
            found = Place(names[id(owner)], f"{filename}:{line}")
    return found
