"""Run one step of a network, and compare the results of two: outputs, gradients, buffers.

>>> from passes.ir.example_inputs import bind
>>> model = nn.Linear(4, 2)
>>> inputs = bind(model, (torch.ones(3, 4),), {})
>>> result = run_one_step(model, lambda call: model(*call.args), inputs, train=True, grad=True)
>>> sorted(result.gradients)
['bias', 'input 0', 'weight']
>>> compare(result, result)
''
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.ir.example_inputs import ExampleInputs
from passes.ir.isolation import (
    deterministic_cudnn,
    preserved,
    same_values,
    seed_everything,
    strided,
    with_plain_transformers,
)
from passes.ir.module_walk import named_buffers, named_parameters, set_mode
from passes.ir.output_types import OutputType, output_types, plain

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 2e-2,
}
"""Largest relative error that counts as equal, by dtype; 0 for other dtypes."""

Forward = Callable[[ExampleInputs], Any]
"""Calls a network on example inputs and returns its output."""


@dataclass(frozen=True)
class StepResult:
    """Result of one forward pass and, if gradients were asked for, one backward pass.

    Attributes:
        outputs: Leaves of the output.
        gradients: Gradients of parameters and inputs by name (`input 0`, ...); None for a parameter
            that the outputs do not depend on.
        changed: Buffers that the step changed, by name, with their new values.
        attached: Those of them through which later steps would go on to differentiate.
        written: Positions of the input tensors that the step wrote into.
        types: What makes the containers of the output that are no dicts, lists or tuples.
        unknown: Classes of those that cannot be made.
        parameter_names: All names of each parameter with a gradient, by the first of them.
        input_gradients: Whether gradients with respect to the inputs were asked for too.
        drew_random: Whether the step drew random numbers.
    """

    outputs: list[Any]
    gradients: Mapping[str, torch.Tensor | None]
    changed: Mapping[str, torch.Tensor]
    attached: frozenset[str] = frozenset()
    written: frozenset[int] = frozenset()
    types: tuple[OutputType, ...] = ()
    unknown: tuple[str, ...] = ()
    parameter_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    input_gradients: bool = True
    drew_random: bool = False


def output_leaves(output: Any) -> list[Any]:
    """Return the leaves of an output; dataclasses and mappings count as containers."""
    return pytree.tree_leaves(plain(output))


def output_tensors(output: Any) -> list[torch.Tensor]:
    """Return the leaves of an output that are tensors."""
    return [leaf for leaf in output_leaves(output) if isinstance(leaf, torch.Tensor)]


def run_one_step(
    module: nn.Module,
    forward: Forward,
    inputs: ExampleInputs,
    *,
    train: bool,
    grad: bool,
    input_gradients: bool = True,
    seed: int = 0,
    others: Sequence[nn.Module] = (),
) -> StepResult:
    """Run one step on copies of the inputs, and leave the module as it was.

    Args:
        module: Owner of the parameters and buffers to observe.
        forward: Calls the network on the inputs.
        inputs: Arguments of the call.
        train: Whether to run in training mode.
        grad: Whether to run backward from a fixed random projection of the outputs.
        input_gradients: Whether to compute gradients with respect to the inputs as well.
        seed: Seed of all random generators.
        others: Other modules that `forward` runs; they are set to the mode, and left as they were.
    """
    with (
        preserved(module, *others) as before,
        with_plain_transformers(),
        deterministic_cudnn(),
        torch.set_grad_enabled(grad),
    ):
        seed_everything(seed)
        random_state = torch.get_rng_state()
        modes = [set_mode(child, train, afresh=child is module) for child in (*others, module)]
        copies = {} if any(modes) else before  # a `train()` of its own may change buffers
        buffers = _buffers(module, copies)
        leaves = [_copy_leaf(tensor, grad and input_gradients) for tensor in inputs.tensors()]
        # Multiplied by one, so that the model may write into an input: autograd refuses writes to a
        # leaf that requires a gradient.
        values = [leaf * 1 if leaf.requires_grad else leaf for leaf in leaves]
        versions = [value._version for value in values]
        args, kwargs = inputs.with_leaves(values)
        output = forward(ExampleInputs(args, kwargs, inputs.names, inputs.leaves))
        outputs = output_leaves(output)
        after = dict(named_buffers(module))
        types, unknown = output_types(output)
        return StepResult(
            gradients=_gradients(module, outputs, leaves) if grad else {},
            # Copies, because an output may be a buffer that is put back afterwards.
            outputs=[o.detach().clone() if isinstance(o, torch.Tensor) else o for o in outputs],
            changed={
                name: tensor.detach().clone()
                for name, tensor in after.items()
                if name not in buffers or _changed(tensor, *buffers[name])
            },
            attached=frozenset(n for n, tensor in after.items() if not tensor.is_leaf),
            written=frozenset(i for i, v in enumerate(values) if v._version != versions[i]),
            types=types,
            unknown=unknown,
            parameter_names=_parameter_names(module) if grad else {},
            input_gradients=input_gradients,
            drew_random=not torch.equal(random_state, torch.get_rng_state()),
        )


def _buffers(
    module: nn.Module, copies: Mapping[int, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, int]]:
    """Return a copy and the version of each buffer; of those copied already, that copy."""
    buffers = {}
    for name, tensor in named_buffers(module):
        copy = copies.get(id(tensor))
        buffers[name] = tensor.detach().clone() if copy is None else copy, tensor._version
    return buffers


def _parameter_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of each parameter, by the first of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in named_parameters(module, repeats=True):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def _changed(tensor: torch.Tensor, before: torch.Tensor, version: int) -> bool:
    if tensor.is_meta:  # it has no values to compare
        return tensor._version != version
    return not same_values(tensor, before)


def _copy_leaf(tensor: torch.Tensor, grad: bool) -> torch.Tensor:
    copy = tensor.detach().clone()
    smooth = copy.is_floating_point() and copy.dtype.itemsize > 1  # float8 has no arithmetic
    return copy.requires_grad_() if grad and smooth else copy


def _gradients(
    module: nn.Module, outputs: list[Any], inputs: list[torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """Differentiate a fixed random projection of the outputs by parameters and inputs."""
    heads = [strided(o) for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    leaves: dict[str, torch.Tensor] = {
        name: p for name, p in named_parameters(module) if p.requires_grad
    }
    leaves |= {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    if not heads or not leaves:
        return dict.fromkeys(leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu") for o in heads
    ]
    # Sums, as passing the weights to `grad` imports sympy, for half a second.
    sums = [(o * w.to(o.device, o.dtype)).sum() for w, o in zip(weights, heads, strict=True)]
    scalars = [value.real if value.is_complex() else value for value in sums]
    gradients: Any = torch.autograd.grad(scalars, list(leaves.values()), allow_unused=True)
    return {
        name: _total(gradient, leaf.grad)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _total(gradient: torch.Tensor | None, added: torch.Tensor | None) -> torch.Tensor | None:
    """Add what a backward inside a backward, as that of a reversible layer, left at a leaf."""
    # An embedding may have sparse gradients.
    parts = [strided(part) for part in (gradient, added) if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference over the largest magnitude of the reference.

    Integers and truth values are equal or not: 0 or infinity. Infinities and NaNs must match.

    >>> relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]))  # doctest: +ELLIPSIS
    0.1000...
    """
    if value.numel() == 0 or value.is_meta:
        return 0.0
    value, reference = strided(value), strided(reference)
    if same_values(value, reference):  # nearly always, and much faster than what follows
        return 0.0
    if not reference.is_floating_point() and not reference.is_complex():
        return float("inf")
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
    candidate: StepResult,
    reference: StepResult,
    slack: float = 1.0,
    least: float = 0.0,
    noise: Sequence[float] = (),
) -> str:
    """Return "" if two results agree, else one line that says where and by how much they differ.

    Args:
        candidate: The result to judge.
        reference: The result that it should equal.
        slack: Factor on the tolerance of the dtype.
        least: Lower bound of the tolerance, for runs with lower precision inside.
        noise: For every output, the largest absolute difference that rounding explains; empty if
            rounding explains none.
    """
    if len(candidate.outputs) != len(reference.outputs):
        return f"{len(candidate.outputs)} outputs instead of {len(reference.outputs)}"
    pairs = zip(candidate.outputs, reference.outputs, strict=True)
    for index, (value, expected) in enumerate(pairs):
        if noise and difference(value, expected) <= noise[index]:
            continue
        if reason := _differs(value, expected, slack, least):
            return f"output {index} differs: {reason}"
    for name, expected_gradient in reference.gradients.items():
        # The candidate may use another name of a shared parameter.
        aliases = reference.parameter_names.get(name, (name,))
        gradient = next(
            (candidate.gradients[alias] for alias in aliases if alias in candidate.gradients), None
        )
        if reason := _differs(gradient, expected_gradient, slack, least, absent_is_zero=True):
            return f"gradient of {name} differs: {reason}"
    for name in sorted({*reference.changed, *candidate.changed}):
        if name not in reference.changed or name not in candidate.changed:
            verb = "changes" if name in candidate.changed else "does not change"
            return f"the step {verb} buffer {name}"
        if reason := _differs(candidate.changed[name], reference.changed[name], slack, least):
            return f"buffer {name} differs after the step: {reason}"
    if candidate.attached - reference.attached:
        name = min(candidate.attached - reference.attached)
        return f"the step writes a value with a gradient into buffer {name}"
    return ""


