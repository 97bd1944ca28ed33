"""Validation of a captured graph against the model: outputs, gradients, buffers, both modes.

A front end is believed only after this. Every run starts from the same random state and leaves
the parameters, buffers and modes of the model as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.arguments import Arguments, as_plain
from passes.errors import CaptureError
from passes.isolation import masks_kept, preserved, repeatable

__all__ = [
    "TOLERANCE",
    "Reference",
    "Run",
    "compare",
    "difference",
    "output_leaves",
    "relative_error",
    "run",
]

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 2e-2,
}
"""Largest difference over the largest magnitude that still counts as equal, by dtype."""

Forward = Callable[[Arguments], Any]


@dataclass(frozen=True)
class Run:
    """What one forward pass gave, and in training mode one backward pass too.

    Attributes:
        outputs: The leaves of the output.
        gradients: Gradients of parameters and inputs, by name; None where there is none.
        changed: The buffers that the step changed.
        written: Numbers of the input tensors that the step wrote into.
        kind: Class of the whole output.
        names: All names of each parameter, by the first of them.
        through: Whether gradients were asked for through the inputs too.
        random: Whether random numbers were drawn.
    """

    outputs: list[Any]
    gradients: Mapping[str, torch.Tensor | None]
    changed: Mapping[str, torch.Tensor]
    written: frozenset[int] = frozenset()
    kind: type = tuple
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    through: bool = True
    random: bool = False


def output_leaves(output: Any) -> list[Any]:
    """Return the leaves of an output, those of containers that torch does not know included."""
    leaves = []
    for leaf in pytree.tree_leaves(output):
        plain = as_plain(leaf)
        leaves += [leaf] if plain is leaf else output_leaves(plain)
    return leaves


def run(
    module: nn.Module,
    forward: Forward,
    arguments: Arguments,
    *,
    train: bool,
    grad: bool,
    through: bool = True,
) -> Run:
    """Run one step on copies of the inputs and return what it gave.

    Args:
        module: Owner of the parameters and buffers to look at.
        forward: Calls the network on the arguments.
        arguments: Inputs of the call.
        train: Whether to run in training mode.
        grad: Whether to run backward from a fixed random projection of the outputs.
        through: Whether to run it through the inputs too.
    """
    with preserved(module), masks_kept(), repeatable(), torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        random = torch.get_rng_state()
        module.train(train)
        before = {name: tensor.detach().clone() for name, tensor in module.named_buffers()}
        numbers = {name: tensor._version for name, tensor in module.named_buffers()}
        leaves = [_fresh(tensor, grad and through) for tensor in arguments.tensors()]
        # A multiplication by one, so that writing into an input is legal and leaves the leaf alone.
        values = [leaf * 1 if leaf.requires_grad else leaf for leaf in leaves]
        versions = [value._version for value in values]
        args, kwargs = arguments.with_leaves(values)
        call = Arguments(args, kwargs, arguments.names, arguments.leaves)
        output = forward(call)
        outputs = output_leaves(output)
        gradients: dict[str, torch.Tensor | None] = {}
        if grad:
            gradients = _gradients(module, outputs, leaves)
        changed = {
            name: tensor.detach().clone()
            for name, tensor in module.named_buffers()
            if name not in before or _changed(tensor, before[name], numbers[name])
        }
        detached = [o.detach() if isinstance(o, torch.Tensor) else o for o in outputs]
        written = [i for i, value in enumerate(values) if value._version != versions[i]]
        kind, names = type(output), _all_names(module)
        drawn = not torch.equal(random, torch.get_rng_state())
        return Run(detached, gradients, changed, frozenset(written), kind, names, through, drawn)


def _all_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def _changed(tensor: torch.Tensor, before: torch.Tensor, version: int) -> bool:
    if tensor.is_meta:
        return tensor._version != version
    return not torch.equal(tensor, before)


def _fresh(tensor: torch.Tensor, grad: bool) -> torch.Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_() if grad and copy.is_floating_point() else copy


def _gradients(
    module: nn.Module, outputs: list[Any], inputs: list[torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    heads = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    leaves: dict[str, torch.Tensor] = {
        name: p for name, p in module.named_parameters() if p.requires_grad
    }
    leaves |= {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    if not heads or not leaves:
        return dict.fromkeys(leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in heads]
    cotangents = [w.to(o.device, o.dtype) for w, o in zip(weights, heads, strict=True)]
    found = torch.autograd.grad(heads, list(leaves.values()), cotangents, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference over the largest magnitude of the reference."""
    if value.numel() == 0 or value.is_meta:
        return 0.0
    if not reference.is_floating_point() and not reference.is_complex():
        return 0.0 if torch.equal(value, reference) else float("inf")
    a, b = value.detach().double(), reference.detach().double()
    finite = torch.isfinite(b)
    same = torch.isclose(a[~finite], b[~finite], equal_nan=True)
    if not torch.isfinite(a[finite]).all() or not same.all():
        return float("inf")
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return 0.0
    scale = b.abs().max().item()
    error = (a - b).abs().max().item()
    return error / scale if scale > 0 else error


