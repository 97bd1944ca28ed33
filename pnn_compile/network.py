"""`Network`: a parareal network with everything that it was made from, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.analysis.analysis import Analysis, weigh
from passes.cost.node_facts import observe
from passes.errors import ArtifactError, OptionError
from passes.ir.program import Program, graph_module, resolve
from passes.pipeline import REPLAY, Compilation, PassResult, run_passes
from passes.plan.schema import Plan
from passes.plan.validate import check_plan
from passes.transform.split import Stages
from passes.transform.synthesize import Operators

if TYPE_CHECKING:
    from pnn_compile.fit.calibration_report import CalibrationReport

__all__ = ["Network", "gather", "replay"]


@dataclass(frozen=True, repr=False)
class Network:
    """A parareal network with everything that it was made from.

    Attributes:
        program: The captured model.
        plan: Every decision.
        stages: The fine stages and the head.
        operators: The preprocessing operators and coarse propagators.
        sequential: The stages one after another; equal to the original network.
        module: The parareal network; trainable, `train()` and `eval()` work.
        passes: What each pass of the compiler took.
        calibration: What calibration found, where samples were given to the compiler.
        weighed: What the compiler cut it by; None of a network that was loaded.
    """

    program: Program
    plan: Plan
    stages: Stages
    operators: Operators
    sequential: fx.GraphModule
    module: fx.GraphModule
    passes: tuple[PassResult, ...]
    calibration: CalibrationReport | None = None
    timings: Path | None = None
    weighed: Analysis | None = None

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"<{type(self).__name__} {plan.model}: {len(plan.stages)} stages, {plan.correction} "
            f"form, K = {plan.iterations}>"
        )

    @cached_property
    def analysis(self) -> Analysis:
        """Shapes, costs and legal cuts of the program, by FLOPs."""
        if self.weighed is None:
            return weigh(self.program, observe(self.program), "flops")
        if self.weighed.unit == "FLOPs":
            return self.weighed
        return weigh(self.program, self.weighed.facts, "flops")

    @property
    def seconds(self) -> Mapping[str, float]:
        """Measured seconds by the name of the node; empty where the compiler measured none."""
        if self.weighed is None or self.weighed.unit != "seconds":
            return {}
        return {node.name: cost.weight for node, cost in self.weighed.costs.items()}

    def current_program(self) -> Program:
        """Return the program with the tensors that the stages hold now, and inputs to match.

        Conversions such as `module.double()` or `module.to(...)` replace buffers in the stages,
        where the program keeps the older ones.
        """
        program = self.program
        held: dict[str, torch.Tensor] = {}
        for piece in (*self.stages.fine, self.stages.head):
            held.update(piece.named_parameters(remove_duplicate=False))
            held.update(piece.named_buffers(remove_duplicate=False))
        own = dict[str, torch.Tensor](program.module.named_parameters(remove_duplicate=False))
        own.update(program.module.named_buffers(remove_duplicate=False))
        stale = [name for name, tensor in own.items() if held.get(name, tensor) is not tensor]
        module = program.module
        if stale:
            module = graph_module(program.module, program.graph, program.name)
            for name in stale:
                path, _, leaf = name.rpartition(".")
                setattr(resolve(module, path) if path else module, leaf, held[name])
        return replace(program, module=module, args=self._converted_inputs(module))

    @property
    def conversion(self) -> tuple[torch.dtype, torch.dtype] | None:
        """Precision of the states when it was compiled and of all weights now, if it changed."""
        before = {value.spec.dtype for face in self.plan.interfaces for value in face.state}
        weights = self.program.module.parameters()
        now = {p.dtype for p in weights if p.is_floating_point()}
        if len(before) != 1 or len(now) != 1:
            return None
        pair = getattr(torch, before.pop()), now.pop()
        return None if pair[0] == pair[1] else pair

    def _converted_inputs(self, module: fx.GraphModule) -> dict[str, Any]:
        """The example inputs, in the precision and on the device that the weights have now."""
        device = next((p.device for p in module.parameters()), None)
        conversion = self.conversion

        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if conversion is not None and leaf.dtype == conversion[0]:
                leaf = leaf.to(conversion[1])
            return leaf if device is None else leaf.to(device)

        return {name: pytree.tree_map(convert, value) for name, value in self.program.args.items()}

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights of the fine stages and the head under the model's own keys."""
        known = dict(self.program.unused)
        for piece in (*self.stages.fine, self.stages.head):
            known.update(piece.state_dict())
        return known

    def load_original_state_dict(
        self, state: Mapping[str, torch.Tensor], *, strict: bool = True
    ) -> None:
        """Load a checkpoint of the original model into the fine stages and the head.

        Guesses and corrections stay as they are. Those of family thinned hold copies of the
        weights that the model had when it was compiled: load a checkpoint into it before.

        Args:
            state: A state dict with the model's own keys.
            strict: Whether every key must be there, and no other.

        Raises:
            OptionError: Keys are missing or unknown under `strict`, or a shape differs. Nothing
                is loaded then.
        """
        own = self.original_state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if strict and (missing or unknown):
            raise OptionError(
                f"the checkpoint does not fit {self.plan.model}: {len(missing)} keys missing "
                f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])}); "
                "pass strict=False to load what fits"
            )
        common = own.keys() & state.keys()
        wrong = [key for key in common if own[key].shape != state[key].shape]
        if wrong:
            key = min(wrong)
            raise OptionError(
                f"{key} has shape {list(state[key].shape)} in the checkpoint and "
                f"{list(own[key].shape)} in {self.plan.model}"
            )
        with torch.no_grad():
            for key in common:
                own[key].copy_(state[key])


def replay(program: Program, plan: Plan, *before: PassResult, debug: bool = False) -> Network:
    """Build the network that a plan describes over a program.

    Raises:
        ArtifactError: The plan was made for another program, or was edited and makes no sense.
    """
    if plan.fingerprint != program.fingerprint:
        raise ArtifactError(
            f"the plan was made for another {plan.model}: the structure of {program.name} differs "
            "(layers, shapes or options); compile it again"
        )
    check_plan(program, plan)
    compilation, results = run_passes(Compilation(program, plan=plan), REPLAY, check=debug)
    return gather(compilation, (*before, *results))


def gather(compilation: Compilation, results: tuple[PassResult, ...]) -> Network:
    """Collect what a finished compilation made."""
    c = compilation
    assert c.plan is not None
    assert c.stages is not None
    assert c.operators is not None
    assert c.sequential is not None
    assert c.module is not None
    return Network(
        c.program,
        c.plan,
        c.stages,
        c.operators,
        c.sequential,
        c.module,
        results,
        weighed=c.analysis,
    )
