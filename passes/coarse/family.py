"""The table of families: every kind of preprocessing operator C_j and coarse propagator F_j.

A row says what a family is and what the compiler may do with it: a new row works under its name
(`coarse="mine"`) everywhere. Which families "auto" and calibration try is decided in `select.py`.
`docs/write_a_coarse_family.md` shows how to add a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.analysis.masks import remove_dropout
from passes.coarse.convolution import Conv, Convolution
from passes.coarse.copied_blocks import UnitsOptions, build_units
from passes.coarse.last_layers import LayersOptions, build_last_layers
from passes.coarse.linear import Linear, LowRank, LowRankOptions, linear_flops, lowrank_flops
from passes.coarse.narrow_guess import NarrowOptions, build_narrow
from passes.coarse.spec import (
    CoarseOptions,
    CoarseSpec,
    OperatorRole,
    OperatorSpec,
    PreprocessOptions,
    PreprocessSpec,
    Site,
)
from passes.coarse.thinned_blocks import FrontOptions, ThinnedOptions, build_front, build_thinned
from passes.coarse.time_step import (
    StartOptions,
    TimeStepOptions,
    Unchanged,
    build_start,
    build_time_step,
)
from passes.coarse.wrappers import (
    ExactOptions,
    Identity,
    PreprocessingOperator,
    Sum,
    Zero,
    build_exact,
)
from passes.errors import SynthesisError
from passes.ir.program import Program, extract, nodes_between
from passes.ir.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from passes.options import Options

Build = Callable[[Any, Site], nn.Module]
"""Function from the options of a family and a `Site` to a network."""


def _guess_by_channel_map(options: PreprocessOptions, site: Site) -> Linear:
    return Linear(site.entering, site.leaving, bias=True, reads=options.reads)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of cheap networks: a row of the table.

    Attributes:
        preprocess: Builds a preprocessing operator, from the sources to the state; None if the
            family has none.
        coarse: Builds a coarse propagator, from the entering residual (or state) and the inputs
            that its options name to the leaving one; None if the family has none.
        preprocess_options: Class of the options of `preprocess`.
        coarse_options: Class of the options of `coarse`. Families can be summed if the options of
            one of them extend those of all others.
        sums: Whether it can be summed with others: "linear+lowrank".
        linear: Whether it is linear in the state, apart from a bias: then the difference form
            equals the residual form.
        sweeps: The sweeps that its coarse propagators support: "chain", "collapsed". If "auto" is
            among them, sweep="auto" chooses between the two, else it takes the chain.
        copies_blocks: Whether it copies whole blocks of the trunk, so that cuts lie between them.
        is_fine: Whether it is the fine stage itself, with its weights and buffers.
        evidence: What it kept of the accuracy of networks that were trained from scratch until
            their curve was flat, by kind of state ("image", "sequence", "narrow image" for one that
            a narrow copy guesses) and sweep, "chain at 0.25" for copies of a quarter of the
            channels; nothing where that was not measured.
        in_time: Whether it takes steps of a loop in time, with the weights and buffers of the
            trunk, so that cuts lie between steps.
        of_one_tensor: Whether it is for states of one tensor, so that cuts lie where one crosses.
        of_one_type: Whether it is for states of one type; where a stage changes the type, channel
            maps take its place.
        flops: Estimates the FLOPs of one call of a coarse propagator from the types of its
            entering and leaving state and the rank that was asked for, to place the cuts. The plan
            stores counted FLOPs.
    """

    preprocess: Build | None = None
    coarse: Build | None = None
    preprocess_options: type[PreprocessOptions] = PreprocessOptions
    coarse_options: type[CoarseOptions] = CoarseOptions
    sums: bool = False
    linear: bool = False
    sweeps: tuple[str, ...] = ("chain",)
    copies_blocks: bool = False
    is_fine: bool = False
    evidence: Mapping[tuple[str, str], str] = field(default_factory=dict)
    in_time: bool = False
    of_one_tensor: bool = False
    of_one_type: bool = False
    flops: Callable[[Sequence[TensorSpec], Sequence[TensorSpec], int], float] = (
        lambda entering, leaving, rank: linear_flops(entering, leaving)
    )


