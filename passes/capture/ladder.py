"""Capture a model as a `Program`: front ends from the best to the last, each validated."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from passes.capture.attempt import TRIES, Attempt, FrontEnd, MismatchError, copied, explain
from passes.capture.equivalence import Reference
from passes.capture.fx_trace import trace
from passes.capture.opaque_modules import Whole, find_sealed, find_whole
from passes.capture.torch_export import export
from passes.errors import CaptureError
from passes.ir.example_inputs import Arguments, bind
from passes.ir.isolation import LOCK
from passes.ir.program import CaptureReport, Program, graph_module

__all__ = ["capture"]

_log = logging.getLogger(__name__)


_Traced = tuple[fx.Graph, Mapping[str, torch.Tensor]]


def _trace(model: nn.Module, arguments: Arguments, dynamic: bool) -> _Traced:
    return trace(model, arguments)


def _export(model: nn.Module, arguments: Arguments, dynamic: bool) -> _Traced:
    return export(model, arguments, dynamic_batch=dynamic)


def _trace_around(
    model: nn.Module, arguments: Arguments, dynamic: bool, whole: list[type[nn.Module]]
) -> _Traced:
    return trace(model, arguments, whole=whole)


def _export_around(
    model: nn.Module, arguments: Arguments, dynamic: bool, whole: list[type[nn.Module]]
) -> _Traced:
    return export(model, arguments, dynamic_batch=dynamic, whole=whole)


LADDER: tuple[tuple[str, FrontEnd], ...] = (
    # Keeps real modules and costs 0.3 ms a node; refuses control flow on tensors and shapes.
    ("torch.fx trace", _trace),
    # Takes nearly everything at some 10 ms a node; modules are folded back afterwards.
    ("torch.export", _export),
)
"""The front ends that take a whole model, both modes in one graph."""

_DICTS = (dict, OrderedDict)
_WHOLE = "modules kept whole"


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
    model allows it), in training and in evaluation mode. Where none takes the whole model, the
    smallest modules that stand in the way are kept whole, each one call in the graph; where that
    does not do either, the graph is that of the mode that the model is in, and a note says so.

    Args:
        model: The model.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic_batch: Whether to keep the batch size (dimension 0) free where the model allows.

    Raises:
        CaptureError: The inputs do not fit, the model itself fails on them, or no front end
            captured it; then the message names the module and the line that stood in the way.
    """
    with LOCK:
        return _Climb(model, bind(model, args, kwargs or {}), dynamic_batch).run()


