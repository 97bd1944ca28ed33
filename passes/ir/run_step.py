"""Run one step of a network and compare two runs: outputs, gradients, buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.ir.example_inputs import Arguments, as_plain
from passes.ir.isolation import masks_kept, preserved, repeatable

__all__ = ["TOLERANCE", "Run", "compare", "difference", "output_leaves", "relative_error", "run"]

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
