"""Let a program follow its network after a conversion such as `double()` or `to(device)`.

It replaces the buffers of the stages; the program and its example inputs keep the old ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.ir.module_walk import named_tensors
from passes.ir.program import Program, graph_module, resolve
from passes.plan.schema import Plan
from passes.transform.split import Stages


def conversion(
    program: Program, plan: Plan, network: fx.GraphModule
) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the precision of the states at compile time and of all weights now, if it changed."""
    states = {value.spec.dtype for face in plan.interfaces for value in face.state}
    now = {p.dtype for p in program.module.parameters() if p.is_floating_point()}
    before = {getattr(torch, name) for name in states} - now  # others may be converted in forward
    if len(before) != 1 or len(now) != 1:
        return None
    pair = before.pop(), now.pop()
    # Under autocast the states have another precision than the weights from the start, and so have
    # operators that are not copies of layers.
    operators = {
        parameter.dtype
        for name, parameter in network.named_parameters()
        if name.startswith(("preprocess_", "coarse_"))
    }
    return None if pair[0] in operators else pair


def current_program(
    program: Program, plan: Plan, stages: Stages, network: fx.GraphModule
) -> Program:
    """Return a program with the current tensors of its stages, and inputs that match them."""
    current: dict[str, torch.Tensor] = {}
    for piece in (*stages.fine, stages.head):
        current.update(named_tensors(piece, repeats=True))
    captured = named_tensors(program.module, repeats=True)
    stale = [n for n, tensor in captured if current.get(n, tensor) is not tensor]
    module = program.module
    if stale:
        module = graph_module(program.module, program.graph, program.name)
        for name in stale:
            path, _, leaf = name.rpartition(".")
            setattr(resolve(module, path) if path else module, leaf, current[name])
    device = next((p.device for p in module.parameters()), None)
    converted = conversion(program, plan, network)

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if converted is not None and leaf.dtype == converted[0]:
            leaf = leaf.to(converted[1])
        return leaf if device is None else leaf.to(device)

    args = {name: pytree.tree_map(convert, value) for name, value in program.args.items()}
    return replace(program, module=module, args=args)
