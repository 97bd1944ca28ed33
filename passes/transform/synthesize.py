"""Build the guesses and corrections of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from passes.coarse.family import build_coarse, build_preprocess, is_fine
from passes.coarse.spec import CoarseSpec
from passes.coarse.wrappers import Difference
from passes.ir.isolation import seeded
from passes.ir.mode_layers import dropouts
from passes.ir.program import Program
from passes.plan.schema import Plan
from passes.transform.split import Stages

__all__ = ["Operators", "build_correction", "synthesize"]


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
            guess = build_preprocess(program, stage.preprocess, entering)
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
    own = is_fine(spec.family)
    if plan.correction == "difference" and not spec.linear:
        plain = all(one.batch_axis == 0 for one in (*entering, *leaving))
        plain = plain and program.dynamic_batch and not dropouts(network)
        joint = plain and not own and not spec.options.inputs
        network = Difference(network, len(entering), joint=joint)
    return network if own else network.to(program.device).train(program.module.training)
