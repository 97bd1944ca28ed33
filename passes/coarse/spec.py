"""Specifications of preprocessing operators and coarse propagators: family, options, cost.

The options of a family are a frozen dataclass. In the JSON text of a plan they are an object that
omits fields that are None. The decoder of the plan checks types. The `Annotated` types below state
what types cannot, and `passes.plan.validate` checks those against the program.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import torch
from torch import nn

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec, Value

if TYPE_CHECKING:
    from passes.options import Options

OperatorRole = Literal["preprocess", "coarse"]

NodeName = Annotated[str, "node"]
"""Name of a node of the program that computes something."""
ValueName = Annotated[str, "value"]
"""Name of a node or of an input of the program."""
InputName = Annotated[str, "input"]
"""Name of an input of the program; inside options, of one that `options.inputs` lists."""
Count = Annotated[int, "count"]
"""Integer of at least 1."""
Share = Annotated[float, "share"]
"""Number above 0 and at most 1."""
NON_EMPTY = "non-empty"
"""Mark of a tuple with at least one item: `Annotated[tuple[X, ...], NON_EMPTY]`."""

Reads = tuple[tuple[int, ...], ...]
"""For every leaving tensor, the indices of the entering tensors that it may depend on."""


@dataclass(frozen=True)
class SourceSpec(TensorSpec):
    """Type and name of a value that a preprocessing operator reads."""

    name: ValueName


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Options of a preprocessing operator: its sources, and how inputs lead to them.

    Attributes:
        rank: Rank of family "lowrank".
        sources: The values that it maps to the state.
        copied: First and last node of the first layers, if a copy of them computes the sources.
        inputs: The inputs of the program that it takes.
        sides: Side values that it recomputes from these.
        prologue: Share of the cost of the original that the copy may take; None if not set.
        reads: Which sources each component of the state may depend on; all if None.
        width: Most channels inside of family "convolution"; None for those of the state.
        window: Whether it takes values of the corrected state before the window in place of
            inputs.
        entering: The values of that state that the copied layers read; None if none are copied,
            and the sources are these values.
    """

    rank: Count
    sources: Annotated[tuple[SourceSpec, ...], NON_EMPTY]
    copied: tuple[NodeName, NodeName] | None = None
    inputs: tuple[InputName, ...]
    sides: tuple[NodeName, ...]
    prologue: float | None = None
    reads: Reads | None = None
    width: Count | None = None
    window: bool | None = None
    entering: Annotated[tuple[ValueName, ...], NON_EMPTY] | None = None

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the values of the state before the window that it takes."""
        if not self.window:
            return ()
        return self.entering or tuple(source.name for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class CoarseOptions:
    """Options of a coarse propagator; families with more of them extend this class.

    Attributes:
        inputs: The inputs of the program that it takes after the state.
        reads: Which entering tensors each leaving one may depend on; all if None.
        bias: Whether its linear maps have a bias.
    """

    inputs: tuple[InputName, ...] = ()
    reads: Reads | None = None
    bias: bool | None = None

    @classmethod
    def choose(cls, span: Span) -> Self:
        """Choose the options for a stage.

        Raises:
            SynthesisError: The family does not fit the stage; the message says why.
        """
        return cls(reads=span.reads)

    def made_of(self, analysis: Analysis) -> Hashable:
        """Return a key that equal networks between equal types share, to measure them once."""
        return self

    @property
    def why(self) -> str:
        """Reason in the plan if the user asked for the family."""
        return "asked for"


@dataclass(frozen=True)
class Span:
    """The stage that a coarse propagator is chosen for.

    Attributes:
        analysis: The facts about the program.
        options: Options of the compilation.
        start: Where the stage begins.
        stop: Where it ends; in a collapsed sweep, where the last stage ends.
        entering: The components of the state that it reads.
        leaving: The components that the propagator corrects.
    """

    analysis: Analysis
    options: Options
    start: Position
    stop: Position
    entering: tuple[Value, ...]
    leaving: tuple[Value, ...]

    @property
    def reads(self) -> Reads | None:
        """Which entering tensors each leaving one may depend on; None if all on all."""
        names = [value.name for value in self.entering]
        return dependence(self.analysis, names, self.leaving)


@dataclass(frozen=True)
class Site:
    """Place of a network: the types of the states around it.

    Attributes:
        program: The captured model.
        entering: Types of the tensors that it reads.
        leaving: Types of the tensors that it returns.
        fine: The stage that a coarse propagator approximates; None for preprocessing operators.
    """

    program: Program
    entering: Sequence[TensorSpec]
    leaving: Sequence[TensorSpec]
    fine: nn.Module | None = None


def zeros(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """Return a tensor of a type, filled with zeros."""
    return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device)


def dependence(
    analysis: Analysis, entering: Sequence[str], leaving: Sequence[Value]
) -> Reads | None:
    """Return which entering values each leaving one may depend on; None if all on all."""
    reads = tuple(
        tuple(i for i, name in enumerate(entering) if analysis.may_read(value.name, name))
        for value in leaving
    )
    return None if all(len(row) == len(entering) for row in reads) else reads


@dataclass(frozen=True)
class Trial:
    """A candidate network that calibration measured.

    Attributes:
        name: Family, rank and sources.
        flops: Forward FLOPs of one call at the example inputs.
        error: Remaining error on held-out samples, relative to the state.
    """

    name: str
    flops: int
    error: float


@dataclass(frozen=True)
class OperatorSpec:
    """Specification of an operator: a preprocessing operator or a coarse propagator.

    Attributes:
        family: Name of the family in `passes.coarse.family`, or a sum of names.
        options: Options of the family, from which the same network can be built again.
        flops: Forward FLOPs of one call at the example inputs.
        parameters: Number of parameters that it does not share with the fine stages.
        linear: Whether it is a linear map of its state.
        why: Why this family was chosen.
        tried: The candidates, if calibration chose it.
        seconds: Seconds of one call, as in `Stage`: measured in isolation, or by roofline; else
            None.
        backward_seconds: The backward part of `seconds`.
    """

    role: ClassVar[OperatorRole]

    family: str
    options: PreprocessOptions | CoarseOptions
    flops: int
    parameters: int
    linear: bool
    why: str = ""
    tried: tuple[Trial, ...] = ()
    seconds: float | None = None
    backward_seconds: float | None = None

    @property
    def rank(self) -> int | None:
        """Rank of the "lowrank" part; None if there is none."""
        return getattr(self.options, "rank", None) if "lowrank" in self.family.split("+") else None


@dataclass(frozen=True)
class PreprocessSpec(OperatorSpec):
    """A preprocessing operator C_j."""

    role = "preprocess"
    options: PreprocessOptions


@dataclass(frozen=True)
class CoarseSpec(OperatorSpec):
    """A coarse propagator F_j."""

    role = "coarse"
    options: CoarseOptions
