"""One training or evaluation step of a network, and the comparison of two such steps.

Written apart from `passes.capture.equivalence`, which is what the compiler believes itself by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Step:
    """What one step gave.

    Attributes:
        output: The output, detached, in its own structure.
        gradients: Gradients of the parameters and of the floating-point inputs, by name.
        buffers: The buffers after the step, by name.
    """

    output: Any
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def step(
    owner: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool,
    forward: Callable[..., Any] | None = None,
    through: bool = True,
) -> Step:
    """Run a network forward and backward on copies of the inputs and put everything back.

    Args:
        owner: Whose parameters, buffers and mode count.
        args: Positional inputs.
        kwargs: Keyword inputs.
        train: Whether to run in training mode.
        forward: What to call; `owner` itself if None.
        through: Whether gradients go through the inputs too.
    """
    buffers = {name: buffer.clone() for name, buffer in owner.named_buffers()}
    modes = {module: module.training for module in owner.modules()}
    inputs: dict[str, Tensor] = {}

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        if not (through and copy.is_floating_point()):
            return copy
        inputs[f"input {len(inputs)}"] = copy.requires_grad_()
        return copy * 1  # a leaf must not be written in place

    args, kwargs = pytree.tree_map(fresh, (args, dict(kwargs or {})))
    parameters = {name: p for name, p in owner.named_parameters() if p.requires_grad}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            owner.train(train)
            output = (forward or owner)(*args, **kwargs)
            gradients = _gradients(output, parameters | inputs)
        after = {name: buffer.clone() for name, buffer in owner.named_buffers()}
    finally:
        with torch.no_grad():
            for name, buffer in owner.named_buffers():
                buffer.copy_(buffers[name])
        for module, mode in modes.items():
            module.training = mode
    return Step(pytree.tree_map(_detached, output), gradients, after)


def _gradients(output: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differentiate a projection of the outputs in which no two elements weigh the same."""
    heads = [o for o in pytree.tree_leaves(output) if isinstance(o, Tensor) and o.requires_grad]
    if not heads or not leaves:
        return {}
    weighed = [(o * torch.linspace(0.5, 1.5, o.numel()).view_as(o)).sum() for o in heads]
    projection = torch.stack(weighed).sum()
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        [projection], list(leaves.values()), allow_unused=True
    )
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def assert_same_step(actual: Step, expected: Step, *, scale: float = 1.0) -> None:
    """Assert that two steps agree to `scale` times the usual tolerance of float32."""
    torch.testing.assert_close(actual.output, expected.output, rtol=1e-5, atol=1e-5 * scale)
    for name in actual.gradients.keys() | expected.gradients.keys():
        pair = [s.gradients.get(name, torch.zeros(())) for s in (actual, expected)]
        size = max(1.0, *(float(gradient.abs().max()) for gradient in pair))
        assert_close(pair, f"gradient of {name}", 1e-5 * scale * size)
    common = actual.buffers.keys() & expected.buffers.keys()
    for name in common:
        assert_close([actual.buffers[name], expected.buffers[name]], f"buffer {name}", 1e-5 * scale)


def assert_close(pair: list[Tensor], what: str, limit: float) -> None:
    """Assert that two tensors, broadcast against each other, agree to an absolute limit."""
    error = float((pair[0].double() - pair[1].double()).abs().max()) if pair[0].numel() else 0.0
    assert error <= limit, f"{what} differs by {error:.1e} (limit {limit:.0e})"
