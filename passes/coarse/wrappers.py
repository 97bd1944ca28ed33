"""Wrappers and special networks: difference form, preprocessing operator, sum, exact, identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from passes.analysis.cut_points import requirements
from passes.coarse.spec import CoarseOptions, Site, Span
from passes.coarse.tensor_layout import fit_positions, layouts
from passes.errors import SynthesisError
from passes.ir.tensor_spec import TensorSpec


class Difference(nn.Module):
    """The correction of classical parareal, `G(x + r) - G(x)`.

    Both calls are one batch if that is sound, so that normalization layers in `G` see one
    distribution and update their statistics once.

    Args:
        coarse: The coarse propagator G, from (state, inputs).
        width: Number of tensors in the state.
        joint: Whether to evaluate both calls as one batch along dimension 0.
    """

    def __init__(self, coarse: nn.Module, width: int, *, joint: bool) -> None:
        super().__init__()
        self.coarse = coarse
        self._width = width
        self._joint = joint

    def separate(self) -> None:
        """Call the network twice from now on, as a batch of both has no static form in ONNX."""
        self._joint = False

    def forward(self, *arguments: torch.Tensor) -> Any:
        """Return the correction from (state x, residual r, inputs)."""
        width = self._width
        state, residual = arguments[:width], arguments[width : 2 * width]
        inputs = arguments[2 * width :]
        moved = tuple(x + r for x, r in zip(state, residual, strict=True))
        if not self._joint:
            return self._apart(moved, state, inputs)
        both = (torch.cat(pair) for pair in zip(moved, state, strict=True))
        result = self.coarse(*both, *inputs)
        if isinstance(result, torch.Tensor):
            moved_result, state_result = result.chunk(2)
            return moved_result - state_result
        halves = [x.chunk(2) for x in result]
        return tuple(a - b for a, b in halves)

    def _apart(self, moved: tuple[Any, ...], state: tuple[Any, ...], inputs: Any) -> Any:
        """Evaluate both calls one after the other, on the same random numbers in training."""
        if not self.training:
            return _minus(self.coarse(*moved, *inputs), self.coarse(*state, *inputs))
        with torch.random.fork_rng():
            result = self.coarse(*moved, *inputs)
        return _minus(result, self.coarse(*state, *inputs))


def _minus(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor):
        return a - b
    return tuple(x - y for x, y in zip(a, b, strict=True))


class PreprocessingOperator(nn.Module):
    """A preprocessing operator C_j: a prologue that computes the sources, then a map to the state.

    Args:
        operator: From the source tensors to the state.
        prologue: From the inputs of the program to the source tensors (the first layers, or a
            thinned copy of all layers before the interface); None if the sources are inputs.
    """

    def __init__(self, operator: nn.Module, prologue: nn.Module | None) -> None:
        super().__init__()
        self.prologue = prologue
        self.operator = operator

    def forward(self, *inputs: Any) -> Any:
        """Guess the entering state of the stage; contiguous, as a stage may take views of it."""
        sources = inputs if self.prologue is None else self.prologue(*inputs)
        state = self.operator(*(sources if isinstance(sources, tuple) else (sources,)))
        if isinstance(state, torch.Tensor):
            return state.contiguous()
        return tuple(value.contiguous() for value in state)


class Sum(nn.Module):
    """Sum of the outputs of several networks for the same state.

    Args:
        parts: Networks from one state to another.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map the entering tensors to the leaving ones (a tensor if there is one)."""
        results = [part(*state) for part in self.parts]
        total = results[0]
        for result in results[1:]:
            if isinstance(total, tuple):
                total = tuple(a + b for a, b in zip(total, result, strict=True))
            else:
                total = total + result
        return total  # type: ignore[no-any-return]  # modules are untyped


@dataclass(frozen=True, kw_only=True)
class ExactOptions(CoarseOptions):
    """Options of family `exact`: the inputs that the stage reads."""

    @classmethod
    def choose(cls, span: Span) -> Self:
        """Take the inputs of the stage."""
        nodes = span.analysis.frontiers.order[span.start.index : span.stop.index]
        inputs, _ = requirements(span.analysis.program, nodes, span.analysis.frontiers.recomputable)
        return cls(inputs=inputs)

    @property
    def why(self) -> str:
        """Reason for the plan: the exact propagator is an oracle."""
        return "the oracle"


class Exact(nn.Module):
    """Call of the fine stage, whose parameters it shares.

    Args:
        fine: The stage.
    """

    def __init__(self, fine: nn.Module) -> None:
        super().__init__()
        self.fine = fine

    def forward(self, *arguments: torch.Tensor) -> Any:
        """Propagate (state, inputs) as the fine stage does."""
        return self.fine(*arguments)


def build_exact(options: ExactOptions, site: Site) -> Exact:
    """Wrap the fine stage of a site."""
    assert site.fine is not None
    return Exact(site.fine)


class Identity(nn.Module):
    """The state itself, where nothing changes its shape.

    As guess and as correction it makes N stages of residual layers read one state x and adds what
    they do to it, x + sum_j (g_j(x) - x): layers in parallel (Gonzalez et al. 2025, arXiv
    2502.02790).

    Args:
        entering: Types of the tensors that it reads.
        leaving: Types of the tensors that it returns.

    Raises:
        SynthesisError: They differ.
    """

    def __init__(self, entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec]) -> None:
        super().__init__()
        source, target = (", ".join(map(str, types)) for types in (entering, leaving))
        if source != target:
            raise SynthesisError(
                f"family 'identity' leads from {source} to {target}, but both must be of one type"
            )

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return copies, as a stage may write into its state."""
        copies = tuple(x.clone() for x in state)
        return copies[0] if len(copies) == 1 else copies


class Zero(nn.Module):
    """Zeros of the leaving types.

    Args:
        entering: Types of the tensors that it reads; the first one has the batch size.
        leaving: Types of the tensors that it returns.
    """

    def __init__(self, entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec]) -> None:
        super().__init__()
        self._pairs = [layouts(entering[0], target) for target in leaving]

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return one zero tensor per leaving type."""
        results = []
        for source, target in self._pairs:
            x = source.enter(state[0]) * 0
            x = fit_positions(x[:, :1], source, target)
            results.append(target.leave(x.expand(-1, target.channels, *x.shape[2:])))
        return results[0] if len(results) == 1 else tuple(results)