_EITHER = ("chain", "collapsed")
_COLLAPSES = ("chain", "collapsed", "auto")

FAMILIES: dict[str, Family] = {
    "convolution": Family(
        preprocess=lambda options, site: Convolution(site.entering, site.leaving, options.width),
        sums=True,
    ),
    "linear": Family(
        preprocess=_guess_by_channel_map,
        coarse=lambda options, site: Linear(
            site.entering, site.leaving, bias=bool(options.bias), reads=options.reads
        ),
        sums=True,
        linear=True,
        sweeps=_COLLAPSES,
        evidence={
            ("image", "chain"): "lost 2.1 points in training from scratch on VGG-16 / 8, and "
            "gained 0.8 on a residual network of two streams (N = 3, one seed each)",
            ("image", "collapsed"): "lost 2.1 points in training from scratch "
            "(VGG-16 / 8, N = 3, one seed)",
            ("sequence", "chain"): "gained 2.1 points in training from scratch "
            "(a text decoder of 12 layers, N = 3, one seed)",
        },
    ),
    "lowrank": Family(
        preprocess=lambda options, site: LowRank(
            site.entering, site.leaving, options.rank, bias=True, reads=options.reads
        ),
        coarse=lambda options, site: LowRank(
            site.entering, site.leaving, options.rank, bias=options.bias, reads=options.reads
        ),
        coarse_options=LowRankOptions,
        sums=True,
        linear=True,
        sweeps=_COLLAPSES,
        evidence={
            ("narrow image", "collapsed"): "lost 4.5 points in training from scratch "
            "(a ResNet of 18 units, N = 3, one seed)",
        },
        flops=lowrank_flops,
    ),
    "conv": Family(
        preprocess=lambda options, site: Conv(site.entering, site.leaving, options.reads),
        coarse=lambda options, site: Conv(site.entering, site.leaving, options.reads),
        sums=True,
        sweeps=_EITHER,
    ),
    "units": Family(
        coarse=build_units,
        coarse_options=UnitsOptions,
        sweeps=_EITHER,
        copies_blocks=True,
        of_one_tensor=True,
        evidence={
            ("image", "chain"): "gained 1.9 and 2.1 points in training from scratch with N = 3, "
            "and 3.7 and 3.1 with N = 6 (VGG-16 / 8 and a ResNet of 18 units, on images of 32 x 32 "
            "and 16 x 16, three seeds each)",
            ("image", "collapsed"): "gained 0.9 points in training from scratch with N = 3 "
            "(VGG-16 / 8, three seeds); with N = 6 lost 1.6, and gained 1.8 on a ResNet of 18 "
            "units (one seed each)",
            ("narrow image", "chain"): "kept the accuracy in training from scratch "
            "(VGG-16 / 8, N = 3, one seed)",
            ("image", "chain at 0.5"): "lost 0.4 and 0.6 points in training from scratch "
            "(VGG-16 / 8 and a ResNet of 18 units, N = 3, one seed each)",
            ("image", "chain at 0.25"): "lost 1.1 and gained 0.2 points in training from scratch "
            "(VGG-16 / 8 and a ResNet of 18 units, N = 3, two seeds each)",
            ("image", "collapsed at 0.25"): "lost 1.5 points in training from scratch with N = 3 "
            "(VGG-16 / 8), and gained 0.6 with N = 6 (a ResNet of 18 units, one seed each)",
            ("sequence", "chain"): "gained 2.0 points in training from scratch "
            "(a text decoder of 12 layers, N = 3, three seeds)",
        },
    ),
    "layers": Family(
        coarse=build_last_layers,
        coarse_options=LayersOptions,
        sweeps=_EITHER,
        copies_blocks=True,
        evidence={
            ("image", "chain"): "gained 0.4 and 2.5 points in training from scratch with N = 3 "
            "(VGG-16 / 8 and a residual network of two streams, one seed each), and 2.7 with N = 6 "
            "beside copied blocks (VGG-16 / 8, three seeds)",
            ("sequence", "collapsed"): "gained 2.2 points in training from scratch "
            "(a text decoder of 12 layers, N = 6, two seeds)",
            ("image", "collapsed"): "with N = 6 lost 10.3 points in training from scratch on "
            "VGG-16 / 8, and gained 0.8 on a ResNet of 18 units (one seed each)",
        },
    ),
    "thinned": Family(
        # The front, which computes the sources, copies the blocks; its map scales them.
        preprocess=_guess_by_channel_map,
        coarse=build_thinned,
        preprocess_options=FrontOptions,
        coarse_options=ThinnedOptions,
        sweeps=_EITHER,
        copies_blocks=True,
        of_one_tensor=True,
    ),
    "narrow": Family(
        preprocess=_guess_by_channel_map,
        preprocess_options=NarrowOptions,
    ),
    "time_step": Family(
        preprocess=lambda options, site: Unchanged(),
        coarse=build_time_step,
        preprocess_options=StartOptions,
        coarse_options=TimeStepOptions,
        in_time=True,
    ),
    "exact": Family(
        coarse=build_exact,
        coarse_options=ExactOptions,
        is_fine=True,
    ),
    "identity": Family(
        preprocess=lambda options, site: Identity(site.entering, site.leaving),
        coarse=lambda options, site: Identity(site.entering, site.leaving),
        linear=True,
        sweeps=_EITHER,
        of_one_type=True,
        flops=lambda entering, leaving, rank: 0.0,
    ),
    "zero": Family(
        coarse=lambda options, site: Zero(site.entering, site.leaving),
        linear=True,
        sweeps=_EITHER,
        flops=lambda entering, leaving, rank: 0.0,
    ),
}
"""The families by name. Users add rows before they compile."""


