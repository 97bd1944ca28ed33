"""Capture a model as a `Program`: try front ends from the best to the last, validate each.

| rung | takes | result |
|---|---|---|
| torch.fx trace | models without control flow on tensors and shapes | real modules, fast |
| torch.export | nearly all | operators, folded back into modules |
| torch.export, operators entered | models with operators of libraries | what these compute |
| torch.export, functions kept whole | models with a custom backward | these are one call each |
| either, modules kept whole | models in which a few modules resist | these are one call each |
| either, one mode alone | models whose modes differ in structure | a graph of the current mode |

A graph counts only if it passes `equivalence.Reference`; the reason of every rejection goes into
the `CaptureReport` of the program, or into the error message if every rung fails.
"""

from __future__ import annotations

import functools
import keyword
import logging
import reprlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.capture.attempt import (
    MAX_TRIES,
    Attempt,
    FrontEnd,
    MismatchError,
    describe_error,
)
from passes.capture.equivalence import PADDING, Reference
from passes.capture.fx_trace import (
    called_functions,
    parametrizing_code,
    trace,
    wrapped_functions,
)
from passes.capture.library_operators import library_operators
from passes.capture.model_copy import ENCLOSED, Enclosing, copy_model, unwrap, without_wrappers
from passes.capture.model_notes import (
    join_few,
    name_hooks_and_overrides,
    notes_on_graph,
    notes_on_runs,
    translating,
)
from passes.capture.opaque_modules import OpaqueClass, find_unexportable, find_untraceable
from passes.capture.opaque_operator import calls_functions
from passes.capture.outside_state import outside_preserved
from passes.capture.torch_export import export
from passes.capture.uncapturable import find_uncapturable_line
from passes.errors import CaptureError, OptionError
from passes.ir.example_inputs import ExampleInputs, bind, constant_arguments
from passes.ir.isolation import LOCK, without_caches
from passes.ir.module_walk import named_buffers, named_parameters, named_submodules
from passes.ir.observer import Observations
from passes.ir.program import VALIDATIONS, CaptureReport, Program, Validation, graph_module

_log = logging.getLogger(__name__)

