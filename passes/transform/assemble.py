"""Assemble the networks of a plan: GraphModules whose code reads like the algorithm.

For two stages, `forward` is

    x_1 = self.preprocess_1(input);  y_0 = self.fine_0(input);  y_1 = self.fine_1(x_1)
    r_1 = y_0 - x_1;  c_1 = self.coarse_1(r_1);  u_1 = y_1 + c_1;  output = self.head(u_1)

`node.meta["pnn"]` holds the step of the sweep (`passes.transform.sweep`) that a node belongs to:
role, stage and iteration.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import fx

from passes.errors import SynthesisError
from passes.ir.program import Program
from passes.plan.schema import Plan
from passes.transform.network import CALL, Call, Network
from passes.transform.split import Stages
from passes.transform.sweep import Role, Step, in_sequence, steps_of, walk
from passes.transform.synthesize import Operators

_State = dict[str, fx.Node]
"""Components of a state by name."""
_KEY = "pnn"


def step_of(node: fx.Node) -> Step | None:
    """Return the step that a node of an assembled network belongs to; None for its arguments."""
    step = node.meta.get(_KEY)
    return step if isinstance(step, Step) else None


def verify_steps(network: fx.GraphModule) -> None:
    """Check that every node of an assembled network belongs to a step.

    Raises:
        SynthesisError: One does not.
    """
    for node in network.graph.nodes:
        if node.op not in ("placeholder", "output") and step_of(node) is None:
            raise SynthesisError(f"malformed graph: node {node.name!r} belongs to no step")


def assemble(
    program: Program, plan: Plan, stages: Stages, operators: Operators, *, reuse: bool = True
) -> fx.GraphModule:
    """Build the parareal network of a plan.

    Args:
        program: The captured model.
        plan: The decisions.
        stages: The fine stages and the head.
        operators: The preprocessing operators and coarse propagators.
        reuse: Whether iteration k takes the first k states, which are exact by then, from the
            iteration before; False computes every stage every time (the oracle of K = N).

    Returns:
        A GraphModule with children `fine_j`, `preprocess_j`, `coarse_j` (j from 0; the first
        stage has a fine network only) and `head`; arguments and outputs are those of the model.
    """
    steps = steps_of(plan, reuse=reuse)
    return _network(program, plan, stages, operators, steps, f"Parareal{program.name}")


def sequential(program: Program, plan: Plan, stages: Stages) -> fx.GraphModule:
    """Compose the stages one after another: a network that equals the original."""
    steps = in_sequence(len(plan.stages))
    return _network(program, plan, stages, Operators({}, {}), steps, f"Sequential{program.name}")


def _network(
    program: Program,
    plan: Plan,
    stages: Stages,
    operators: Operators,
    steps: Iterable[Step],
    name: str,
) -> fx.GraphModule:
    root = fx.GraphModule({}, fx.Graph())
    for number, fine in enumerate(stages.fine):
        root.add_module(f"fine_{number}", fine)
    for path, network in operators.named().named_children():
        root.add_module(path, network)
    root.add_module("head", stages.head)
    writer = _Writer(program, plan)
    for _ in walk(steps, writer.write):
        pass
    writer.graph.lint()
    network = Network(root, writer.graph, class_name=name)
    network.meta[CALL] = Call.of(program)
    network.training = program.module.training
    return network


class _Writer:
    """Writer of the graph of a network, step by step."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.plan = plan
        self.graph = fx.Graph()
        self.inputs = {n.name: self.graph.placeholder(str(n.target)) for n in program.inputs}

    def write(self, step: Step, states: Sequence[_State]) -> _State:
        """Add the nodes of a step, given the states that it reads; return the state it writes."""
        write: dict[Role, Callable[[Step, Sequence[_State]], _State]] = {
            Role.PREPROCESS: self._preprocess,
            Role.FINE: self._fine,
            Role.RESIDUAL: self._residual,
            Role.COARSE: self._coarse,
            Role.CORRECT: self._correct,
            Role.HEAD: self._head,
        }
        return write[step.role](step, states)

    def _preprocess(self, step: Step, states: Sequence[_State]) -> _State:
        stage = self.plan.stages[step.stage]
        assert stage.preprocess is not None
        options = stage.preprocess.options
        state = [states[0][name] for name in options.state]
        result = self._call(step, "x", state, options.inputs)
        return self._unpack(step, result, stage.consumes)

    def _fine(self, step: Step, states: Sequence[_State]) -> _State:
        stage = self.plan.stages[step.stage]
        entering = [states[0][name] for name in stage.consumes]
        result = self._call(step, "y", entering, stage.inputs)
        return self._unpack(step, result, stage.produces)

    def _residual(self, step: Step, states: Sequence[_State]) -> _State:
        before, entering = states
        names = self.plan.stages[step.stage].consumes
        if self.plan.predicts:
            names = tuple(value.name for value in self.plan.corrects(step.stage))
        return {
            name: self._binary(
                step, operator.sub, before[name], entering[name],
                _label("r", step.stage, name, names),
            )
            for name in names
        }  # fmt: skip

    def _coarse(self, step: Step, states: Sequence[_State]) -> _State:
        read, *entering = states
        stage = self.plan.stages[step.stage]
        assert stage.coarse is not None
        state = [*read.values()]
        if self.plan.predicts:
            state = [read[name] for name in stage.consumes]
        elif self.plan.reads_guess(stage.coarse):
            state = [*(entering[0][name] for name in stage.consumes), *state]
        inputs = stage.coarse.options.inputs
        result = self._call(step, step.writes.letter, state, inputs)
        return self._unpack(step, result, [v.name for v in self.plan.corrects(step.stage)])

    def _correct(self, step: Step, states: Sequence[_State]) -> _State:
        """Combine the state after a stage, and add the corrections.

        In a chain, a correction has the components that the stage produced.
        """
        before, produced, *corrections = states if step.stage else ({}, *states)
        values = {**before, **produced}
        crossing = self.plan.interfaces[step.stage].state
        state = {value.name: values[value.name] for value in crossing}
        symbols = [symbol for symbol in step.reads if symbol.letter == "c"]
        for correction, symbol in zip(corrections, symbols, strict=True):
            among = self.plan.stages[step.stage].produces
            if self.plan.sweep == "collapsed":
                among = tuple(state)
            for name, value in correction.items():
                label = _label("u", symbol.stage, name, among)
                state[name] = self._binary(step, operator.add, state[name], value, label)
        return state

    def _head(self, step: Step, states: Sequence[_State]) -> _State:
        state = [*states[0].values()]
        result = self._call(step, "output", state, self.plan.head.inputs)
        self.graph.output(result)
        return {"output": result}

    def _call(
        self, step: Step, letter: str, state: Sequence[fx.Node], inputs: Sequence[str]
    ) -> fx.Node:
        target, name = f"{step.role}_{step.stage}", f"{letter}_{step.stage}"
        if step.role is Role.HEAD:
            target, name = "head", letter
        arguments = (*state, *(self.inputs[argument] for argument in inputs))
        return self._node(step, "call_module", target, arguments, name)

    def _binary(
        self, step: Step, function: Callable[..., Any], a: fx.Node, b: fx.Node, name: str
    ) -> fx.Node:
        return self._node(step, "call_function", function, (a, b), name)

    def _unpack(self, step: Step, result: fx.Node, names: Sequence[str]) -> _State:
        """Name the tensors that a call returned: itself, or the elements of its tuple."""
        if len(names) == 1:
            return {names[0]: result}
        return {
            name: self._node(
                step, "call_function", operator.getitem, (result, index), f"{result.name}_{name}"
            )
            for index, name in enumerate(names)
        }

    def _node(
        self, step: Step, op: str, target: Any, arguments: tuple[Any, ...], name: str
    ) -> fx.Node:
        node = self.graph.create_node(op, target, arguments, {}, name=name)
        node.meta[_KEY] = step
        return node


def _label(symbol: str, number: int, name: str, among: Collection[str]) -> str:
    """Name a node by symbol and stage, and by component if the state has several."""
    return f"{symbol}_{number}" if len(among) == 1 else f"{symbol}_{number}_{name}"