def names_of(role: OperatorRole, *, summed: bool = False) -> tuple[str, ...]:
    """Return the families that have a role; with `summed`, those of them that can be summed."""
    return tuple(
        name
        for name, row in FAMILIES.items()
        if getattr(row, role) is not None and (row.sums or not summed)
    )


def evidence_of(family: str, state: Sequence[TensorSpec], guess: str, options: Options) -> str:
    """Return what is known of the accuracy that a family keeps beside the guesses of "auto".

    Args:
        family: Name of a row of the table, or a sum, of which nothing was measured.
        state: Types of the state that it corrects.
        guess: Family of the preprocessing operator of the stage.
        options: The other choices.

    Returns:
        The result of a study; "" if there is none.
    """
    single = options.units == 1 and options.count == 1 and options.windows == 1
    front = options.prologue and guess != "narrow"
    if front or not single or options.correction == "difference":
        return ""
    row = FAMILIES.get(family, Family())
    axes = {(len(spec.shape), spec.channel_axis % len(spec.shape)) for spec in state}
    # What the studies trained: images guessed by convolutions or narrow copies, tokens by maps.
    studied = {
        (4, 1, "convolution"): "image",
        (4, 1, "narrow"): "narrow image",
        (3, 2, "linear"): "sequence",
    }
    kind = studied.get((*axes.pop(), guess), "") if len(axes) == 1 else ""
    narrow = row.copies_blocks and options.coarse_width not in {None, 1}
    form = f"{options.sweep} at {options.coarse_width:g}" if narrow else options.sweep
    return row.evidence.get((kind, form), "")


def rows_of(family: str) -> list[Family]:
    """Return the rows of a family or of a sum of families; none for "auto".

    Raises:
        SynthesisError: A family is unknown.
    """
    parts = [] if family == "auto" else family.split("+")
    for part in parts:
        if part not in FAMILIES:
            raise SynthesisError(f"unknown family {part!r}; known: {', '.join(FAMILIES)}")
    return [FAMILIES[part] for part in parts]


def copies_blocks(family: str) -> bool:
    """Return whether networks of a family copy whole blocks of the trunk."""
    return any(row.copies_blocks for row in rows_of(family))