class _Climb:
    """Climbs down the ladder, and remembers why each rung was left."""

    def __init__(self, model: nn.Module, arguments: Arguments, dynamic_batch: bool) -> None:
        self.model = model
        self.arguments = arguments
        self.dynamic_batch = dynamic_batch
        self.reference = self._refer()
        self.rejected: list[str] = []

    def _refer(self) -> Reference:
        return Reference(copied(self.model), self.arguments, dynamic_batch=self.dynamic_batch)

    def run(self) -> Program:
        for rung, front_end in LADDER:
            if found := self._try(rung, front_end, Attempt.run):
                return found
        if found := self._keep_whole():
            return found
        if found := self._in_one_mode():
            return found
        attempts = "".join(f"\n  {line}" for line in self.rejected)
        name = type(self.model).__name__
        raise CaptureError(f"{name} cannot be captured as a graph:{attempts}\n{self._way_out()}")

    def _in_one_mode(self) -> Program | None:
        """Capture what the model does in the mode that it is in, and say so."""
        modes = ("evaluation", "training")
        own, other = modes[self.model.training], modes[not self.model.training]
        note = (
            f"captured for {own} mode alone, which the model is in: {other} mode has another graph "
            f"({self.rejected[0]})"
        )

        def work(attempt: Attempt) -> tuple[fx.GraphModule, list[str]]:
            return attempt.run_in_one_mode(), [note]

        self.reference.differentiate(copied(self.model), train=self.model.training)
        tries = (self._try(f"{rung}, {own} mode alone", end, work) for rung, end in LADDER)
        return next(filter(None, tries), None)

    def _way_out(self) -> str:
        if self.model.training:
            climb = _Climb(copied(self.model).eval(), self.arguments, self.reference.dynamic_batch)
            climb.rejected.append("")
            if climb._in_one_mode():
                return "it can be captured for evaluation mode alone: call model.eval() first"
        return "compile the submodule around that line, or move the control flow out of forward"

    def _try(
        self,
        rung: str,
        front_end: FrontEnd,
        work: Callable[[Attempt], tuple[fx.GraphModule, list[str]]],
    ) -> Program | None:
        for again in reversed(range(TRIES)):
            own = copied(self.model)  # a front end that fails may leave its traces in the model
            attempt = Attempt(own, self.model, self.arguments, front_end, self.reference)
            try:
                module, notes = work(attempt)
                break
            except Exception as error:
                _log.debug("%s failed", rung, exc_info=True)
                shared = self.reference.random and threading.active_count() > 1
                if again and shared and isinstance(error, MismatchError):
                    self.reference = self._refer()  # another thread may have drawn numbers too
                    continue
                self._reject(rung, explain(own, error))
                return None
        module = _without_dead_reads(module)
        used = module.state_dict().keys()
        unused = {key: value for key, value in own.state_dict().items() if key not in used}
        notes = [*self.reference.notes, *_fixed(self.arguments), *notes]
        kind = self.reference.output_kind
        if isinstance(module.graph.output_node().args[0], dict) and kind not in _DICTS:
            notes.append(f"the output, a {kind.__name__}, is given as a dict of its fields")
        return Program(
            module=module,
            args=self.arguments.tensor_arguments(),
            dynamic_batch=self.reference.dynamic_batch,
            capture=CaptureReport(rung, tuple(self.rejected), tuple(notes)),
            name=type(self.model).__name__,
            unused=unused,
            fixed=self.arguments.fixed_arguments(),
        )

    def _reject(self, rung: str, reason: str) -> None:
        """Remember why a rung was left, unless another was left for the same reason."""
        if not any(line.endswith(reason) for line in self.rejected):
            self.rejected.append(f"{rung}: {reason}")

    def _keep_whole(self) -> Program | None:
        """Keep what stands in the way whole: for a trace, and then for an export."""
        for rung, find, enter in (
            (f"{LADDER[0][0]}, {_WHOLE}", self._find_whole, _trace_around),
            (f"{LADDER[1][0]}, {_WHOLE}", self._find_sealed, _export_around),
        ):
            try:
                whole = find()
            except CaptureError as error:
                self._reject(rung, str(error))
                continue
            front_end = functools.partial(enter, whole=[one.kind for one in whole])
            if found := self._try(rung, front_end, functools.partial(_with_notes, whole)):
                return found
        return None

    def _find_whole(self) -> tuple[Whole, ...]:
        return find_whole(self.model, self.arguments)

    def _find_sealed(self) -> tuple[Whole, ...]:
        dynamic = self.reference.dynamic_batch
        return find_sealed(self.model, self.arguments, dynamic_batch=dynamic)


def _with_notes(whole: tuple[Whole, ...], attempt: Attempt) -> tuple[fx.GraphModule, list[str]]:
    module, notes = attempt.run()
    return module, [*notes, *map(_told, whole)]


def _told(whole: Whole) -> str:
    return f"{whole.label} is kept whole, as one call that no artifact can store: {whole.reason}"


def _fixed(arguments: Arguments) -> list[str]:
    return [
        f"argument {name!r} is fixed at {value!r} and no longer taken"
        for name, value in arguments.constants().items()
    ]


def _without_dead_reads(module: fx.GraphModule) -> fx.GraphModule:
    """Leave out parameters and buffers that no node uses: no stage would hold them."""
    dead = [node for node in module.graph.nodes if node.op == "get_attr" and not node.users]
    if not dead:
        return module
    for node in dead:
        module.graph.erase_node(node)
    return graph_module(module, module.graph, type(module).__name__)