def difference(value: Any, expected: Any) -> float:
    """Return the largest absolute difference of two tensors.

    It is infinite if shapes or dtypes differ, and for anything but tensors.
    """
    if not isinstance(expected, torch.Tensor) or not isinstance(value, torch.Tensor):
        return float("inf")
    if value.shape != expected.shape or value.dtype != expected.dtype or not expected.numel():
        return float("inf")
    if expected.is_meta:  # it has no values to compare
        return 0.0
    largest = (value.double() - expected.double()).abs().max().item()
    return largest if math.isfinite(largest) else float("inf")


def _differs(
    value: Any, expected: Any, slack: float, least: float, absent_is_zero: bool = False
) -> str:
    """Return "" if two leaves agree, else the reason why not."""
    if absent_is_zero:
        if expected is None and isinstance(value, torch.Tensor):
            expected = torch.zeros_like(value)
        if value is None and isinstance(expected, torch.Tensor):
            value = torch.zeros_like(expected)
    if not isinstance(expected, torch.Tensor) or not isinstance(value, torch.Tensor):
        same = type(value) is type(expected) and value == expected
        return "" if same else f"{value!r} instead of {expected!r}"
    if value.shape != expected.shape or value.dtype != expected.dtype:
        shapes = list(value.shape), list(expected.shape)
        return f"{shapes[0]} {value.dtype} instead of {shapes[1]} {expected.dtype}"
    limit = max(TOLERANCE.get(expected.dtype, 0.0) * slack, least)
    error = relative_error(value, expected)
    return "" if error <= limit else f"relative error {error:.1e} (limit {limit:.0e})"