def compare(
    candidate: Run,
    reference: Run,
    slack: float = 1.0,
    least: float = 0.0,
    noise: Sequence[float] = (),
) -> str:
    """Return "" if two runs agree, else one line that says where and by how much they differ.

    Args:
        candidate: The run to judge.
        reference: The run that it should equal.
        slack: Times the tolerance of the dtype that counts as equal.
        least: A limit that holds at least, where lower precision was used on the way.
        noise: For every output, the largest difference that rounding can make; none if empty.
    """
    if len(candidate.outputs) != len(reference.outputs):
        return f"{len(candidate.outputs)} outputs instead of {len(reference.outputs)}"
    for index, (value, wanted) in enumerate(zip(candidate.outputs, reference.outputs, strict=True)):
        if noise and difference(value, wanted) <= noise[index]:
            continue
        if reason := _differs(value, wanted, slack, least):
            return f"output {index} differs: {reason}"
    for name, wanted_grad in reference.gradients.items():
        # A parameter of several names may be known by another one to the candidate.
        known = [other for other in reference.names.get(name, (name,))
                 if other in candidate.gradients]  # fmt: skip
        found = candidate.gradients[known[0]] if known else None
        if reason := _differs(found, wanted_grad, slack, least, absent_is_zero=True):
            return f"gradient of {name} differs: {reason}"
    for name in sorted({*reference.changed, *candidate.changed}):
        if name not in reference.changed or name not in candidate.changed:
            verb = "changes" if name in candidate.changed else "does not change"
            return f"the step {verb} buffer {name}"
        if reason := _differs(candidate.changed[name], reference.changed[name], slack, least):
            return f"buffer {name} differs after the step: {reason}"
    return ""


def difference(value: Any, wanted: Any) -> float:
    """The largest difference of two tensors of one type; infinite for others."""
    if not isinstance(wanted, torch.Tensor) or not isinstance(value, torch.Tensor):
        return float("inf")
    if value.shape != wanted.shape or value.dtype != wanted.dtype or not wanted.numel():
        return float("inf")
    largest = (value.double() - wanted.double()).abs().max().item()
    return largest if math.isfinite(largest) else float("inf")


def _differs(
    value: Any, wanted: Any, slack: float, least: float, absent_is_zero: bool = False
) -> str:
    if absent_is_zero:
        if wanted is None and isinstance(value, torch.Tensor):
            wanted = torch.zeros_like(value)
        if value is None and isinstance(wanted, torch.Tensor):
            value = torch.zeros_like(wanted)
    if not isinstance(wanted, torch.Tensor) or not isinstance(value, torch.Tensor):
        same = type(value) is type(wanted) and value == wanted
        return "" if same else f"{value!r} instead of {wanted!r}"
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        return f"{list(value.shape)} {value.dtype} instead of {list(wanted.shape)} {wanted.dtype}"
    limit = max(TOLERANCE.get(wanted.dtype, 0.0) * slack, least)
    error = relative_error(value, wanted)
    return "" if error <= limit else f"relative error {error:.1e} (limit {limit:.0e})"


