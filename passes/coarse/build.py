"""Build the preprocessing operators and coarse propagators that a plan describes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from passes.coarse.conv import Conv
from passes.coarse.convolution import Convolution
from passes.coarse.exact import Exact
from passes.coarse.forms import Difference, Guess
from passes.coarse.linear import Linear
from passes.coarse.lowrank import LowRank
from passes.coarse.sum import Sum
from passes.coarse.thinned import THINNED, build_front, build_thinned
from passes.coarse.units import build_units
from passes.coarse.zero import Zero
from passes.errors import SynthesisError
from passes.isolation import seeded
from passes.options import BLOCK_FAMILIES
from passes.plan import CoarseSpec, Plan, TensorSpec
from passes.program import Program
from passes.restore import dropouts
from passes.split import Stages, extract, nodes_between

__all__ = [
    "FAMILIES",
    "GUESSES",
    "Operators",
    "build_coarse",
    "build_correction",
    "build_guess",
    "synthesize",
]


class Operators:
    """The cheap networks of a parareal network, by stage; the first stage has none.

    Attributes:
        preprocess: C_j by stage number.
        coarse: The correction of stage j by stage number, in the form that the plan asks for.
    """

    def __init__(
        self, preprocess: Mapping[int, nn.Module], coarse: Mapping[int, nn.Module]
    ) -> None:
        self.preprocess = preprocess
        self.coarse = coarse

    def named(self) -> nn.ModuleDict:
        """All of them under the names that they have in the network."""
        guesses = {f"preprocess_{number}": guess for number, guess in self.preprocess.items()}
        corrections = {f"coarse_{number}": coarse for number, coarse in self.coarse.items()}
        return nn.ModuleDict(guesses | corrections)


def synthesize(program: Program, plan: Plan, stages: Stages) -> Operators:
    """Build every operator of a plan; the same plan and seed give the same initial weights."""
    preprocess: dict[int, nn.Module] = {}
    coarse: dict[int, nn.Module] = {}
    with seeded(plan.seed):
        for number, stage in enumerate(plan.stages):
            if stage.preprocess is None or stage.coarse is None:
                continue
            entering = [value.spec for value in plan.enters(number)]
            guess = build_guess(program, stage.preprocess, entering)
            preprocess[number] = guess.to(program.device).train(program.module.training)
            fine = stages.fine[number]
            coarse[number] = build_correction(program, plan, number, stage.coarse, fine)
    return Operators(preprocess, coarse)


def build_correction(
    program: Program, plan: Plan, number: int, spec: CoarseSpec, fine: nn.Module
) -> nn.Module:
    """Build the correction of a stage, in the form that the plan asks for.

    Raises:
        SynthesisError: The family is unknown.
    """
    entering = [value.spec for value in plan.enters(number)]
    leaving = [value.spec for value in plan.corrects(number)]
    network = build_coarse(program, spec, entering, leaving, fine)
    own = spec.family == "exact"
    if plan.correction == "difference" and not spec.linear:
        plain = all(one.batch_axis == 0 for one in (*entering, *leaving))
        plain = plain and program.dynamic_batch and not dropouts(network)
        joint = plain and not own and not spec.options.get("inputs")
        network = Difference(network, len(entering), joint=joint)
    return network if own else network.to(program.device).train(program.module.training)


def build_guess(program: Program, spec: CoarseSpec, state: list[TensorSpec]) -> nn.Module:
    """Build a preprocessing operator.

    Raises:
        SynthesisError: The family is unknown.
    """
    sources = [_decode(item) for item in spec.options["sources"]]
    parts = [_guess_part(name, spec, sources, state) for name in spec.family.split("+")]
    operator = parts[0] if len(parts) == 1 else Sum(parts)
    if spec.family == THINNED:
        return Guess(operator, build_front(program, spec.options))
    names = [item["name"] for item in spec.options["sources"]]
    inputs = spec.options["inputs"]
    if names == inputs:
        return Guess(operator, None)
    ends = spec.options.get("copied")
    prologue = extract(
        program,
        nodes_between(program, *ends) if ends else [],
        [],
        names,
        inputs=inputs,
        sides=spec.options["sides"],
        name="Prologue",
    )
    return Guess(operator, copy.deepcopy(prologue).requires_grad_() if ends else prologue)


def _guess_part(
    name: str, spec: CoarseSpec, sources: list[TensorSpec], state: list[TensorSpec]
) -> nn.Module:
    reads = spec.options.get("reads")
    if name == "convolution":
        return Convolution(sources, state)
    if name in ("linear", THINNED):
        return Linear(sources, state, bias=True, reads=reads)
    if name == "lowrank":
        return LowRank(sources, state, int(spec.options["rank"]), bias=True, reads=reads)
    if name == "conv":
        return Conv(sources, state, reads)
    raise SynthesisError(f"unknown preprocessing family {name!r}; known: {', '.join(GUESSES)}")


def _decode(item: Mapping[str, object]) -> TensorSpec:
    fields = {key: item[key] for key in ("shape", "dtype", "batch_axis", "channel_axis")}
    shape = fields.pop("shape")
    assert isinstance(shape, (list, tuple))
    return TensorSpec(shape=tuple(shape), **fields)  # type: ignore[arg-type]


def build_coarse(
    program: Program,
    spec: CoarseSpec,
    entering: list[TensorSpec],
    leaving: list[TensorSpec],
    fine: nn.Module,
) -> nn.Module:
    """Build a coarse propagator.

    Raises:
        SynthesisError: The family is unknown.
    """
    parts = [
        _coarse_part(name, program, spec, entering, leaving, fine)
        for name in spec.family.split("+")
    ]
    return parts[0] if len(parts) == 1 else Sum(parts)


def _coarse_part(
    name: str,
    program: Program,
    spec: CoarseSpec,
    entering: list[TensorSpec],
    leaving: list[TensorSpec],
    fine: nn.Module,
) -> nn.Module:
    bias, reads = bool(spec.options.get("bias", False)), spec.options.get("reads")
    if name == "linear":
        return Linear(entering, leaving, bias=bias, reads=reads)
    if name == "lowrank":
        return LowRank(entering, leaving, int(spec.options["rank"]), bias=bias, reads=reads)
    if name == "conv":
        return Conv(entering, leaving, reads)
    if name == "units":
        return build_units(program, spec.options)
    if name == "thinned":
        return build_thinned(program, spec.options)
    if name == "exact":
        return Exact(fine)
    if name == "zero":
        return Zero(entering, leaving)
    raise SynthesisError(f"unknown coarse family {name!r}; known: {', '.join(FAMILIES)}")


FAMILIES = ("linear", "lowrank", "conv", *BLOCK_FAMILIES, "exact", "zero")
"""Names of the families of coarse propagators; the first three combine: "linear+lowrank"."""

GUESSES = ("convolution", "linear", "lowrank", "conv", THINNED)
"""Names of the families of preprocessing operators; all but the last combine."""
