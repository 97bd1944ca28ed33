"""Verify a compiled network: properties that hold whatever its weights are.

They say that the compiler cut the model and assembled the network correctly; they say nothing about
its accuracy at K = 1. With three stages:

    stages in sequence         head(g_2(g_1(g_0(x))))           = model(x), gradients too
    F_j = g_j, difference form u_j = g_j(x_j) + g_j(u_{j-1}) - g_j(x_j)     = the original's state
    K = 3 iterations           every stage is exact by then     = the original's state

The last two add and subtract whole states, which rounds. An error above the tolerance counts only
if rounding does not explain it (`_Runner.noise`) and if it remains in float64
(`pnn_compile.evaluate.rounding`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from passes.capture.ladder import capture
from passes.coarse.family import copies_blocks
from passes.coarse.spec import CoarseOptions, CoarseSpec
from passes.coarse.wrappers import ExactOptions
from passes.errors import VerificationError
from passes.ir.example_inputs import ExampleInputs, bind
from passes.ir.isolation import DispatchMode, rare_collection, seeded
from passes.ir.program import Program
from passes.ir.run_step import (
    TOLERANCE,
    StepResult,
    compare,
    difference,
    relative_error,
    run_one_step,
)
from passes.options import Options
from passes.plan.schema import Plan, Stage
from passes.transform.assemble import assemble, sequential
from passes.transform.original_weights import weights_by_name
from passes.transform.synthesize import synthesize
from pnn_compile.compiled import compile_program
from pnn_compile.evaluate.rounding import in_double, rounding_hook, scaled_operators

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_SLACK = 100.0
"""Factor on the tolerance of `passes.ir.run_step` where whole states are added and subtracted."""

_DRAWS = 3
"""Runs with random rounding errors, whose largest change is the noise of an output."""


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: The two sides of the comparison.
        error: Largest difference over the largest magnitude; None where nothing is measured.
        limit: Largest error that counts as equal.
        reason: Why it failed; "" if it passed.
        seconds: Wall time of the check.
    """

    name: str
    error: float | None
    limit: float | None
    reason: str
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the check passed."""
        return not self.reason


@dataclass(frozen=True)
class VerifyReport:
    """Results of all checks."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def verify(compiled: Compiled, *, strict: bool = False) -> VerifyReport:
    """Run every check on a compiled network.

    - The stages in sequence equal the program, in training mode (outputs, gradients, buffers after
      the step) and in evaluation mode.
    - The network with the fine stages as coarse propagators, and the network of K = N iterations,
      equal it in evaluation mode.
    - A linear network of as many stages satisfies the paper's consistency theorem.
    - The network itself runs forward and backward; its outputs are finite and have the shapes of
      the original's.
    - The checkpoint keys map one to one.

    Args:
        compiled: The network.
        strict: Whether to raise if a check fails.

    Returns:
        The results, in the order above.

    Raises:
        VerificationError: A check failed, under `strict`.
    """
    subject = _Subject(dataclasses.replace(compiled, program=compiled.current_program()))
    with rare_collection():
        checks = tuple(_timed(subject, check) for check in _CHECKS)
    report = VerifyReport(checks)
    if strict and not report.ok:
        failed = [f"{check.name}: {check.reason}" for check in checks if not check.passed]
        raise VerificationError(f"{compiled.plan.model} failed verification: {'; '.join(failed)}")
    return report


@dataclass(frozen=True)
class _Subject:
    """What is verified, with the runs of the original that several checks compare with.

    Attributes:
        compiled: The network; its program holds the weights of now.
    """

    compiled: Compiled

    @cached_property
    def runner(self) -> _Runner:
        """What runs networks on the example inputs."""
        return _Runner(self.compiled.program)

    @cached_property
    def evaluation(self) -> StepResult:
        """The original in evaluation mode."""
        return self.runner.run(self.compiled.program.module, train=False, grad=False)

    @cached_property
    def training(self) -> StepResult:
        """The original in training mode, with gradients.

        Raises:
            RuntimeError: It cannot run so on its example inputs; capture has warned of that.
            ValueError: The same.
        """
        return self.runner.run(self.compiled.program.module, train=True, grad=True)

    @cached_property
    def sequence(self) -> StepResult:
        """The outputs of the stages in sequence, and their last state, in evaluation mode."""
        sequential = self.compiled.sequential
        return self.runner.run_with_states(sequential, sequential)

    @cached_property
    def states(self) -> StepResult:
        """The original's outputs, and the last state of its stages."""
        outputs = self.evaluation.outputs
        last = self.sequence.outputs[len(outputs) :]
        return dataclasses.replace(self.evaluation, outputs=[*outputs, *last])