class Reference:
    """The runs of the original model that every candidate graph is held against.

    Attributes:
        dynamic_batch: Whether the model itself accepts one more sample.
        notes: What could not be compared, and why.
    """

    def __init__(self, model: nn.Module, arguments: Arguments, *, dynamic_batch: bool) -> None:
        self._model = model
        self._arguments = arguments
        self._alone: dict[bool, list[tuple[Arguments, Run]]] = {}
        self.notes: list[str] = []
        self._runs: dict[tuple[bool, bool], Run] = {}
        try:
            self._runs[False, False] = _evaluated(model, arguments)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs "
                f"({_shapes(arguments)}): {_first_line(error)}"
            ) from error
        self.dynamic_batch = dynamic_batch and self._grows(model)
        self._other = arguments.varied(grow=self.dynamic_batch)
        if not self.dynamic_batch:
            self._runs[False, True] = run(model, _call(model), self._other, train=False, grad=False)
        self._train(model)
        if any(
            isinstance(o, torch.Tensor) and o.is_meta
            for r in self._runs.values()
            for o in r.outputs
        ):
            self.notes.append("on the meta device shapes were compared, and no values")

    def _train(self, model: nn.Module) -> None:
        """Run training steps; a batch of one sample may be too small for them, so try both."""
        failures = []
        for other in (False, True):
            arguments = self._other if other else self._arguments
            grad = not any(found.gradients for (mode, _), found in self._runs.items() if mode)
            try:
                self._runs[True, other] = _trained(model, arguments, grad)
            except Exception as error:
                failures.append(_first_line(error))
        if len(failures) == 2:
            self.notes.append(
                f"training mode was not compared: the model fails in it ({failures[0]}); give an "
                "example that it can train on"
            )

    def differentiate(self, model: nn.Module, *, train: bool) -> None:
        """Have the gradients of a mode compared too, which otherwise are in training mode alone.

        Args:
            model: A copy of the model.
            train: The mode.
        """
        if any(found.gradients for (mode, _), found in self._runs.items() if mode == train):
            return
        for mode, other in list(self._runs):
            if mode == train:
                arguments = self._other if other else self._arguments
                self._runs[mode, other] = run(
                    model, _call(model), arguments, train=train, grad=True
                )

    @property
    def random(self) -> bool:
        """Whether a run drew random numbers."""
        return any(found.random for found in self._runs.values())

    @property
    def output_kind(self) -> type:
        """Class of the model's output."""
        return next(iter(self._runs.values())).kind

    @property
    def written(self) -> frozenset[int]:
        """Numbers of the input tensors that the model writes into."""
        return frozenset[int]().union(*(found.written for found in self._runs.values()))

    def _grows(self, model: nn.Module) -> bool:
        other = self._arguments.varied(grow=True)
        try:
            self._runs[False, True] = run(model, _call(model), other, train=False, grad=False)
        except Exception as error:
            self.notes.append(f"batch size fixed: the model refuses another ({_first_line(error)})")
            return False
        return True

    def mismatch(self, candidate: nn.Module, *, modes: Collection[bool] = (False, True)) -> str:
        """Return "" if the candidate graph equals the model, else where it does not.

        Args:
            candidate: The graph.
            modes: Which modes to compare: True for training, False for evaluation.
        """
        for (train, other), wanted in self._runs.items():
            if train not in modes:
                continue
            arguments = self._other if other else self._arguments
            where = f"in {'training' if train else 'evaluation'} mode"
            where += " on a second input" if other else ""
            try:
                got = run(
                    candidate,
                    _call_by_name(candidate),
                    arguments,
                    train=train,
                    grad=bool(wanted.gradients),
                    through=wanted.through,
                )
            except Exception as error:
                return f"the graph fails {where}: {_first_line(error)}"
            if reason := compare(got, wanted):
                return f"{where}, {reason}"
        return self._mismatch_alone(candidate, train=False not in modes)

    def _mismatch_alone(self, candidate: nn.Module, *, train: bool) -> str:
        """Return "" if the outputs are equal wherever one input tensor alone is changed."""
        if train not in self._alone:
            self._alone[train] = list(self._runs_alone(train))
        for arguments, wanted in self._alone[train]:
            try:
                got = run(candidate, _call_by_name(candidate), arguments, train=train, grad=False)
            except Exception as error:
                return f"the graph fails where one input is changed: {_first_line(error)}"
            if reason := compare(got, wanted):
                return f"where one input is changed by itself, {reason}"
        return ""

    def _runs_alone(self, train: bool) -> Iterator[tuple[Arguments, Run]]:
        count = len(self._arguments.leaves)
        for index in range(count if count > 1 else 0):  # a single one is changed anyway
            arguments = self._arguments.varied_alone(index)
            try:
                yield (
                    arguments,
                    run(self._model, _call(self._model), arguments, train=train, grad=False),
                )
            except Exception:  # inputs that must agree with each other
                continue


def _evaluated(model: nn.Module, arguments: Arguments) -> Run:
    """Run in evaluation mode, with gradients where the model has them in that mode.

    The output alone says nothing of a branch that begins at zero, as with a residual scale of zero.
    """
    try:
        return run(model, _call(model), arguments, train=False, grad=True)
    except Exception:
        return run(model, _call(model), arguments, train=False, grad=False)


def _trained(model: nn.Module, arguments: Arguments, grad: bool) -> Run:
    """Run in training mode; some models refuse inputs that gradients shall go through."""
    try:
        return run(model, _call(model), arguments, train=True, grad=grad)
    except Exception:
        if not grad:
            raise
        return run(model, _call(model), arguments, train=True, grad=grad, through=False)


def _call(model: nn.Module) -> Forward:
    return lambda arguments: model(*arguments.args, **arguments.kwargs)


def _call_by_name(module: nn.Module) -> Forward:
    return lambda arguments: module(**arguments.tensor_arguments())


def _shapes(arguments: Arguments) -> str:
    return ", ".join(f"{leaf.argument} {list(leaf.value.shape)}" for leaf in arguments.leaves)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