LADDER: tuple[tuple[str, FrontEnd], ...] = (
    # Keeps real modules at 0.3 ms a node; refuses control flow on tensors and shapes.
    ("torch.fx trace", trace),
    # Accepts nearly every model at about 10 ms a node; modules are folded back afterwards.
    ("torch.export", export),
)
"""Front ends that capture a whole model, with both modes in one graph."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Collection[str] = ("batch",),
    validate: Validation = "full",
) -> Program:
    """Capture a model as `capture_and_observe` does; return the program alone."""
    return capture_and_observe(model, args, kwargs, dynamic=dynamic, validate=validate)[0]


def capture_and_observe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Collection[str] = ("batch",),
    validate: Validation = "full",
) -> tuple[Program, Observations | None]:
    """Capture a model as a flat graph over real modules, and validate it against the model.

    The model is copied first and never changed. The graph of a front end is accepted if outputs,
    gradients and buffers equal those of the model on two inputs (the second with another batch size
    if the model allows it), in training and in evaluation mode. If no front end captures the whole
    model, the smallest modules that resist stay whole, as one call each. If that fails as well, the
    graph is that of the mode that the model is in, and a note says so.

    Args:
        model: The model.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic: Dimensions to keep free: "batch", dimension 0, if the model allows it, and
            "sequence", dimension 1 of the first input that has one, with all others of its length.
        validate: How much of the graph to compare with the model (`passes.ir.program.VALIDATIONS`).
            What the graph is made from, as the free batch size, is found out in any case.

    Returns:
        The program, and what the runs that validated it showed of its nodes.

    Raises:
        OptionError: `validate` is none of the three words, or `dynamic` names anything else.
        CaptureError: The inputs do not fit, the model itself fails on them, or no front end
            captured it; then the message names the module and the line that stood in the way.
    """
    if validate not in VALIDATIONS:
        raise OptionError(f"validate must be {', '.join(VALIDATIONS)} (got {validate!r})")
    with LOCK:
        inner = unwrap(model)
        _check_names(inner)
        notes = []
        if clashing := sorted(_names(model) & _RESERVED):
            model = Enclosing(model)
            notes = [
                f"torch.fx.GraphModule has a {clashing[0]!r} of its own: in the network "
                f"{clashing[0]!r} is {f'{ENCLOSED}.{clashing[0]}'!r}, as all names of the model "
                "are, but not in the state dict of the original"
            ]
        _check_layouts(inner, args, kwargs or {})
        inputs = bind(inner, args, kwargs or {}).with_dynamic(dynamic)
        with without_caches(inner) as caching, outside_preserved(inner) as outside:
            ladder = _Ladder(model, inputs, validate)
            ladder.notes += [*notes, *filter(None, [outside.note()])]
            if caching:
                ladder.notes.append(
                    "keys and values are not cached (config.use_cache = False): a cache is not a "
                    "tensor"
                )
            program, observed = ladder.run(), ladder.reference.observations
            return program, observed and replace(observed, args=program.args)


_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))
"""Attributes of a GraphModule that its root cannot have as a layer or a weight, such as `code`."""


def _names(owner: nn.Module) -> set[str]:
    return {*owner._modules, *owner._parameters, *owner._buffers}


def _check_names(model: nn.Module) -> None:
    """Refuse names that the code of a graph cannot spell."""
    for path, owner in named_submodules(model):
        for name in _names(owner):
            if keyword.iskeyword(name):
                raise CaptureError(
                    f"{name!r} in {path or type(model).__name__} is a keyword of Python, which the "
                    "code of a graph cannot have as a name: give it another name"
                )


def _check_layouts(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse sparse and nested tensors of the model and inputs by name; not sparse gradients."""
    named = [(f"buffer {name!r}", buffer) for name, buffer in named_buffers(model)]
    named += [(f"parameter {name!r}", parameter) for name, parameter in named_parameters(model)]
    for path, leaf in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]:
        if isinstance(leaf, torch.Tensor):
            named.append((f"example input {pytree.keystr(path[1:])}", leaf))
    for name, tensor in named:
        if tensor.is_nested:
            raise CaptureError(
                f"{name} of {type(model).__name__} is nested, rows of several lengths, which no "
                f"graph holds: {PADDING}"
            )
        if tensor.layout is not torch.strided and not tensor.is_mkldnn:
            raise CaptureError(
                f"{name} of {type(model).__name__} is sparse ({tensor.layout}), which states, "
                "artifacts and ONNX graphs cannot hold: use its .to_dense(), or take indices and "
                "values as inputs of their own"
            )