_CheckFunction = Callable[[_Subject], Check]


def _timed(subject: _Subject, check: _CheckFunction) -> Check:
    start = time.perf_counter()
    result = check(subject)
    return dataclasses.replace(result, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class _Runner:
    """Run networks that share the parameters of a program, on its example inputs.

    Attributes:
        program: The program.
    """

    program: Program

    @cached_property
    def inputs(self) -> ExampleInputs:
        """The example inputs."""
        return bind(self.program.module, (), dict(self.program.args))

    def run(self, network: nn.Module, *, train: bool, grad: bool) -> StepResult:
        """Run a network."""
        return self._step(
            network, lambda inputs: _run_graph(network, inputs), train=train, grad=grad
        )

    def run_with_states(self, network: fx.GraphModule, outputs: nn.Module) -> StepResult:
        """Run in evaluation mode; return the output of `outputs` and the inputs of the head."""

        def forward(inputs: dict[str, Any]) -> Any:
            states: list[Any] = []
            head = network.get_submodule("head")
            hook = head.register_forward_pre_hook(lambda _, arguments: states.extend(arguments))
            with hook:
                output = _run_graph(network, inputs)
            if outputs is not network:
                output = _run_graph(outputs, inputs)
            return output, states

        return self._step(network, forward, train=False, grad=False)

    def _step(
        self, network: nn.Module, forward: Callable[[dict[str, Any]], Any], **options: bool
    ) -> StepResult:
        module = self.program.module
        return run_one_step(
            module, lambda call: forward(call.tensor_arguments()), self.inputs,
            others=() if network is module else (network,), **options,
        )  # fmt: skip

    def noise(self, chain: fx.GraphModule) -> list[float]:
        """Measure how far outputs and last state move if every state is rounded once more.

        It is the scale of errors in networks that add and subtract whole states: an output that is
        a small difference of large numbers (the sum over a normalized axis) has no digits of its
        own, and stages amplify a rounding error. A wrong edge, sign or weight moves the states by
        far more.

        Returns:
            The tolerated change of every output and state tensor, relative.
        """
        reference = self.run_with_states(chain, chain)
        largest = [0.0] * len(reference.outputs)
        round_again = rounding_hook(torch.Generator().manual_seed(0))
        for _ in range(_DRAWS):
            with ExitStack() as hooks:
                for name, child in chain.named_children():
                    if name.startswith("fine_"):
                        hooks.enter_context(child.register_forward_hook(round_again))
                rounded = self.run_with_states(chain, chain)
            for index, pair in enumerate(zip(rounded.outputs, reference.outputs, strict=True)):
                change = difference(*pair)
                largest[index] = max(largest[index], change if math.isfinite(change) else 0.0)
        return [_SLACK * change for change in largest]


def _run_graph(network: nn.Module, inputs: dict[str, Any]) -> Any:
    """Run the graph of a network, in a mode that is not the model's too."""
    return nn.Module.__call__(network, **inputs)


def _compare_stages(
    subject: _Subject, name: str, result: StepResult, original: StepResult
) -> Check:
    """Compare a run of the stages in sequence with one of the original."""
    limit = _tolerance(subject.compiled.plan, original)
    reason = compare(result, original, 1.0, limit)
    return Check(name, _error(result, original), limit, reason)


def _error(result: StepResult, original: StepResult, noise: Sequence[float] = ()) -> float:
    """Return the largest relative error of an output, except errors that rounding explains."""
    noise = noise or [-1.0] * len(original.outputs)
    errors = [
        relative_error(a, b)
        for a, b, explained in zip(result.outputs, original.outputs, noise, strict=True)
        if isinstance(a, torch.Tensor) and difference(a, b) > explained
    ]
    return max(errors, default=0.0)


def _stages_train(subject: _Subject) -> Check:
    name = "stages in sequence = original, training (outputs, gradients, buffers)"
    try:
        original = subject.training
    except (RuntimeError, ValueError) as error:
        return Check(f"{name} (not run: {error})", None, None, "")
    result = subject.runner.run(subject.compiled.sequential, train=True, grad=True)
    return _compare_stages(subject, name, result, original)


def _stages_eval(subject: _Subject) -> Check:
    name = "stages in sequence = original, evaluation"
    original = subject.evaluation
    outputs = subject.sequence.outputs[: len(original.outputs)]
    return _compare_stages(
        subject, name, dataclasses.replace(subject.sequence, outputs=outputs), original
    )


def _exact_coarse(subject: _Subject) -> Check:
    def exact(stage: Stage) -> CoarseSpec:
        return CoarseSpec("exact", ExactOptions(inputs=stage.inputs), 0, 0, linear=False)

    plan = dataclasses.replace(_with_coarse(subject.compiled.plan, exact), iterations=1)
    return _exact_network(subject, "coarse = fine, difference form = original, evaluation", plan)


def _all_iterations(subject: _Subject) -> Check:
    compiled = subject.compiled

    def any_other(stage: Stage) -> CoarseSpec:
        """Leave the propagator, or take a map if it leads to the last state, not the next."""
        assert stage.coarse is not None
        to_last = compiled.plan.sweep == "collapsed" and copies_blocks(stage.coarse.family)
        return CoarseSpec("linear", CoarseOptions(), 0, 0, linear=True) if to_last else stage.coarse

    count = compiled.plan.devices
    plan = dataclasses.replace(_with_coarse(compiled.plan, any_other), iterations=count)
    name = f"K = N = {count} iterations, every stage every time = original, evaluation"
    return _exact_network(subject, name, plan, reuse=False)


def _with_coarse(plan: Plan, choose: Callable[[Stage], CoarseSpec]) -> Plan:
    """Return the plan of a chain in difference form with other coarse propagators."""
    stages = tuple(
        dataclasses.replace(stage, coarse=choose(stage)) if stage.coarse else stage
        for stage in plan.stages
    )
    return dataclasses.replace(plan, stages=stages, correction="difference", sweep="chain")


def _exact_network(subject: _Subject, name: str, plan: Plan, *, reuse: bool = True) -> Check:
    """Assemble the network of a plan that makes it exact, and compare it with the original."""
    compiled = subject.compiled
    # These networks compute stages several times, which such models do not allow; see make_plan.
    if subject.evaluation.changed:
        return Check(f"{name} (not run: every call changes buffers)", None, None, "")
    if subject.evaluation.drew_random:
        return Check(f"{name} (not run: every call draws random numbers)", None, None, "")
    operators = synthesize(compiled.program, plan, compiled.stages)
    if compiled.conversion is not None:
        for operator in (*operators.preprocess.values(), *operators.coarse.values()):
            operator.to(compiled.conversion[1])
    network = assemble(compiled.program, plan, compiled.stages, operators, reuse=reuse)
    check = _compare_states(subject, network, name)
    return check if check.passed else _repeat_in_float64(compiled, check, plan, reuse)


def _compare_states(subject: _Subject, network: fx.GraphModule, name: str) -> Check:
    """Compare the outputs of a network, and the state that its head reads, with the original's."""
    compiled, original = subject.compiled, subject.states
    result = subject.runner.run_with_states(network, network)
    limit = _tolerance(compiled.plan, original) * _SLACK
    noise: list[float] = []
    if compare(result, original, _SLACK, limit):
        noise = subject.runner.noise(compiled.sequential)
    reason = compare(result, original, _SLACK, limit, noise)
    return Check(name, _error(result, original, noise), limit, reason)


def _tolerance(plan: Plan, original: StepResult) -> float:
    """Return the tolerance of the lowest precision among states and outputs."""
    types = {getattr(torch, v.spec.dtype) for i in plan.interfaces for v in i.state}
    types |= {value.dtype for value in original.outputs if isinstance(value, torch.Tensor)}
    return max(TOLERANCE.get(dtype, 0.0) for dtype in types)


def _repeat_in_float64(compiled: Compiled, failed: Check, plan: Plan, reuse: bool) -> Check:
    """Repeat a failed check in float64 with guesses of the states' magnitude.

    Returns:
        A check that passes if this one does; else the failed one, with both reasons.
    """
    try:
        program, stages = in_double(compiled.program, compiled.stages)
        chain = sequential(program, plan, stages)
        operators = synthesize(program, plan, stages)
        for operator in (*operators.preprocess.values(), *operators.coarse.values()):
            operator.double()
        operators = scaled_operators(program, plan, operators)
        network = assemble(program, plan, stages, operators, reuse=reuse)
        runner = _Runner(program)
        original = runner.run_with_states(chain, program.module)
        result = runner.run_with_states(network, network)
        noise = runner.noise(chain)
    except (RuntimeError, TypeError) as error:  # an opaque module may support one precision only
        return dataclasses.replace(failed, reason=f"{failed.reason}; not in float64: {error}")
    limit = TOLERANCE[torch.float64] * _SLACK
    if reason := compare(result, original, _SLACK, noise=noise):
        return dataclasses.replace(failed, reason=f"{failed.reason}; in float64, {reason}")
    name = f"{failed.name} (in float64, guesses of the states' magnitude; else {failed.reason})"
    largest = _error(result, original, noise)
    return dataclasses.replace(failed, name=name, error=largest, limit=limit, reason="")


def _consistency(subject: _Subject) -> Check:
    count = len(subject.compiled.plan.stages)
    name = f"linear network, residual form, F = g, N = {count} = original (consistency theorem)"
    with seeded(0), torch.device("cpu"):
        layers = [nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(2 * count + 1)]
        for layer in layers:  # else states shrink from stage to stage until only rounding remains
            nn.init.orthogonal_(layer.weight)
        x = torch.randn(4, 8, dtype=torch.float64)
    network = nn.Sequential(*layers)
    program = capture(network, (x,))
    options = Options(stages=count, coarse="exact", correction="residual")
    module = compile_program(program, options).module
    with torch.no_grad():
        error = relative_error(module(x), network(x))
    limit = TOLERANCE[torch.float64] * _SLACK
    reason = "" if error <= limit else f"relative error {error:.1e} (limit {limit:.0e})"
    return Check(name, error, limit, reason)


def _network_runs(subject: _Subject) -> Check:
    """Check that the network runs forward and backward, with plausible values."""
    compiled = subject.compiled
    name = "the network runs, forward and backward: shapes of the original, finite values"
    reasons = []
    for train in (False, True):
        try:
            original = subject.training if train else subject.evaluation
        except (RuntimeError, ValueError):
            continue  # capture has warned that the model cannot run in this mode on its example
        try:
            with _DataShapes() as shapes:
                result = subject.runner.run(compiled.module, train=train, grad=train)
        except Exception as error:
            reasons.append(f"it fails: {error}")
            continue
        reasons += _implausible(result, original, free=shapes.seen)
    return Check(name, None, None, "; ".join(dict.fromkeys(reasons)), 0.0)


def _implausible(result: StepResult, original: StepResult, *, free: bool) -> list[str]:
    """List reasons why outputs or gradients are implausible: other shapes, values not finite."""
    reasons = []
    for value, model in zip(result.outputs, original.outputs, strict=True):
        if not isinstance(model, torch.Tensor):
            continue
        alike = value.dtype == model.dtype and value.dim() == model.dim()
        if not alike or (value.shape != model.shape and not free):
            reasons.append(f"an output is {list(value.shape)}, the original's {list(model.shape)}")
        elif model.is_meta:
            continue  # it has no values
        elif bool(torch.isfinite(model).all()) and not bool(torch.isfinite(value).all()):
            reasons.append("an output is not finite")
    if _finite(original.gradients) and not _finite(result.gradients):
        reasons.append("a gradient is not finite")
    return reasons


def _finite(gradients: Mapping[str, torch.Tensor | None]) -> bool:
    values = [g for g in gradients.values() if g is not None and not g.is_meta]
    return all(bool(torch.isfinite(value).all()) for value in values)


class _DataShapes(DispatchMode):
    """Observe whether an operator has a result whose shape depends on values, as `nonzero` has."""

    seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= torch.Tag.dynamic_output_shape in func.tags
        return func(*args, **(kwargs or {}))


def _keys(subject: _Subject) -> Check:
    compiled = subject.compiled
    name = "checkpoint keys of the stages = keys of the original, one to one"
    original = {*compiled.program.module.state_dict(), *compiled.program.unused}
    mapped = set(weights_by_name(compiled.program, compiled.stages))
    prefixes = ("fine_", "preprocess_", "coarse_", "head.")
    stray = [key for key in compiled.module.state_dict() if not key.startswith(prefixes)]
    wrong = sorted(original ^ mapped) + stray
    reason = f"{len(wrong)} keys differ ({', '.join(wrong[:3])})" if wrong else ""
    return Check(name, None, None, reason)


_CHECKS: tuple[_CheckFunction, ...] = (
    _stages_train,
    _stages_eval,
    _exact_coarse,
    _all_iterations,
    _consistency,
    _network_runs,
    _keys,
)
