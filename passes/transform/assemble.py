"""Assemble the parareal network: a GraphModule whose code reads like the algorithm.

With U_j the corrected state behind stage j, x_j the guess of its input and y_j = g_j(x_j),

    residual form     U_j = y_j + F_j(U_{j-1} - x_j)
    difference form   U_j = y_j + G_j(U_{j-1}) - G_j(x_j)
    collapsed sweep   U_N = y_N + sum_j P_j(y_{j-1} - x_j)

The first is the paper's sweep over r~_j = U_j - x_{j+1} (Lee, Park, Lee 2022, eq. 9), the second
classical parareal (Lions, Maday, Turinici 2001), the third what the first becomes where every F_j
is linear: its maps run at once. Iteration k repeats the first two with x_j = U^{k-1}_{j-1}; the
first k stages are exact by then and are not computed again, so K = N gives the original.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

from torch import fx

from passes.ir.program import Program
from passes.plan.schema import Plan, Stage
from passes.transform.split import Stages, unpack
from passes.transform.synthesize import Operators

__all__ = ["assemble"]

_State = dict[str, fx.Node]


def assemble(
    program: Program, plan: Plan, stages: Stages, operators: Operators, *, reuse: bool = True
) -> fx.GraphModule:
    """Build the parareal network of a plan.

    Args:
        program: The captured model.
        plan: The decisions.
        stages: The fine stages and the head.
        operators: The guesses and corrections.
        reuse: Whether iteration k takes the first k stages, which are exact by then, from the
            iteration before; False computes every stage every time (the oracle of K = N).

    Returns:
        A GraphModule with children `fine_j`, `preprocess_j`, `coarse_j` (j from 0; the first
        stage has a fine network only) and `head`; it takes and gives what the model does.
    """
    root = fx.GraphModule({}, fx.Graph())
    for number, fine in enumerate(stages.fine):
        root.add_module(f"fine_{number}", fine)
    for number, guess in operators.preprocess.items():
        root.add_module(f"preprocess_{number}", guess)
    for number, coarse in operators.coarse.items():
        root.add_module(f"coarse_{number}", coarse)
    root.add_module("head", stages.head)
    graph = _Writer(program, plan, reuse).write()
    # With several iterations the last stages are not needed in the first ones.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    network = fx.GraphModule(root, graph, class_name=f"Parareal{program.name}")
    network.training = program.module.training
    return network


class _Writer:
    """Writes the graph: guesses, then fine stages and sweep per iteration, then the head."""

    def __init__(self, program: Program, plan: Plan, reuse: bool) -> None:
        self.plan = plan
        self.reuse = reuse
        self.graph = fx.Graph()
        self.inputs = {n.name: self.graph.placeholder(str(n.target)) for n in program.inputs}

    def write(self) -> fx.Graph:
        plan = self.plan
        guesses: list[_State] = [{} for _ in plan.stages]
        for number, stage in enumerate(plan.stages):
            if stage.preprocess is not None:
                guesses[number] = self._guess(number, stage)
        entering, corrected = guesses, [_State() for _ in plan.stages]
        for iteration in range(min(plan.iterations, len(plan.stages))):
            fine = {
                number: self._fine(number, stage, entering[number])
                for number, stage in enumerate(plan.stages)
                if number >= (iteration if self.reuse else 0)
            }
            if plan.sweep == "collapsed":
                corrected = self._collapsed(entering, fine)
            else:
                corrected = self._sweep(iteration, entering, fine, corrected)
            entering = [_State(), *corrected[:-1]]
        state = [corrected[-1][value.name] for value in plan.interfaces[-1].state]
        self.graph.output(self._call("head", state, plan.head.inputs))
        return self.graph

    def _sweep(
        self,
        iteration: int,
        entering: Sequence[_State],
        fine: dict[int, _State],
        previous: Sequence[_State],
    ) -> list[_State]:
        """Carry the corrections from stage to stage; stages before `iteration` are exact."""
        corrected: list[_State] = []
        for number, stage in enumerate(self.plan.stages):
            if number < iteration and self.reuse:
                corrected.append(previous[number])
                continue
            state = dict(corrected[-1]) if corrected else {}
            own = dict(fine[number])
            if number > (iteration if self.reuse else 0):
                correction = self._correct(number, stage, entering[number], state)
                for name in stage.produces:
                    own[name] = self._add(
                        own[name], correction[name], _label("u", number, name, stage.produces)
                    )
            state.update(own)
            crossing = [value.name for value in self.plan.interfaces[number].state]
            corrected.append({name: state[name] for name in crossing})
        return corrected

    def _collapsed(self, entering: Sequence[_State], fine: dict[int, _State]) -> list[_State]:
        """Add every correction to the last state; the states between stay uncorrected."""
        states: list[_State] = []
        corrections: list[_State] = []
        for number, stage in enumerate(self.plan.stages):
            before = states[-1] if states else {}
            if number:
                corrections.append(self._correct(number, stage, entering[number], before))
            crossing = [value.name for value in self.plan.interfaces[number].state]
            both = {**before, **fine[number]}
            states.append({name: both[name] for name in crossing})
        last = states[-1]
        for number, correction in enumerate(corrections, 1):
            for name, value in correction.items():
                last[name] = self._add(last[name], value, _label("u", number, name, last))
        return states

    def _guess(self, number: int, stage: Stage) -> _State:
        assert stage.preprocess is not None
        inputs = stage.preprocess.options.inputs
        result = self._call(f"preprocess_{number}", [], inputs, f"x_{number}")
        return unpack(self.graph, result, stage.consumes)

    def _fine(self, number: int, stage: Stage, entering: _State) -> _State:
        state = [entering[name] for name in stage.consumes]
        result = self._call(f"fine_{number}", state, stage.inputs, f"y_{number}")
        return unpack(self.graph, result, stage.produces)

    def _correct(self, number: int, stage: Stage, guess: _State, true: _State) -> _State:
        assert stage.coarse is not None
        spec = stage.coarse
        residual = [
            self._subtract(true[name], guess[name], _label("r", number, name, stage.consumes))
            for name in stage.consumes
        ]
        state = residual
        if self.plan.reads_guess(spec):
            state = [*(guess[name] for name in stage.consumes), *residual]
        inputs = spec.options.inputs
        result = self._call(f"coarse_{number}", state, inputs, f"c_{number}")
        return unpack(self.graph, result, [value.name for value in self.plan.corrects(number)])

    def _call(
        self, target: str, state: Sequence[fx.Node], inputs: Sequence[str], name: str = "output"
    ) -> fx.Node:
        arguments = (*state, *(self.inputs[given] for given in inputs))
        return self.graph.create_node("call_module", target, arguments, {}, name=name)

    def _add(self, a: fx.Node, b: fx.Node, name: str) -> fx.Node:
        return self.graph.create_node("call_function", operator.add, (a, b), {}, name=name)

    def _subtract(self, a: fx.Node, b: fx.Node, name: str) -> fx.Node:
        return self.graph.create_node("call_function", operator.sub, (a, b), {}, name=name)


def _label(symbol: str, number: int, name: str, among: Collection[str]) -> str:
    return f"{symbol}_{number}" if len(among) == 1 else f"{symbol}_{number}_{name}"
