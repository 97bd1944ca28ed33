"""Build the preprocessing operators and coarse propagators of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from passes.capture.refold import dropouts
from passes.coarse.family import build_coarse, build_preprocess, in_time, is_fine
from passes.coarse.spec import CoarseSpec
from passes.coarse.wrappers import Difference
from passes.ir.isolation import seeded
from passes.ir.program import Program
from passes.plan.schema import Plan
from passes.transform.split import Stages


class Operators:
    """The operators of a parareal network by stage number; the first stage has none.

    Args:
        preprocess: Preprocessing operators C_j.
        coarse: Coarse propagators F_j, in residual or in difference form.
    """

    def __init__(
        self, preprocess: Mapping[int, nn.Module], coarse: Mapping[int, nn.Module]
    ) -> None:
        self.preprocess = preprocess
        self.coarse = coarse

    def named(self) -> nn.ModuleDict:
        """Return all of them under the names that they have in the network."""
        preprocess = {f"preprocess_{j}": network for j, network in self.preprocess.items()}
        coarse = {f"coarse_{j}": network for j, network in self.coarse.items()}
        return nn.ModuleDict(preprocess | coarse)


def synthesize(program: Program, plan: Plan, stages: Stages) -> Operators:
    """Build every operator of a plan; the same plan and seed give the same initial weights.

    Of a program without data, on the meta device, they are built without data, whatever their size.
    """
    preprocess: dict[int, nn.Module] = {}
    coarse: dict[int, nn.Module] = {}
    with seeded(plan.seed):
        for number, stage in enumerate(plan.stages):
            if stage.preprocess is None or stage.coarse is None:
                continue
            entering = [value.spec for value in plan.enters(number)]
            operator = build_preprocess(program, stage.preprocess, entering)
            preprocess[number] = _in_mode(program, operator, stage.preprocess.family)
            fine = stages.fine[number]
            coarse[number] = build_propagator(program, plan, number, stage.coarse, fine)
    return Operators(preprocess, coarse)


def build_propagator(
    program: Program, plan: Plan, number: int, spec: CoarseSpec, fine: nn.Module
) -> nn.Module:
    """Build the coarse propagator of a stage, in the form that the plan names.

    Args:
        program: The captured model.
        plan: The plan.
        number: Number of the stage.
        spec: Specification of the propagator, of the plan or of a candidate.
        fine: The stage.

    Raises:
        SynthesisError: The family is unknown.
    """
    entering = [value.spec for value in plan.enters(number)]
    leaving = [value.spec for value in plan.corrects(number)]
    network = build_coarse(program, spec, entering, leaving, fine)
    exact = is_fine(spec.family)
    if plan.reads_guess(spec):
        # Both calls are one batch if the network treats samples independently.
        plain = all(tensor.batch_axis == 0 for tensor in (*entering, *leaving))
        plain = plain and "batch" in program.dynamic and not dropouts(network)
        joint = plain and not exact and not spec.options.inputs
        network = Difference(network, len(entering), joint=joint)
    return _in_mode(program, network, spec.family)


def _in_mode(program: Program, network: nn.Module, family: str) -> nn.Module:
    """Put a new network into the mode and onto the device of the program.

    Layers of the program keep their own: they may differ from the mode of the whole.
    """
    if not is_fine(family) and not in_time(family):
        return network.to(program.device).train(program.module.training)
    shared = set(program.module.modules())
    for module in network.modules():
        if module not in shared and not isinstance(module, fx.GraphModule):
            module.training = program.module.training
    return network
