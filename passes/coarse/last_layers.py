"""Family `layers`: copies of the last layers of a stage, where no block of one tensor repeats.

The tensors of a skip connection or of a second stream cross the cuts of a U-Net, a DenseNet or a
reversible network. There the coarse network of a stage copies its last layers, from the last place
between blocks before it computes what leaves. Channel maps lead there. For a stage of a U-Net with
two levels, and its coarse network:

    (x, skip1, skip0) -> level 1 -> (y, skip0) -> level 0 -> z
    (x, skip1, skip0) ---- maps --> (y, skip0) -> level 0 -> z

Where maps between all tensors would cost more than the layers, each tensor has one map alone, or is
one of its type as it is. The copies draw fresh weights. With a `width` they work at a share of the
channels, between the maps and an expansion, beside a shortcut (`narrow.py`). In a collapsed sweep
the "stage" reaches to the last state.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.coarse.linear import Linear, LinearMap, linear_flops
from passes.coarse.map_matrix import MapMatrix
from passes.coarse.narrow import narrow, narrow_spec, redraw
from passes.coarse.spec import (
    NON_EMPTY,
    CoarseOptions,
    NodeName,
    Reads,
    Share,
    Site,
    SourceSpec,
    Span,
    ValueName,
    dependence,
    zeros,
)
from passes.coarse.wrappers import Identity
from passes.ir.program import Program, extract, nodes_between, tensor_leaves
from passes.ir.tensor_spec import TensorSpec, Value


@dataclass(frozen=True, kw_only=True)
class LayersOptions(CoarseOptions):
    """Options of family `layers`.

    Attributes:
        first: First node of the copied layers.
        last: Their last node.
        entering: The values that enter the stage.
        sources: The values that the copied layers read.
        leaving: The values that they compute.
        sides: Side values that the copied layers recompute.
        mapped: Which entering values each source may depend on.
        straight: Whether each source has one map, or none from a tensor of its type.
        width: Share of the channels at which the copies work; None for all.
    """

    first: NodeName
    last: NodeName
    entering: Annotated[tuple[ValueName, ...], NON_EMPTY]
    sources: Annotated[tuple[SourceSpec, ...], NON_EMPTY]
    leaving: Annotated[tuple[ValueName, ...], NON_EMPTY]
    sides: tuple[NodeName, ...] = ()
    mapped: Reads
    straight: bool = False
    width: Share | None = None

    @classmethod
    def choose(cls, span: Span) -> Self:
        """Choose the last place between blocks after which all that leaves is computed."""
        analysis, width = span.analysis, span.options.coarse_width
        leaving = tuple(value.name for value in span.leaving)
        start = _begin(analysis, span.start, span.stop, leaving, len(span.start.state))
        nodes = analysis.frontiers.order[start.index : span.stop.index]
        inputs, sides = requirements(analysis.program, nodes, analysis.frontiers.recomputable)
        read = {source for node in nodes for source in node.all_input_nodes}
        sources = [
            Value(node.name, spec)
            for node, spec in zip(start.state, start.specs, strict=True)
            if node in read
        ]
        entering = [value.spec for value in span.entering]
        maps = linear_flops(entering, [source.spec for source in sources])
        return cls(
            inputs=inputs,
            reads=span.reads,
            first=nodes[0].name,
            last=nodes[-1].name,
            entering=tuple(value.name for value in span.entering),
            sources=tuple(SourceSpec(**vars(value.spec), name=value.name) for value in sources),
            leaving=leaving,
            sides=sides,
            mapped=_mapped(span, sources),
            straight=maps > analysis.flops_between(start.index, span.stop.index),
            width=None if width == 1 else width,
        )


def _mapped(span: Span, sources: Sequence[Value]) -> Reads:
    """Return which entering values each source may depend on; one that enters, on itself alone."""
    entering = [value.name for value in span.entering]
    reads = dependence(span.analysis, entering, sources)
    rows = reads or [tuple(range(len(entering)))] * len(sources)
    return tuple(
        (entering.index(source.name),) if source.name in entering else row
        for source, row in zip(sources, rows, strict=True)
    )


def last_layers_flops(analysis: Analysis, stop: Position, most: int) -> int:
    """Return the FLOPs of the last layers before a cut.

    Args:
        analysis: The facts about the program.
        stop: The cut.
        most: Number of tensors that enter their stage.
    """
    key = "last layers", stop.index, most
    if key not in analysis.measured:
        leaving = [node.name for node in stop.state]
        begin = _begin(analysis, analysis.frontiers.positions[0], stop, leaving, most)
        analysis.measured[key] = analysis.flops_between(begin.index, stop.index)
    return int(analysis.measured[key])


def _begin(
    analysis: Analysis, start: Position, stop: Position, leaving: Sequence[str], most: int
) -> Position:
    """Return the last place between two cuts where the copied layers may begin.

    It lies before the last convolution or matrix product, if there is one.
    """
    order, costs = analysis.frontiers.order, analysis.costs
    number = {node.name: index for index, node in enumerate(order)}
    latest = min(number[name] for name in leaving)
    for index in reversed(range(start.index, latest)):
        if costs[order[index]].backward_flops > costs[order[index]].flops:  # twice the FLOPs
            latest = index
            break
    most = max(most, len(stop.state))
    inside = [
        position
        for position in analysis.frontiers.positions
        if start.index < position.index <= latest
        if position.boundary and len(position.state) <= most
    ]
    return inside[-1] if inside else start


class LastLayers(nn.Module):
    """Channel maps of the entering tensors, followed by copies of layers.

    Args:
        enter: Maps from the entering tensors to what the copies read; None if that is the same.
        body: The copies.
        expand: For copies at a share of the channels, a map of each of their results.
        shortcut: From the entering tensors to the leaving ones, which are added to those: the same
            where their types agree, else maps.
        count: Number of entering tensors.
    """

    def __init__(
        self,
        enter: nn.Module | None,
        body: nn.Module,
        expand: Sequence[nn.Module],
        shortcut: nn.Module | None,
        count: int,
    ) -> None:
        super().__init__()
        self.enter, self.body, self.shortcut = enter, body, shortcut
        self.expand = nn.ModuleList(expand)
        self._count = count

    def forward(self, *arguments: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Propagate the entering tensors, with the inputs of the program that the copies read."""
        state, inputs = arguments[: self._count], arguments[self._count :]
        sources = state if self.enter is None else tensor_leaves(self.enter(*state))
        results = tensor_leaves(self.body(*sources, *inputs))
        if self.shortcut is not None:
            straight = tensor_leaves(self.shortcut(*state))
            triples = zip(straight, self.expand, results, strict=True)
            results = [past + expand(result) for past, expand, result in triples]
        return results[0] if len(results) == 1 else tuple(results)


