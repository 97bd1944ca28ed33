"""Check a plan from a file against its program and weights, before anything of its sizes is made.

A plan says how large the states and the operators are. Followed blindly, one edited number would
ask for more memory than there is. So the states are compared with those that the program computes,
without data, and the operators are first built without data, and compared with the stored weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from passes.cost.node_facts import observe
from passes.errors import ArtifactError, first_line
from passes.ir.module_walk import named_tensors
from passes.ir.program import Interpreter, Program
from passes.ir.tensor_spec import TensorSpec
from passes.plan.schema import Plan
from passes.transform.split import Stages, split
from passes.transform.synthesize import Operators, synthesize
from pnn_compile.artifact.functions import check_operands, is_fragile
from pnn_compile.artifact.tensors import Record, TensorReader


def check_states(program: Program, plan: Plan) -> None:
    """Compare the shapes of all states and sources of a plan with those of the program.

    Raises:
        ArtifactError: One differs, or the program does not run on its example inputs.
    """
    shapes = _shapes(program)
    for place, name, spec in _specs(plan):
        shape = shapes.get(name, spec.shape)
        if shape != spec.shape:
            raise ArtifactError(
                f"{place}.shape is {list(spec.shape)}, and {name} has the shape {list(shape)}"
            )


def _specs(plan: Plan) -> Iterator[tuple[str, str, TensorSpec]]:
    """Yield place, name and type of all states and of all sources of preprocessing operators."""
    for number, face in enumerate(plan.interfaces):
        for index, value in enumerate(face.state):
            yield f"plan.interfaces[{number}].state[{index}].spec", value.name, value.spec
    for number, stage in enumerate(plan.stages):
        for index, source in enumerate(
            stage.preprocess.options.sources if stage.preprocess else ()
        ):
            place = f"plan.stages[{number}].preprocess.options.sources[{index}]"
            yield place, source.name, source


class _Shapes(Interpreter):
    """Records the shapes of all single tensors, and which nodes were run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.done: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        if is_fragile(n.target):
            check_operands(n.target, self.fetch_args_kwargs_from_env(n)[0])
        value = super().run_node(n)
        self.done.add(n.name)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def _shapes(program: Program) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of all values; the program runs without data, and if it can with them."""
    values = [program.args[str(node.target)] for node in program.inputs]
    shapes, error = follow_shapes(program.module, values)
    if error is None or program.device.type == "meta":
        return shapes
    try:
        facts = observe(program)
    except Exception as failure:
        raise ArtifactError(
            f"the program does not run on its example inputs ({type(failure).__name__}: {failure})"
        ) from failure
    return {n.name: fact.spec.shape for n, fact in facts.items() if fact.spec is not None}


def follow_shapes(
    module: fx.GraphModule, values: Sequence[Any]
) -> tuple[Mapping[str, tuple[int, ...]], Exception | None]:
    """Run a graph without data, and check the operands of operators that trust them.

    Args:
        module: The graph.
        values: Values of its placeholders.

    Returns:
        Shapes by node, and what ended the run early: a branch on values, or an operator without
        such a rule.

    Raises:
        ArtifactError: Operands do not fit, or the run did not reach an operator that trusts them.
    """
    mode = FakeTensorMode()
    shell, shells = _without_data(module, values, mode, "cpu")
    recorder = _Shapes(shell)
    try:
        with mode:
            recorder.run(*shells)
        return recorder.shapes, None
    except ArtifactError:
        raise
    except Exception as error:
        for node in module.graph.nodes:
            if is_fragile(node.target) and node.name not in recorder.done:
                raise ArtifactError(
                    f"whether {node.target} can run at {node.name} is not known "
                    f"({first_line(error)})"
                ) from error
        return recorder.shapes, error


def check_operators(
    program: Program, plan: Plan, records: Sequence[Record], values: Mapping[str, torch.Tensor]
) -> None:
    """Compare the tensors of the operators that a plan describes with those that are stored.

    Args:
        program: The program.
        plan: The plan.
        records: Records of the stored tensors.
        values: Their values, by key.

    Raises:
        ArtifactError: One is missing or has another shape, or they are larger than the files.
    """
    shell = program
    if program.device.type != "meta":
        module, args = _without_data(program.module, dict(program.args), nullcontext(), "meta")
        shell = dataclasses.replace(program, module=module, args=args)
    stages = split(shell, plan)
    operators = synthesize(shell, plan, stages)
    tensors = {name: tensor for name, _, tensor in operator_tensors(shell, stages, operators)}
    missing = sorted(tensors.keys() - {record["name"] for record in records})
    if missing:
        raise ArtifactError(f"{len(missing)} weights are missing ({', '.join(missing[:3])})")
    stored = TensorReader(records, values)
    for name, tensor in tensors.items():
        shape = stored.shape(name)
        if shape != tensor.shape:
            raise ArtifactError(
                f"the artifact has {name} {list(shape)}, where the network of the plan has "
                f"{list(tensor.shape)}"
            )
    needed, held = (sum(x.nbytes for x in named.values()) for named in (tensors, values))
    if program.device.type != "meta" and needed > 2 * held:
        raise ArtifactError(f"the plan asks for {needed} bytes of weights, more than are stored")


def operator_tensors(
    program: Program, stages: Stages, operators: Operators
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield name, kind and value of the operators' tensors that no stage shares."""
    pieces = (*stages.fine, stages.head, program.module)
    shared = {id(tensor) for piece in pieces for _, tensor in named_tensors(piece)}
    network = operators.named()
    for name, parameter in network.named_parameters():
        if id(parameter) not in shared:
            yield name, "parameter", parameter
    for name, buffer in network.named_buffers():
        if id(buffer) not in shared:
            yield name, "buffer", buffer


def _without_data(
    module: fx.GraphModule, values: Any, mode: AbstractContextManager[Any], device: str
) -> tuple[fx.GraphModule, Any]:
    """Copy a graph and values of its inputs, with tensors without data in place of all others."""

    def shell_of(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        with mode:
            shell = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
            return (
                nn.Parameter(shell, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else shell
            )

    shells = {id(tensor): shell_of(tensor) for _, tensor in named_tensors(module)}
    return copy.deepcopy(module, shells), pytree.tree_map(shell_of, values)
