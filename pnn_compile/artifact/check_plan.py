"""Check a plan from a file against its program and weights, before anything of its sizes is made.

A plan says how large the states and the operators are. Followed blindly, one edited number would
ask for more memory than there is. So the states are compared with those that the program computes,
without data, and the operators are first built without data, and compared with the stored weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from passes.cost.node_facts import observe
from passes.errors import ArtifactError
from passes.ir.interpreter import Interpreter
from passes.ir.isolation import preserved
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec
from passes.plan.schema import Plan
from passes.transform.split import Stages, split
from passes.transform.synthesize import Operators, synthesize
from pnn_compile.artifact.modules import named_tensors
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
    """Records the shapes of all single tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def _shapes(program: Program) -> Mapping[str, tuple[int, ...]]:
    recorder = _Shapes(program.module)
    try:
        with preserved(program.module), FakeTensorMode(allow_non_fake_inputs=True):
            recorder.run(*program.fresh_inputs())
    except Exception:  # a branch on values, an operator without a rule for shapes: run it then
        try:
            facts = observe(program)
        except Exception as error:
            raise ArtifactError(
                f"the program does not run on its example inputs ({type(error).__name__}: {error})"
            ) from error
        return {n.name: fact.spec.shape for n, fact in facts.items() if fact.spec is not None}
    return recorder.shapes


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
    shell = program if program.device.type == "meta" else _without_data(program)
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
    needed = sum(map(_bytes, tensors.values()))
    if program.device.type != "meta" and needed > 2 * sum(map(_bytes, values.values())):
        raise ArtifactError(f"the plan asks for {needed} bytes of weights, more than are stored")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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


def _without_data(program: Program) -> Program:
    """Copy a program, with all tensors on the meta device, example inputs included."""

    def shell_of(leaf: Any) -> Any:
        return torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf

    shells: dict[int, Any] = {}
    for _, tensor in named_tensors(program.module):
        shell = shell_of(tensor)
        if isinstance(tensor, nn.Parameter):
            shell = nn.Parameter(shell, requires_grad=tensor.requires_grad)
        shells.setdefault(id(tensor), shell)
    args = pytree.tree_map(shell_of, dict(program.args))
    return dataclasses.replace(program, module=copy.deepcopy(program.module, shells), args=args)