class _Ladder:
    """Try the rungs in order, and record why each was rejected."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs, validate: Validation) -> None:
        self.model, self.validate = model, validate
        self.name = type(unwrap(model)).__name__
        self.inputs = inputs
        self.reference = self._make_reference()
        self.rejected: list[str] = []
        self._unused_copy: nn.Module | None = copy_model(model)
        self.notes = notes_on_runs(model, self._unused_copy, inputs)

    def _make_reference(self) -> Reference:
        reference = Reference(without_wrappers(self.model), self.inputs, validate=self.validate)
        if self.inputs.sequence is not None:
            try:
                reference.add_length()
            except Exception as error:
                reason = describe_error(unwrap(self.model), error)
                raise CaptureError(f"{self._fixed_length()}: {reason}") from error
        return reference

    def _fixed_length(self) -> str:
        first = next(leaf for leaf in self.inputs.leaves if leaf.value.dim() > 1)
        return (
            f"dimension 1 of {first.argument!r}, the sequence, is fixed at {self.inputs.sequence} "
            f"in {self.name} (leave 'sequence' out of dynamic, or mend the model)"
        )

    def run(self) -> Program:
        wrapped = None
        for rung, front_end in LADDER:
            if self._loses_gradients(rung):
                continue
            program = self._try(rung, front_end, Attempt.run)
            if program is None:
                continue
            names = [f"{name} (torch.fx.wrap)" for name in wrapped_functions(program.graph)]
            names += library_operators(program.graph)
            names += parametrizing_code(program.module)
            if not names:
                return program
            wrapped = wrapped or program  # unless an export sees what they do
            self._reject(rung, f"{join_few(names)} is one call that no artifact can store")
        if program := self._enter_operators(wrapped):
            return program
        if wrapped:
            return wrapped
        if self.inputs.sequence is not None:  # what keeps modules whole fixes their shapes
            reasons = "".join(f"\n  {line}" for line in self.rejected)
            raise CaptureError(f"{self._fixed_length()}:{reasons}")
        if program := self._keep_functions_whole():
            return program
        if program := self._keep_modules_whole():
            return program
        if program := self._capture_one_mode():
            return program
        copied, train = copy_model(self.model), self.model.training
        if obstacle := find_uncapturable_line(copied, self.inputs, train=train):
            raise CaptureError(
                f"{self.name} cannot be captured as a graph: {obstacle}; {self._advice()}"
            )
        other = find_uncapturable_line(copied, self.inputs, train=not train)
        attempts = "".join(f"\n  {line}" for line in (*self.rejected, other) if line)
        raise CaptureError(
            f"{self.name} cannot be captured as a graph:{attempts}\n{self._advice()}"
        )

    def _capture_one_mode(self) -> Program | None:
        """Capture the model in its current mode alone."""
        modes = ("evaluation", "training")
        mode, other = modes[self.model.training], modes[not self.model.training]
        note = (
            f"captured for {mode} mode alone, which the model is in: {other} mode, which the "
            f"network refuses, has another graph ({self.rejected[0]})"
        )

        def attempt_one_mode(attempt: Attempt) -> tuple[fx.GraphModule, list[str]]:
            return attempt.run_in_one_mode(), [note]

        self.reference.differentiate(train=self.model.training)
        programs = (
            self._try(f"{rung}, {mode} mode alone", front_end, attempt_one_mode)
            for rung, front_end in LADDER
        )
        return next(filter(None, programs), None)

    def _advice(self) -> str:
        """Tell what the user can do, after every rung was rejected."""
        reasons = "".join(f"{note}\n" for note in self.notes) + name_hooks_and_overrides(self.model)
        if self.model.training:
            evaluating = copy_model(self.model)
            evaluating.eval()
            ladder = _Ladder(evaluating, self.reference.inputs, self.validate)
            ladder.rejected.append("")
            if ladder._capture_one_mode():
                advice = "it can be captured for evaluation mode alone: call model.eval() first"
                return f"{reasons}{advice}"
        advice = "compile the submodule around that line, or move the control flow out of forward"
        return f"{reasons}{advice}"

    def _try(
        self,
        rung: str,
        front_end: FrontEnd,
        execute: Callable[[Attempt], tuple[fx.GraphModule, list[str]]],
    ) -> Program | None:
        """Run one attempt; return its program, or None after its rejection was recorded."""
        for tries_left in reversed(range(MAX_TRIES)):
            # A front end that fails may leave changes in its copy.
            unused, self._unused_copy = self._unused_copy, None
            model = copy_model(self.model) if unused is None else unused
            attempt = Attempt(model, self.model, front_end, self.reference)
            try:
                module, notes = execute(attempt)
                break
            except Exception as error:
                _log.debug("%s failed", rung, exc_info=True)
                # The random generator is shared: another thread may have drawn between two runs.
                shared = self.reference.random and threading.active_count() > 1
                if tries_left and shared and isinstance(error, MismatchError):
                    self.reference = self._make_reference()
                    continue
                self._reject(rung, describe_error(model, error))
                return None
        return self._make_program(rung, model, _without_dead_reads(module), notes)

    def _make_program(
        self, rung: str, model: nn.Module, module: fx.GraphModule, notes: list[str]
    ) -> Program:
        notes = [*self.reference.notes, *_notes_on_constants(self.inputs), *notes]
        notes += [*self.notes, *notes_on_graph(model, module)]
        # A trace reads sizes where forward does.
        fixed = self.inputs.sequence is None
        if rung.startswith("torch.export") and self.validate == "full" and fixed:
            notes += self.reference.notes_on_sizes(module)
        notes += [
            f"{function} (torch.autograd.Function) is one call that no artifact can store"
            for function in called_functions(module.graph)
        ]
        if written := sorted({self.inputs.leaves[i].argument for i in self.reference.written}):
            notes.append(
                f"forward writes into {join_few(written)}, which it is given: the network writes "
                "into a copy, and leaves its inputs as they are"
            )
        train = rung.endswith("training mode alone")
        types, unknown = self.reference.output_types(train=train)
        notes += [f"the output, a {name}, becomes a dict of its fields" for name in unknown]
        names = {t.name for t in types if not hasattr(torch.return_types, t.name)}
        if classes := sorted(names - {"OrderedDict"}):
            notes.append(
                f"the output holds {join_few(classes)}, which a network that is loaded without the "
                "model returns as dicts, lists and tuples"
            )
        return Program(
            module=module,
            args=self.inputs.tensor_arguments(),
            dynamic=self.reference.inputs.dynamic,
            capture=CaptureReport(
                rung,
                tuple(self.rejected),
                tuple(notes),
                self.validate,
                self.reference.runs,
                self.reference.seconds,
            ),
            name=self.name,
            unused=_unused(model, module),
            fixed=constant_arguments(self.model, self.inputs),
            model=model,
            output_types=types,
        )

    def _reject(self, rung: str, reason: str) -> None:
        """Record why a rung was rejected, unless another was rejected for the same reason."""
        if not any(line.endswith(reason) for line in self.rejected):
            self.rejected.append(f"{rung}: {reason}")

    def _enter_operators(self, wrapped: Program | None) -> Program | None:
        """Export what operators of libraries compute, if an earlier rung kept them whole."""
        if wrapped is None or not library_operators(wrapped.graph):
            return None
        entering = functools.partial(export, enter=True)
        return self._try("torch.export, operators entered", entering, Attempt.run)

    def _loses_gradients(self, rung: str) -> bool:
        """Reject an export of custom autograd functions where no gradients are compared."""
        if rung != "torch.export" or self.validate == "full":
            return False
        lost = calls_functions(copy_model(self.model), self.inputs)
        if lost:
            self._reject(rung, "an export drops the backward of a torch.autograd.Function")
        return lost

    def _keep_functions_whole(self) -> Program | None:
        """Keep custom autograd functions whole in an export, whose backward it drops."""
        if not calls_functions(copy_model(self.model), self.inputs):
            return None
        keeping = functools.partial(export, functions=True)
        return self._try("torch.export, functions kept whole", keeping, Attempt.run)

    def _keep_modules_whole(self) -> Program | None:
        """Keep the modules that resist whole: first for a trace, then for an export."""
        rows = (
            ("torch.fx trace", trace, find_untraceable),
            ("torch.export", export, find_unexportable),
        )
        for name, front_end, find in rows:
            rung = f"{name}, modules kept whole"
            try:
                classes = find(self.model, self.reference.inputs)
            except CaptureError as error:
                self._reject(rung, str(error))
                continue
            keeping = functools.partial(
                front_end, opaque=[opaque.module_type for opaque in classes]
            )
            execute = functools.partial(_run_with_notes, classes)
            if program := self._try(rung, keeping, execute):
                return program
        return None


def _run_with_notes(
    classes: tuple[OpaqueClass, ...], attempt: Attempt
) -> tuple[fx.GraphModule, list[str]]:
    module, notes = attempt.run()
    return module, [
        *notes,
        *(
            f"{opaque.label} is kept whole, as one call that no artifact can store: {opaque.reason}"
            for opaque in classes
        ),
    ]


def _unused(model: nn.Module, module: fx.GraphModule) -> dict[str, Any]:
    """Return the entries of a model's state dict that its graph does not read.

    They are tensors by qualified name alone where code of the model translates its state dict.
    """
    used = module.state_dict().keys()
    if not translating(model):
        return {key: value for key, value in model.state_dict().items() if key not in used}
    return {
        f"{path}.{name}".lstrip("."): tensor.detach()
        for path, owner in named_submodules(model, repeats=True)
        for name, tensor in {**owner._parameters, **owner._buffers}.items()
        if tensor is not None
        and name not in owner._non_persistent_buffers_set
        and f"{path}.{name}".lstrip(".") not in used
    }


def _notes_on_constants(inputs: ExampleInputs) -> list[str]:
    return [
        f"argument {name!r} is fixed at {reprlib.repr(value)} and no longer taken"
        for name, value in inputs.constants().items()
    ]


def _without_dead_reads(module: fx.GraphModule) -> fx.GraphModule:
    """Remove reads of parameters and buffers that no node uses: no stage would hold them."""
    dead = [node for node in module.graph.nodes if node.op == "get_attr" and not node.users]
    if not dead:
        return module
    for node in dead:
        module.graph.erase_node(node)
    return graph_module(module, module.graph, type(module).__name__)
