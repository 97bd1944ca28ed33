"""The partition graph: what runs where, as a networkx graph that users can query."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

from passes.ir.program import provenance

if TYPE_CHECKING:
    from passes.coarse.spec import OperatorSpec
    from passes.plan.schema import Stage
    from pnn_compile.network import Network

__all__ = ["partition_graph"]


def partition_graph(compiled: Network) -> nx.DiGraph[str]:
    """Build the graph of one parareal iteration.

    Inputs, fine stages and head are the nodes of the program under their own names. What the
    compiler added starts with a colon, which no name of the program can: `:preprocess_1`,
    `:residual_1`, `:coarse_1`, `:correct_1`, `:output`.

    Node attributes:
        role: "input", "preprocess", "fine", "residual", "coarse", "correct", "head" or "output".
        stage: Number of the stage from 0, or -1 for inputs, head and output.
        op: What it computes: a module class or a function name.
        path: Qualified name of the module that it came from.
        source: `file:line` of the user's code.
        shape: Shape and type of its value, with B for the batch; empty where it is not one tensor.
        flops, backward_flops, parameter_bytes, bytes: Costs at the example inputs.
        seconds: Measured seconds; of nodes of the program alone, and only where this network was
            compiled with `cost="measured"` or `"measured-forward"` (an artifact keeps those of the
            stages, in its plan).

    Edge attributes:
        bytes: Bytes of the tensors that flow.
        shape: Their shapes and types, joined by " + ".
        crosses: Whether they flow from one stage to another.

    >>> # the most expensive layers of stage 2, in three lines
    >>> # stage = [n for n, d in compiled.graph.nodes(data=True) if d["stage"] == 2]
    >>> # cost = lambda n: compiled.graph.nodes[n]["flops"]
    >>> # print(sorted(stage, key=cost)[-3:])
    """
    return _Builder(compiled).build()


class _Builder:
    def __init__(self, compiled: Network) -> None:
        self.compiled = compiled
        self.plan = compiled.plan
        self.facts = compiled.analysis.facts
        self.graph: nx.DiGraph[str] = nx.DiGraph(name=compiled.plan.model)
        self.bytes = {node.name: fact.bytes for node, fact in self.facts.items()}
        self.shapes = {
            node.name: str(fact.spec) if fact.spec else "" for node, fact in self.facts.items()
        }
        # What flows along every edge, by the name of the value.
        self.flows: dict[tuple[str, str], set[str]] = {}

    def build(self) -> nx.DiGraph[str]:
        program = self.compiled.program
        for node in program.inputs:
            size, shape = self.bytes[node.name], self.shapes[node.name]
            self._add(node.name, "input", -1, "input", bytes=size, shape=shape)
        stage_of = self._stage_numbers()
        for node in program.order:
            self._add_program_node(node, stage_of[node])
        for number, stage in enumerate(self.plan.stages):
            if number:
                self._add_correction(number, stage)
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
        """Number of the stage of every node; the head counts as one stage more."""
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
        blank: dict[str, str | int | float] = {
            "path": "", "source": "", "shape": "", "flops": 0, "backward_flops": 0,
            "parameter_bytes": 0, "bytes": 0,
        }  # fmt: skip
        self.graph.add_node(name, role=role, stage=stage, op=op, **(blank | attributes))

    def _add_program_node(self, node: fx.Node, stage: int) -> None:
        analysis = self.compiled.analysis
        cost, origin = analysis.costs[node], provenance(node)
        if node.op == "call_module":
            op = type(self.compiled.program.module.get_submodule(str(node.target))).__name__
        else:
            op = getattr(node.target, "__name__", str(node.target))
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

    def _add_correction(self, number: int, stage: Stage) -> None:
        """Add guess, residual, coarse propagator and correction of one stage, with their edges."""
        assert stage.preprocess is not None
        assert stage.coarse is not None
        corrected = [value.name for value in self.plan.corrects(number)]
        guess, residual = f":preprocess_{number}", f":residual_{number}"
        coarse, correct = f":coarse_{number}", self._correction(number)
        self._add_operator(guess, "preprocess", number, stage.preprocess, stage.consumes)
        entering = self._type(stage.consumes)
        self._add(residual, "residual", number, "sub", **entering)
        self._add_operator(coarse, "coarse", number, stage.coarse, corrected)
        if correct not in self.graph:
            where = int(correct.rpartition("_")[2])
            self._add(correct, "correct", where, "add", **self._type(corrected))
        for name in stage.preprocess.options.inputs:
            self._edge(name, guess, name, crosses=False)
        for name in stage.consumes:
            self._edge(guess, residual, name, crosses=False)
            self._edge(residual, coarse, name, crosses=False)
        for name in corrected:
            away = self._stage(coarse) != self._stage(correct)
            self._edge(coarse, correct, name, crosses=away)
            self._edge(name, correct, name, crosses=self._stage(name) != self._stage(correct))
        for name in stage.consumes:
            producer = self._producer(name)
            chained = producer and self.plan.sweep == "chain"
            source = f":correct_{producer}" if chained else name
            self._edge(source, residual, name, crosses=True)

    def _add_operator(
        self, name: str, role: str, number: int, spec: OperatorSpec, gives: Sequence[str]
    ) -> None:
        self._add(name, role, number, spec.family, flops=spec.flops, **self._type(gives))

    def _type(self, values: Iterable[str]) -> dict[str, str | int]:
        """Bytes and shape of several values together."""
        names = list(values)
        shapes = [self.shapes[name] for name in names]
        return {
            "bytes": sum(self.bytes[n] for n in names),
            "shape": " + ".join(filter(None, shapes)),
        }

    def _correction(self, number: int) -> str:
        """Name of the node where the correction of a stage is added."""
        collapsed = self.plan.sweep == "collapsed"
        return f":correct_{len(self.plan.stages) - 1 if collapsed else number}"

    def _stage(self, name: str) -> int:
        return int(self.graph.nodes[name]["stage"])

    def _producer(self, value: str) -> int:
        return next(i for i, stage in enumerate(self.plan.stages) if value in stage.produces)

    def _value(self, source: fx.Node, stage_of: dict[fx.Node, int], reader: int) -> str:
        """Name of the graph node that gives a stage the value of a program node."""
        if source not in stage_of or stage_of[source] == reader:
            return source.name
        if reader < len(self.plan.stages):
            consumed = source.name in self.plan.stages[reader].consumes
            return f":preprocess_{reader}" if consumed else source.name
        carried = {value.name for value in self.plan.interfaces[-1].state}
        producer = stage_of[source]
        if source.name not in carried or not (producer or self.plan.sweep == "collapsed"):
            return source.name
        return self._correction(producer)

    def _connect(self, source: str, target: str, value: fx.Node) -> None:
        stages = [self.graph.nodes[name]["stage"] for name in (source, target)]
        crosses = stages[0] != stages[1] and -1 not in stages
        self._edge(source, target, value.name, crosses=crosses)

    def _edge(self, source: str, target: str, value: str, *, crosses: bool) -> None:
        """Let a value flow along an edge, beside what flows there already."""
        values = self.flows.setdefault((source, target), set())
        if value in values:
            return
        values.add(value)
        flow = self._type([value])
        if self.graph.has_edge(source, target):
            known = self.graph.edges[source, target]
            both = [known["shape"], str(flow["shape"])]
            flow = {
                "bytes": known["bytes"] + flow["bytes"],
                "shape": " + ".join(filter(None, both)),
            }
        self.graph.add_edge(source, target, **flow, crosses=crosses)
