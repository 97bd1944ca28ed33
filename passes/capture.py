"""Capture a model as a `Program`: front ends from the best to the last, each validated."""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.arguments import Arguments, Leaf, bind, placeholders
from passes.errors import CaptureError
from passes.exporting import export
from passes.modes import merge_modes
from passes.program import CaptureReport, Program, graph_module, is_user_code, verify_graph
from passes.restore import attach, toggle
from passes.tracing import trace
from passes.validate import Reference, preserved

__all__ = ["capture", "explain"]

_log = logging.getLogger(__name__)
_Rung = Callable[[nn.Module, Arguments, bool], tuple[fx.Graph, Mapping[str, torch.Tensor]]]

_CONSTANTS = "traced_constants"

LADDER: tuple[tuple[str, _Rung], ...] = (
    # Keeps real modules and costs 0.3 ms a node; refuses control flow on tensors and shapes.
    ("torch.fx trace", lambda model, arguments, dynamic: trace(model, arguments)),
    # Takes nearly everything at some 10 ms a node; modules are folded back afterwards.
    (
        "torch.export",
        lambda model, arguments, dynamic: export(model, arguments, dynamic_batch=dynamic),
    ),
)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
) -> Program:
    """Capture a model as a flat graph over real modules, and validate it against the model.

    The model is copied first and never changed. A front end is believed when outputs, gradients
    and buffers equal the model's on two inputs (the second with another batch size where the
    model allows it), in training and in evaluation mode.

    Args:
        model: The model.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic_batch: Whether to keep the batch size (dimension 0) free where the model allows.

    Raises:
        CaptureError: The inputs do not fit, the model itself fails on them, or no front end
            captured it; then the message names the module and the line that stood in the way.
    """
    arguments = bind(model, args, kwargs or {})
    reference = Reference(_copy(model), arguments, dynamic_batch=dynamic_batch)
    rejected: list[str] = []
    for rung, front_end in LADDER:
        own = _copy(model)  # a front end that fails may leave its traces in the model
        try:
            module, notes = _Attempt(own, model, arguments, front_end, reference).run()
        except Exception as error:
            _log.debug("%s failed", rung, exc_info=True)
            rejected.append(f"{rung}: {explain(own, error)}")
            continue
        used = module.state_dict().keys()
        unused = {key: value for key, value in own.state_dict().items() if key not in used}
        return Program(
            module=module,
            args=arguments.tensor_arguments(),
            dynamic_batch=reference.dynamic_batch,
            capture=CaptureReport(
                rung, tuple(rejected), (*reference.notes, *_fixed(arguments), *notes)
            ),
            name=type(model).__name__,
            unused=unused,
        )
    attempts = "".join(f"\n  {line}" for line in rejected)
    raise CaptureError(
        f"{type(model).__name__} cannot be captured as a graph:{attempts}\n"
        "compile the submodule around that line instead, or move the control flow out of forward"
    )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be copied: {error}") from error


class _MismatchError(Exception):
    """The graph of a front end is not the model."""


@dataclass(frozen=True)
class _Attempt:
    """One front end at work on a model of its own."""

    model: nn.Module
    original: nn.Module
    arguments: Arguments
    front_end: _Rung
    reference: Reference

    def run(self) -> tuple[fx.GraphModule, list[str]]:
        """Return the graph that equals the model, with what there is to say of it.

        The graph is made in training mode, where everything random is in it, and merged with that
        of evaluation mode where flags alone do not make it follow the mode.
        """
        graph = self._trace(train=True)
        toggle(self.model, graph)
        module = self._finish(graph)
        if reason := self.reference.mismatch(module, modes=(True,)):
            raise _MismatchError(reason)
        reason = self.reference.mismatch(module, modes=(False,))
        if not reason:
            return module, []
        try:
            paths = merge_modes(self.model, graph, self._trace(train=False))
        except Exception as error:
            raise _MismatchError(f"{reason}; {error}") from error
        module = self._finish(graph)
        if reason := self.reference.mismatch(module):
            raise _MismatchError(reason)
        return module, [
            f"forward has a branch on self.training in {_few(paths)}: both branches are kept, and "
            "the mode chooses"
        ]

    def _trace(self, *, train: bool) -> fx.Graph:
        pristine = self.model if train else _copy(self.original)
        with preserved(pristine):
            pristine.train(train)
            graph, constants = self.front_end(
                pristine, self.arguments, self.reference.dynamic_batch
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


def _few(paths: Sequence[str]) -> str:
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


def _fixed(arguments: Arguments) -> list[str]:
    return [
        f"argument {name!r} is fixed at {value!r} and no longer taken"
        for name, value in arguments.constants().items()
    ]


def explain(model: nn.Module, error: BaseException) -> str:
    """Say in one line what went wrong, in which module, on which line of the user's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, _MismatchError):
        return lines[0]
    message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    names = {id(module): name for name, module in model.named_modules()}
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        filename = frame.f_code.co_filename
        if id(owner) in names and is_user_code(filename):
            path = names[id(owner)] or type(model).__name__
            where = f" in {path} ({type(owner).__name__}) at {filename}:{line}"
    return f"{message}{where}"
