"""Find the smallest modules that no front end can enter: they stay whole, one call each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.capture.attempt import Attempt, copied, explain, few, locate
from passes.capture.equivalence import Reference
from passes.capture.fx_trace import is_leaf, trace
from passes.capture.torch_export import export
from passes.errors import CaptureError
from passes.ir.example_inputs import Arguments, bind
from passes.ir.isolation import masks_kept, preserved

__all__ = ["Whole", "find_sealed", "find_whole"]

_LARGEST = 0.5
"""Share of the parameters in one module above which keeping it whole leaves too little to cut."""

_MOST = 4
"""Classes of modules that stay whole in an exported graph at most: every one is another export."""

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Whole:
    """A class of modules that stay whole.

    Attributes:
        kind: The class.
        paths: Qualified names of the modules of it.
        reason: What stands in the way of a trace, with the line.
    """

    kind: type[nn.Module]
    paths: tuple[str, ...]
    reason: str

    @property
    def label(self) -> str:
        """The modules and their class, for messages."""
        return f"{few(self.paths)} ({self.kind.__name__})"


def find_whole(model: nn.Module, arguments: Arguments) -> tuple[Whole, ...]:
    """Find the modules that must stay whole, the innermost first.

    One module of every class is captured alone, on what it is called with in the model, from the
    inside to the outside; a class that fails although its failing parts are kept whole is one.

    Raises:
        CaptureError: No submodule alone stands in the way, or one holds most of the parameters.
    """
    calls = _recorded(model, arguments)
    found: dict[type[nn.Module], Whole] = {}
    tried: set[type[nn.Module]] = set()
    for path, module in _inside_out(model):
        kind = type(module)
        if kind in tried or path not in calls or is_leaf(module):
            continue
        tried.add(kind)
        if reason := _obstacle(module, calls[path], tuple(found)):
            paths = tuple(p for p, m in model.named_modules() if type(m) is kind)
            found[kind] = Whole(kind, paths, reason)
    if not found:
        raise CaptureError("no submodule alone stands in the way")
    return _small_enough(model, tuple(found.values()))


def find_sealed(
    model: nn.Module, arguments: Arguments, *, dynamic_batch: bool
) -> tuple[Whole, ...]:
    """Find the modules that torch.export must not look into.

    The model is exported in both modes; where that stops, the innermost module whose code was
    running stays whole from then on, with the others of its class, until it goes through.

    Args:
        model: The model.
        arguments: Its example inputs.
        dynamic_batch: Whether to leave the batch size free.

    Raises:
        CaptureError: The model's own forward stands in the way, or too much would stay whole.
    """
    found: dict[type[nn.Module], Whole] = {}
    while True:
        own = copied(model)
        try:
            with preserved(own), masks_kept():
                for train in (True, False):
                    export(own.train(train), arguments, dynamic_batch=dynamic_batch, whole=found)
        except Exception as error:
            place = locate(own, error)
            reason = explain(own, error)
            if not found and (place is None or not place.path):
                raise CaptureError("no submodule alone stands in the way") from error
            if place is None or not place.path or len(found) == _MOST:
                raise CaptureError(reason) from error
            kind = type(own.get_submodule(place.path))
            paths = tuple(p for p, m in model.named_modules() if type(m) is kind)
            if kind in found:
                raise CaptureError(reason) from error
            inside = tuple(f"{path}." for path in paths)
            found = {
                k: w for k, w in found.items() if not all(p.startswith(inside) for p in w.paths)
            }
            found[kind] = Whole(kind, paths, reason)
            continue
        if not found:
            raise CaptureError("no submodule alone stands in the way")
        return _small_enough(model, tuple(found.values()))


def _small_enough(model: nn.Module, found: tuple[Whole, ...]) -> tuple[Whole, ...]:
    """Give them back, if enough is left to cut."""
    for one in found:
        sizes = [_size(model.get_submodule(path)) for path in one.paths]
        share = max(sizes) / max(_size(model), 1)
        if share > _LARGEST:
            raise CaptureError(
                f"one module with {share:.0%} of the parameters would stay whole, "
                f"{one.label}: {one.reason}"
            )
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _inside_out(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The submodules, each behind its own."""
    named = [(path, module) for path, module in model.named_modules() if path]
    return sorted(named, key=lambda pair: -pair[0].count("."))


def _recorded(model: nn.Module, arguments: Arguments) -> Mapping[str, _Call]:
    """What every submodule is called with first, in training mode if the model runs in it."""
    own = copied(model)
    calls: dict[str, _Call] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(path, pytree.tree_map(_kept, (args, kwargs)))

        return hook

    for path, module in own.named_modules():
        module.register_forward_pre_hook(record(path), with_kwargs=True)
    for train in (True, False):
        args, kwargs = pytree.tree_map(_kept, (tuple(arguments.args), dict(arguments.kwargs)))
        own.train(train)
        try:
            with preserved(own), torch.no_grad():
                own(*args, **kwargs)
        except Exception:
            continue
    return calls


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _obstacle(module: nn.Module, call: _Call, whole: tuple[type[nn.Module], ...]) -> str:
    """Why a module cannot be traced alone; "" if it can, or does not run alone."""

    def front_end(
        model: nn.Module, arguments: Arguments, dynamic: bool
    ) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
        return trace(model, arguments, whole=whole)

    own = copied(module)
    try:
        arguments = bind(module, *call)
        reference = Reference(copied(module), arguments, dynamic_batch=True)
    except CaptureError:
        return ""
    try:
        Attempt(own, module, arguments, front_end, reference).run()
    except Exception as error:
        return explain(own, error)
    return ""
