"""Build the partition graph: what runs on which stage, as a networkx graph that users can query.

Nodes of the program keep their names; the steps that the compiler added come from a walk over the
sweep (`passes.transform.sweep`). Two Linear layers on two stages, edges that cross marked =>:

    input_1       -> _0, :preprocess_1
    _0            => :residual_1
    :preprocess_1 -> _1, :residual_1
    :residual_1   -> :coarse_1
    _1, :coarse_1 -> :correct_1
    :correct_1    -> :output
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

from passes.ir.program import operator_name, provenance
from passes.transform.sweep import Role, Step, sweep, walk

if TYPE_CHECKING:
    from passes.coarse.spec import OperatorSpec
    from pnn_compile.compiled import Compiled


def partition_graph(compiled: Compiled) -> nx.DiGraph[str]:
    """Build the graph of one parareal iteration.

    Inputs, fine stages and head are the nodes of the program, under the names that they have
    there. What the compiler added starts with a colon, which no name of the program can:
    `:preprocess_1`, `:residual_1`, `:coarse_1`, `:correct_1`, `:output`.

    Node attributes:
        role: "input", "preprocess", "fine", "residual", "coarse", "correct", "head" or "output".
        stage: Number of the stage from 0, or -1 for inputs, head and output.
        op: What it computes: a module class or a function name.
        path: Qualified name of the module that it came from.
        source: `file:line` of the user's code.
        shape: Shape and type of its value, with B for the batch; "" if it is not one tensor.
        flops, backward_flops, parameter_bytes, bytes: Costs at the example inputs.
        seconds: Measured seconds; only on nodes of the program, and only if this network was
            compiled with `cost="measured"` or `"measured-forward"` (an artifact keeps the seconds
            of stages, in its plan).

    Edge attributes:
        bytes: Bytes of the tensors that flow along the edge.
        shape: Their shapes and types, joined by " + ".
        crosses: Whether they flow from one stage to another.

    The three most expensive layers of stage 2:

        stage = [n for n, d in compiled.graph.nodes(data=True) if d["stage"] == 2]
        print(sorted(stage, key=lambda n: compiled.graph.nodes[n]["flops"])[-3:])
    """
    return _Builder(compiled).build()


_State = dict[str, str]
"""Name of the graph node that computes each component of a state."""


class _Builder:
    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.plan = compiled.plan
        self.facts = compiled.analysis.facts
        self.graph: nx.DiGraph[str] = nx.DiGraph(name=compiled.plan.model)
        self.bytes = {node.name: fact.bytes for node, fact in self.facts.items()}
        self.shapes = {
            node.name: str(fact.spec) if fact.spec else "" for node, fact in self.facts.items()
        }
        # The state that the head reads.
        self.last: _State = {}
        self.entering: dict[int, _State] = {}  # by stage, what its fine network reads
        # Names of the values that flow along each edge.
        self.flows: dict[tuple[str, str], set[str]] = {}

    def build(self) -> nx.DiGraph[str]:
        program = self.compiled.program
        for node in program.inputs:
            size, shape = self.bytes[node.name], self.shapes[node.name]
            self._add(node.name, "input", -1, "input", bytes=size, shape=shape)
        stage_of = self._stage_numbers()
        for node in program.order:
            self._add_program_node(node, stage_of[node])
        plan = self.plan
        one_iteration = sweep(len(plan.stages), plan.sweep, windows=plan.windows)
        for step, state in walk(one_iteration, self._add_step):
            if step.role is Role.HEAD:
                self.last = state
        self._add(":output", "output", -1, "output")
        for node in program.order:
            for source in node.all_input_nodes:
                if source.op != "get_attr":
                    self._connect(self._value(source, stage_of, stage_of[node]), node.name, source)
        for source in program.output.all_input_nodes:
            if source.op != "get_attr":
                value = self._value(source, stage_of, len(self.plan.stages))
                self._connect(value, ":output", source)
        return self.graph

    def _stage_numbers(self) -> dict[fx.Node, int]:
        """Number the stages of all nodes; the head counts as one stage more."""
        numbers: dict[fx.Node, int] = {}
        number = 0
        for node in self.compiled.program.order:
            numbers[node] = number
            if number < len(self.plan.stages) and node.name == self.plan.stages[number].last:
                number += 1
        return numbers

    def _add(
        self, name: str, role: str, stage: int, op: str, **attributes: str | int | float
    ) -> None:
        defaults: dict[str, str | int | float] = {
            "path": "", "source": "", "shape": "", "flops": 0, "backward_flops": 0,
            "parameter_bytes": 0, "bytes": 0,
        }  # fmt: skip
        self.graph.add_node(name, role=role, stage=stage, op=op, **(defaults | attributes))

    def _add_program_node(self, node: fx.Node, stage: int) -> None:
        analysis = self.compiled.analysis
        cost, origin = analysis.costs[node], provenance(node)
        if node.op == "call_module":
            op = type(self.compiled.program.module.get_submodule(str(node.target))).__name__
        else:
            op = operator_name(node)
        inside = stage < len(self.plan.stages)
        measured = self.compiled.seconds.get(node.name)
        self._add(
            node.name,
            "fine" if inside else "head",
            stage if inside else -1,
            op,
            path=origin.path,
            source=origin.source,
            flops=cost.flops,
            backward_flops=cost.backward_flops,
            parameter_bytes=cost.parameter_bytes,
            bytes=cost.activation_bytes,
            shape=self.shapes[node.name],
            **({} if measured is None else {"seconds": measured}),
        )

    def _add_step(self, step: Step, states: Sequence[_State]) -> _State:
        """Add the node of a step and the edges of the states that it reads; return its state."""
        number, stage = step.stage, self.plan.stages[step.stage]
        name = f":{step.role}_{number}"
        if step.role is Role.PREPROCESS:
            assert stage.preprocess is not None
            self._add_operator(name, step, stage.preprocess, stage.consumes)
            for source in stage.preprocess.options.inputs:
                self._edge(source, name, source, crosses=False)
            for source in stage.preprocess.options.state:
                self._edge(states[0][source], name, source, crosses=True)
            return dict.fromkeys(stage.consumes, name)
        if step.role is Role.FINE:  # the nodes of the program
            self.entering[number] = states[0] if number else {}
            return {value: value for value in stage.produces}
        if step.role is Role.RESIDUAL:
            before, entering = states
            self._add(name, step.role, number, "sub", **self._type(stage.consumes))
            for value in stage.consumes:
                self._edge(entering[value], name, value, crosses=False)
                self._edge(before[value], name, value, crosses=True)
            return dict.fromkeys(stage.consumes, name)
        if step.role is Role.COARSE:
            assert stage.coarse is not None
            corrected = [value.name for value in self.plan.corrects(number)]
            self._add_operator(name, step, stage.coarse, corrected)
            for value, source in states[0].items():
                self._edge(source, name, value, crosses=False)
            return dict.fromkeys(corrected, name)
        if step.role is Role.CORRECT:
            return self._add_correct(name, step, states)
        return states[0]

    def _add_correct(self, name: str, step: Step, states: Sequence[_State]) -> _State:
        before, computed, *corrections = states if step.stage else ({}, *states)
        components = {**before, **computed}
        interface = self.plan.interfaces[step.stage]
        state = {value.name: components[value.name] for value in interface.state}
        for correction in corrections:
            if name not in self.graph:
                self._add(name, step.role, step.stage, "add", **self._type(correction))
            for value, source in correction.items():
                self._edge(source, name, value, crosses=self._stage(source) != step.stage)
                if state[value] != name:
                    crosses = self._stage(state[value]) != step.stage
                    self._edge(state[value], name, value, crosses=crosses)
                    state[value] = name
        return state

    def _add_operator(
        self, name: str, step: Step, spec: OperatorSpec, values: Sequence[str]
    ) -> None:
        self._add(name, step.role, step.stage, spec.family, flops=spec.flops, **self._type(values))

    def _type(self, values: Iterable[str]) -> dict[str, str | int]:
        """Sum the bytes of several values, and join their shapes."""
        names = list(values)
        shapes = [self.shapes[name] for name in names]
        return {
            "bytes": sum(self.bytes[n] for n in names),
            "shape": " + ".join(filter(None, shapes)),
        }

    def _stage(self, name: str) -> int:
        return int(self.graph.nodes[name]["stage"])

    def _value(self, source: fx.Node, stage_of: dict[fx.Node, int], reader: int) -> str:
        """Return the graph node from which a stage reads the value of a program node."""
        if source not in stage_of or stage_of[source] == reader:
            return source.name
        if reader < len(self.plan.stages):
            consumed = source.name in self.plan.stages[reader].consumes
            return self.entering[reader][source.name] if consumed else source.name
        return self.last.get(source.name, source.name)

    def _connect(self, source: str, target: str, value: fx.Node) -> None:
        stages = [self.graph.nodes[name]["stage"] for name in (source, target)]
        crosses = stages[0] != stages[1] and -1 not in stages
        self._edge(source, target, value.name, crosses=crosses)

    def _edge(self, source: str, target: str, value: str, *, crosses: bool) -> None:
        """Add a value to what flows along an edge."""
        values = self.flows.setdefault((source, target), set())
        if value in values:
            return
        values.add(value)
        flow = self._type([value])
        if self.graph.has_edge(source, target):
            edge = self.graph.edges[source, target]
            shapes = [edge["shape"], str(flow["shape"])]
            flow = {
                "bytes": edge["bytes"] + flow["bytes"],
                "shape": " + ".join(filter(None, shapes)),
            }
        self.graph.add_edge(source, target, **flow, crosses=crosses)