def build_last_layers(options: LayersOptions, site: Site) -> LastLayers:
    """Copy the layers that the options name and draw fresh weights for them.

    Raises:
        SynthesisError: A layer has no narrower copy, but a width is asked for.
    """
    entering, leaving, width = [*site.entering], [*site.leaving], options.width
    body = _copied(site.program, options)
    sources: list[TensorSpec] = [_type_of(source) for source in options.sources]
    expand = list[nn.Module]()
    shortcut: nn.Module | None = None
    if width is None:
        redraw(body)
    else:
        sources = [narrow_spec(source, width) for source in sources]
        values = [zeros(source, site.program.device) for source in sources]
        results = narrow(body, width, [*values, *site.program.examples(options.inputs)])
        for spec, result in zip(leaving, tensor_leaves(results), strict=True):
            computed = dataclasses.replace(spec, shape=tuple(result.shape))
            expand.append(LinearMap(computed, spec, gain=0.0))
        same = entering == leaving and _reads_itself(options.reads)
        shortcut = (
            Identity(entering, leaving)
            if same
            else _maps(entering, leaving, options.reads, straight=options.straight)
        )
    read = tuple(source.name for source in options.sources)
    enter = None
    if options.entering != read or entering != sources:
        enter = _maps(entering, sources, options.mapped, straight=options.straight)
    return LastLayers(enter, body, expand, shortcut, len(entering))


def _maps(
    entering: Sequence[TensorSpec],
    leaving: Sequence[TensorSpec],
    reads: Reads | None,
    *,
    straight: bool,
) -> MapMatrix:
    """Build channel maps between two states, all of them or the straight ones alone."""
    if not straight:
        return Linear(entering, leaving, reads=reads)
    chosen = []
    for place, target in enumerate(leaving):
        row = range(len(entering)) if reads is None else reads[place]
        # One of the same type if there is one, and of the same place if there are several.
        nearest = sorted(row, key=lambda n: (entering[n] != target, n != place))
        chosen.append(tuple(nearest[:1]))

    def make(source: TensorSpec, target: TensorSpec, first: bool) -> nn.Module:
        if source == target:
            return Identity([source], [target])
        return LinearMap(source, target)

    return MapMatrix(entering, leaving, make, tuple(chosen))


def _reads_itself(reads: Reads | None) -> bool:
    """Return whether every leaving tensor may depend on the entering one of its place."""
    return reads is None or all(place in row for place, row in enumerate(reads))


def _type_of(source: SourceSpec) -> TensorSpec:
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(TensorSpec)}
    return TensorSpec(**fields)


def _copied(program: Program, options: LayersOptions) -> fx.GraphModule:
    """Copy the layers deeply; the copies are trainable even if the originals are frozen."""
    original = extract(
        program,
        nodes_between(program, options.first, options.last),
        [source.name for source in options.sources],
        options.leaving,
        inputs=options.inputs,
        sides=options.sides,
        name="LastLayers",
    )
    return copy.deepcopy(original).requires_grad_()
