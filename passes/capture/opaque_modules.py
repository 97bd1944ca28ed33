"""Find the smallest modules that no front end can enter: they stay whole, as one call each.

Example: in `Sequential(body, Around(linear, Gate()), body)` a `Gate` branches on a value of its
input, so no front end captures the model. `find_untraceable` captures one module of every class by
itself, from the inside out: `Gate` fails and is opaque; `Around` passes once `Gate` is one call,
and is traced as usual. `find_unexportable` exports the whole model and makes the class of the
module that raised opaque, until the export passes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.capture.attempt import Attempt, describe_error, locate_error
from passes.capture.equivalence import Reference
from passes.capture.fx_trace import is_leaf, trace
from passes.capture.model_copy import copy_model
from passes.capture.model_notes import join_few
from passes.capture.torch_export import export
from passes.errors import CaptureError
from passes.ir.example_inputs import ExampleInputs, bind
from passes.ir.isolation import preserved, with_plain_transformers
from passes.ir.module_walk import num_parameters

_MAX_SHARE = 0.5
"""Largest share of the parameters in one opaque module: with more, too little is left to cut."""

_MAX_CLASSES = 4
"""Most opaque classes in an exported graph: each of them costs another export."""

_ModuleCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module call."""


@dataclass(frozen=True)
class OpaqueClass:
    """A class of modules that stay whole.

    Attributes:
        module_type: The class.
        paths: Qualified names of its modules in the model.
        reason: Why a front end cannot enter it, with the line.
    """

    module_type: type[nn.Module]
    paths: tuple[str, ...]
    reason: str

    @property
    def label(self) -> str:
        """Modules and class, for messages."""
        return f"{join_few(self.paths)} ({self.module_type.__name__})"


def find_untraceable(model: nn.Module, inputs: ExampleInputs) -> tuple[OpaqueClass, ...]:
    """Find the classes of modules that a symbolic trace must keep whole, the innermost first.

    One module of every class is captured by itself, on the arguments that it gets in the model,
    from the inside out. A class is opaque if it fails although its opaque parts are kept whole.

    Raises:
        CaptureError: No submodule fails by itself, or one holds most of the parameters.
    """
    calls = _record_calls(model, inputs)
    opaque: dict[type[nn.Module], OpaqueClass] = {}
    tried: set[type[nn.Module]] = set()
    for path, module in _inside_out(model):
        module_type = type(module)
        if module_type in tried or path not in calls or is_leaf(module):
            continue
        tried.add(module_type)
        if reason := _try_tracing(module, calls[path], tuple(opaque)):
            paths = _paths_of(model, module_type)
            opaque[module_type] = OpaqueClass(module_type, paths, reason)
    return _check_sizes(model, tuple(opaque.values()))


def find_unexportable(model: nn.Module, inputs: ExampleInputs) -> tuple[OpaqueClass, ...]:
    """Find the classes of modules that torch.export must not enter.

    The model is exported in both modes. When that fails, the class of the innermost module whose
    code was running becomes opaque, and the export starts again.

    Args:
        model: The model.
        inputs: Its example inputs.

    Raises:
        CaptureError: The model's own forward fails, or too much would stay whole.
    """
    opaque: dict[type[nn.Module], OpaqueClass] = {}
    while True:
        candidate = copy_model(model)
        try:
            with preserved(candidate), with_plain_transformers():
                for train in (True, False):
                    candidate.train(train)  # an override may return nothing
                    export(candidate, inputs, opaque=opaque)
        except Exception as error:
            opaque = _with_failing_class(model, candidate, opaque, error)
        else:
            return _check_sizes(model, tuple(opaque.values()))


def _with_failing_class(
    model: nn.Module,
    candidate: nn.Module,
    opaque: Mapping[type[nn.Module], OpaqueClass],
    error: Exception,
) -> dict[type[nn.Module], OpaqueClass]:
    """Add the class whose code raised an error, in place of the opaque classes inside it."""
    location = locate_error(candidate, error)
    reason = describe_error(candidate, error)
    if location is None or not location.path:
        message = reason if opaque else "no submodule alone stands in the way"
        raise CaptureError(message) from error
    module_type = type(candidate.get_submodule(location.path))
    if module_type in opaque or len(opaque) == _MAX_CLASSES:
        raise CaptureError(reason) from error
    paths = _paths_of(model, module_type)
    prefixes = tuple(f"{path}." for path in paths)
    outside = {
        other: record
        for other, record in opaque.items()
        if not all(path.startswith(prefixes) for path in record.paths)
    }
    return {**outside, module_type: OpaqueClass(module_type, paths, reason)}


def _paths_of(model: nn.Module, module_type: type[nn.Module]) -> tuple[str, ...]:
    return tuple(path for path, module in model.named_modules() if type(module) is module_type)


def _check_sizes(model: nn.Module, classes: tuple[OpaqueClass, ...]) -> tuple[OpaqueClass, ...]:
    """Return the classes if there are any, and enough of the model is left to cut.

    Raises:
        CaptureError: There are none, or one module holds most of the parameters.
    """
    if not classes:
        raise CaptureError("no submodule alone stands in the way")
    for opaque in classes:
        sizes = [num_parameters(model.get_submodule(path)) for path in opaque.paths]
        share = max(sizes) / max(num_parameters(model), 1)
        if share > _MAX_SHARE:
            raise CaptureError(
                f"one module with {share:.0%} of the parameters would stay whole, "
                f"{opaque.label}: {opaque.reason}"
            )
    return classes


def _inside_out(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the submodules with their paths, each one after its own submodules."""
    named = [(path, module) for path, module in model.named_modules() if path]
    return sorted(named, key=lambda pair: -pair[0].count("."))


def _record_calls(model: nn.Module, inputs: ExampleInputs) -> Mapping[str, _ModuleCall]:
    """Record the first call of every submodule, in training mode if the model runs in it."""
    recorder = copy_model(model)
    calls: dict[str, _ModuleCall] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(path, pytree.tree_map(_copy_value, (args, kwargs)))

        return hook

    for path, module in recorder.named_modules():
        module.register_forward_pre_hook(record(path), with_kwargs=True)
    for train in (True, False):
        args, kwargs = pytree.tree_map(_copy_value, (tuple(inputs.args), dict(inputs.kwargs)))
        recorder.train(train)
        try:
            with preserved(recorder), torch.no_grad():
                recorder(*args, **kwargs)
        except Exception:
            continue
    return calls


def _copy_value(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _try_tracing(module: nn.Module, call: _ModuleCall, opaque: tuple[type[nn.Module], ...]) -> str:
    """Return why a module cannot be traced by itself; "" if it can, or does not run by itself."""
    candidate = copy_model(module)
    try:
        inputs = bind(module, *call)
        reference = Reference(module, inputs)
    except Exception:  # a call on what no graph takes, as nested tensors
        return ""
    try:
        Attempt(candidate, module, partial(trace, opaque=opaque), reference).run()
    except Exception as error:
        return describe_error(candidate, error)
    return ""