def of_one_tensor(family: str) -> bool:
    """Return whether networks of a family are for states of one tensor."""
    return any(row.of_one_tensor for row in rows_of(family))


def is_fine(family: str) -> bool:
    """Return whether coarse propagators of a family are the fine stages themselves."""
    return any(row.is_fine for row in rows_of(family))


def in_time(family: str) -> bool:
    """Return whether networks of a family take steps of a loop in time."""
    return any(row.in_time for row in rows_of(family))


def starts_anywhere(family: str) -> bool:
    """Return whether preprocessing operators of a family may read a state in place of inputs."""
    return family == "auto" or options_of("preprocess", family) is PreprocessOptions


def options_of(role: OperatorRole, family: str) -> type[PreprocessOptions] | type[CoarseOptions]:
    """Return the options class of a family, or of a sum: the one that extends all others.

    Raises:
        SynthesisError: A family is unknown, or the options of a sum do not extend each other.
    """
    classes = [getattr(row, f"{role}_options") for row in rows_of(family)]
    widest: type[PreprocessOptions] | type[CoarseOptions] = max(
        classes, key=lambda one: len(one.__mro__)
    )
    if not all(issubclass(widest, one) for one in classes):
        raise SynthesisError(f"the families of {family!r} have options that do not go together")
    return widest


def build_preprocess(
    program: Program, spec: PreprocessSpec, state: Sequence[TensorSpec]
) -> PreprocessingOperator:
    """Build a preprocessing operator for a state.

    Raises:
        SynthesisError: The family is unknown.
    """
    prologue, sources = _prologue(program, spec.options)
    return PreprocessingOperator(_build(spec, Site(program, sources, state)), prologue)


def _prologue(
    program: Program, options: PreprocessOptions
) -> tuple[nn.Module | None, Sequence[TensorSpec]]:
    """Build the map from inputs to sources: copies of layers, coarse steps, or the embedding."""
    if options.window and not options.copied:
        return None, options.sources
    if isinstance(options, NarrowOptions):
        return build_narrow(program, options)
    if isinstance(options, FrontOptions):
        return build_front(program, options), options.sources
    if isinstance(options, StartOptions):
        return build_start(program, options), options.sources
    names = [source.name for source in options.sources]
    if names == list(options.inputs):
        return None, options.sources
    prologue = extract(
        program,
        nodes_between(program, *options.copied) if options.copied else [],
        options.entering or (),
        names,
        inputs=options.inputs,
        sides=options.sides,
        name="Prologue",
    )
    if options.copied:
        prologue = copy.deepcopy(prologue).requires_grad_()
    else:
        remove_dropout(prologue)
    return prologue, options.sources


def between(family: str, entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec]) -> str:
    """Return the family, or channel maps where it does not lead from one type to another."""
    changes = [*map(str, entering)] != [*map(str, leaving)]
    return "linear" if changes and any(row.of_one_type for row in rows_of(family)) else family


def build_coarse(
    program: Program,
    spec: CoarseSpec,
    entering: Sequence[TensorSpec],
    leaving: Sequence[TensorSpec],
    fine: nn.Module,
) -> nn.Module:
    """Build a coarse propagator between two states; `fine` is the stage that it approximates.

    Raises:
        SynthesisError: The family is unknown.
    """
    return _build(spec, Site(program, entering, leaving, fine))


def _build(spec: OperatorSpec, site: Site) -> nn.Module:
    """Build the network of a family, or the sum of several."""
    parts = []
    # On the CPU otherwise, whatever the default device: a seed gives the same weights everywhere.
    device = torch.device("meta" if site.program.device.type == "meta" else "cpu")
    for row in rows_of(spec.family):
        build: Build | None = getattr(row, spec.role)
        if build is None:
            names = ", ".join(names_of(spec.role))
            raise SynthesisError(f"no {spec.role} family {spec.family!r}; known: {names}")
        with device:
            parts.append(build(spec.options, site))
    return parts[0] if len(parts) == 1 else Sum(parts)
