"""The oracles: what must hold of every compiled network, whatever its weights are.

None of them says anything about accuracy with K = 1: they say that the compiler cut, wired and
assembled the right network.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from passes.capture.ladder import capture
from passes.coarse.spec import CoarseSpec
from passes.coarse.wrappers import ExactOptions
from passes.errors import VerificationError
from passes.ir.example_inputs import bind
from passes.ir.isolation import preserved, seeded
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
from passes.pipeline import COMPILE, Compilation, run_passes
from passes.plan.schema import Plan
from passes.transform.assemble import assemble, sequential
from passes.transform.synthesize import synthesize
from pnn_compile.evaluate.rounding import even_operators, in_double

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["Check", "VerifyReport", "verify"]

_SLACK = 100.0
"""Times the tolerance of `passes.ir.run_step` for checks that add and subtract whole states."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What was compared with what.
        error: Largest difference over the largest magnitude; None where nothing is measured.
        limit: Largest error that counts as equal.
        reason: Why it failed; "" if it passed.
        seconds: Wall seconds that it took.
    """

    name: str
    error: float | None
    limit: float | None
    reason: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the check passed."""
        return not self.reason


@dataclass(frozen=True)
class VerifyReport:
    """What the checks found."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def verify(compiled: Compiled, *, strict: bool = False) -> VerifyReport:
    """Run every oracle on a compiled network.

    The stages one after another must equal the program in training mode (outputs, gradients,
    buffers after the step) and in evaluation mode; the network with the fine stages as coarse
    propagators, and the network with K = N iterations, must equal it in evaluation mode; a linear
    network cut into as many stages must satisfy the paper's consistency theorem; the network
    itself must run both ways and give finite values of the original's shapes; and the checkpoint
    keys must map one to one.

    Args:
        compiled: The network.
        strict: Whether to raise if a check fails.

    Raises:
        VerificationError: A check failed, under `strict`.
    """
    compiled = dataclasses.replace(compiled, program=compiled.current_program())
    checks = tuple(_timed(compiled, check) for check in _CHECKS)
    report = VerifyReport(checks)
    if strict and not report.ok:
        failed = [f"{check.name}: {check.reason}" for check in checks if not check.passed]
        raise VerificationError(f"{compiled.plan.model} failed verification: {'; '.join(failed)}")
    return report


_Oracle = Callable[["Compiled"], Check]


def _timed(compiled: Compiled, check: _Oracle) -> Check:
    start = time.perf_counter()
    result = check(compiled)
    return dataclasses.replace(result, seconds=time.perf_counter() - start)


def _run(compiled: Compiled, network: nn.Module, *, train: bool, grad: bool) -> StepResult:
    """Run a network that shares the program's parameters, on the example inputs."""
    return _run_by(compiled.program, lambda inputs: network(**inputs), train=train, grad=grad)


def _run_by(
    program: Program, forward: Callable[[dict[str, Any]], Any], *, train: bool, grad: bool
) -> StepResult:
    arguments = bind(program.module, (), dict(program.args))
    return run_one_step(
        program.module, lambda call: forward(call.tensor_arguments()), arguments,
        train=train, grad=grad,
    )  # fmt: skip


def _run_with_states(program: Program, network: fx.GraphModule, outputs: nn.Module) -> StepResult:
    """Run in evaluation mode: the outputs of one network, and what reaches the head of another."""

    def forward(inputs: dict[str, Any]) -> Any:
        states: list[Any] = []
        head = network.get_submodule("head")
        hook = head.register_forward_pre_hook(lambda _, given: states.extend(given))
        with hook:
            output = network(**inputs)
        if outputs is not network:
            output = outputs(**inputs)
        return output, states

    with preserved(network):
        network.eval()
        return _run_by(program, forward, train=False, grad=False)


def _noise(program: Program, chain: fx.GraphModule) -> list[float]:
    """How much the outputs and the last state move where every state is rounded once more.

    The scale of a comparison of networks that add and subtract whole states: an output that is a
    small difference of large numbers (the sum over a normalised axis) has no digits of its own,
    and what stages do to a rounding error grows with their number. A wrong edge, sign or weight
    moves the states by far more.
    """
    still = _run_with_states(program, chain, chain)
    moved = [0.0] * len(still.outputs)
    generator = torch.Generator().manual_seed(0)

    def round_again(*call: Any) -> Any:
        return tree_map(partial(_rounded, generator=generator), call[2])

    for _ in range(_DRAWS):
        with ExitStack() as hooks:
            for name, child in chain.named_children():
                if name.startswith("fine_"):
                    hooks.enter_context(child.register_forward_hook(round_again))
            again = _run_with_states(program, chain, chain)
        for index, pair in enumerate(zip(again.outputs, still.outputs, strict=True)):
            change = difference(*pair)
            moved[index] = max(moved[index], change if math.isfinite(change) else 0.0)
    return [_SLACK * most for most in moved]


_DRAWS = 3


def _rounded(value: Any, generator: torch.Generator) -> Any:
    """A tensor with a random error of the size of its rounding."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return value
    size = torch.finfo(value.dtype).eps * value.abs().max()
    error = 2 * torch.rand(value.shape, generator=generator) - 1
    return value + size * error.to(value)


def _held_against(
    compiled: Compiled, name: str, network: nn.Module, *, train: bool, grad: bool, slack: float
) -> Check:
    try:
        wanted = _run(compiled, compiled.program.module, train=train, grad=grad)
    except (RuntimeError, ValueError) as error:
        if not train:
            raise
        # Capture has said already that the model cannot run in training mode on this example.
        return Check(f"{name} (not run: {error})", None, None, "", 0.0)
    with preserved(network):
        network.train(train)
        got = _run(compiled, network, train=train, grad=grad)
    limit = _loosest(compiled.plan, wanted) * slack
    return Check(name, _error(got, wanted), limit, compare(got, wanted, slack, limit), 0.0)


def _error(got: StepResult, wanted: StepResult, noise: Sequence[float] = ()) -> float:
    """The largest relative error of an output, those left out that rounding explains."""
    triples = zip(got.outputs, wanted.outputs, noise or [-1.0] * len(wanted.outputs), strict=True)
    errors = [
        relative_error(a, b)
        for a, b, explained in triples
        if isinstance(a, torch.Tensor) and difference(a, b) > explained
    ]
    return max(errors, default=0.0)


def _stages_train(compiled: Compiled) -> Check:
    name = "stages in sequence = original, training (outputs, gradients, buffers)"
    return _held_against(compiled, name, compiled.sequential, train=True, grad=True, slack=1.0)


def _stages_eval(compiled: Compiled) -> Check:
    name = "stages in sequence = original, evaluation"
    return _held_against(compiled, name, compiled.sequential, train=False, grad=False, slack=1.0)


def _exact_coarse(compiled: Compiled) -> Check:
    plan = compiled.plan
    stages = tuple(
        dataclasses.replace(
            stage,
            coarse=CoarseSpec("exact", ExactOptions(inputs=stage.inputs), 0, 0, linear=False),
        )
        if stage.coarse
        else stage
        for stage in plan.stages
    )
    oracle = dataclasses.replace(
        plan, stages=stages, correction="difference", sweep="chain", iterations=1
    )
    return _oracle(compiled, "coarse = fine, difference form = original, evaluation", oracle)


def _all_iterations(compiled: Compiled) -> Check:
    count = len(compiled.plan.stages)
    oracle = dataclasses.replace(
        compiled.plan, correction="difference", sweep="chain", iterations=count
    )
    name = f"K = N = {count} iterations, every stage every time = original, evaluation"
    return _oracle(compiled, name, oracle, reuse=False)


def _oracle(compiled: Compiled, name: str, plan: Plan, *, reuse: bool = True) -> Check:
    once = _run(compiled, compiled.program.module, train=False, grad=False)
    # These networks compute stages again, which such models do not allow; see make_plan.
    if once.changed:
        return Check(f"{name} (not run: every call changes buffers)", None, None, "", 0.0)
    if _draws(compiled.program):
        return Check(f"{name} (not run: every call draws random numbers)", None, None, "", 0.0)
    operators = synthesize(compiled.program, plan, compiled.stages)
    if compiled.conversion is not None:
        for made in (*operators.preprocess.values(), *operators.coarse.values()):
            made.to(compiled.conversion[1])
    network = assemble(compiled.program, plan, compiled.stages, operators, reuse=reuse)
    check = _with_states(compiled.program, compiled.sequential, network, name, compiled.plan)
    return check if check.passed else _without_rounding(compiled, check, plan, reuse)


def _with_states(
    program: Program, chain: fx.GraphModule, network: fx.GraphModule, name: str, plan: Plan
) -> Check:
    """Hold the outputs of a network, and the state that reaches its head, against the original."""
    wanted = _run_with_states(program, chain, program.module)
    got = _run_with_states(program, network, network)
    limit = _loosest(plan, wanted) * _SLACK
    noise: list[float] = []
    if compare(got, wanted, _SLACK, limit):
        noise = _noise(program, chain)
    reason = compare(got, wanted, _SLACK, limit, noise)
    return Check(name, _error(got, wanted, noise), limit, reason, 0.0)


def _loosest(plan: Plan, wanted: StepResult) -> float:
    """Tolerance of the lowest precision among states and outputs."""
    types = {getattr(torch, v.spec.dtype) for i in plan.interfaces for v in i.state}
    types |= {value.dtype for value in wanted.outputs if isinstance(value, torch.Tensor)}
    return max(TOLERANCE.get(dtype, 0.0) for dtype in types)


def _draws(program: Program) -> bool:
    """Whether a program draws random numbers in evaluation mode."""
    with preserved(program.module), torch.no_grad():
        state = torch.get_rng_state()
        program.module.eval()(*program.fresh_inputs())
        return not torch.equal(state, torch.get_rng_state())


def _without_rounding(compiled: Compiled, failed: Check, plan: Plan, reuse: bool) -> Check:
    """Repeat a check where rounding is no excuse, and believe that if it passes."""
    try:
        program, stages = in_double(compiled.program, compiled.stages)
        chain = sequential(program, plan, stages)
        operators = synthesize(program, plan, stages)
        for made in (*operators.preprocess.values(), *operators.coarse.values()):
            made.double()
        operators = even_operators(program, plan, operators)
        network = assemble(program, plan, stages, operators, reuse=reuse)
        wanted = _run_with_states(program, chain, program.module)
        got = _run_with_states(program, network, network)
        noise = _noise(program, chain)
    except (RuntimeError, TypeError) as error:  # a module that is kept whole may know one precision
        return dataclasses.replace(failed, reason=f"{failed.reason}; not in float64: {error}")
    limit = TOLERANCE[torch.float64] * _SLACK
    if reason := compare(got, wanted, _SLACK, noise=noise):
        return dataclasses.replace(failed, reason=f"{failed.reason}; in float64, {reason}")
    name = f"{failed.name} (in float64, guesses of the states' magnitude; else {failed.reason})"
    largest = _error(got, wanted, noise)
    return dataclasses.replace(failed, name=name, error=largest, limit=limit, reason="")


def _consistency(compiled: Compiled) -> Check:
    count = len(compiled.plan.stages)
    name = f"linear network, residual form, F = g, N = {count} = original (consistency theorem)"
    with seeded(0):
        layers = [nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(2 * count + 1)]
        for layer in layers:  # or states shrink, stage by stage, until rounding is all there is
            nn.init.orthogonal_(layer.weight)
        x = torch.randn(4, 8, dtype=torch.float64)
    network = nn.Sequential(*layers)
    program = capture(network, (x,))
    made, _ = run_passes(
        Compilation(
            program=program, options=Options(stages=count, coarse="exact", correction="residual")
        ),
        COMPILE,
    )
    assert isinstance(made.module, fx.GraphModule)
    with torch.no_grad():
        error = relative_error(made.module(x), network(x))
    limit = TOLERANCE[torch.float64] * _SLACK
    reason = "" if error <= limit else f"relative error {error:.1e} (limit {limit:.0e})"
    return Check(name, error, limit, reason, 0.0)


def _network_runs(compiled: Compiled) -> Check:
    """The network itself: whether it runs both ways and gives what the original does."""
    name = "the network runs, forward and backward: shapes of the original, finite values"
    reasons = []
    for train in (False, True):
        try:
            wanted = _run(compiled, compiled.program.module, train=train, grad=False)
        except (RuntimeError, ValueError):
            continue  # the model cannot run in this mode on its example, as capture has said
        with preserved(compiled.module):
            compiled.module.train(train)
            try:
                got = _run(compiled, compiled.module, train=train, grad=train)
            except Exception as error:
                reasons.append(f"it fails: {error}")
                continue
        reasons += _implausible(got, wanted)
    return Check(name, None, None, "; ".join(dict.fromkeys(reasons)), 0.0)


def _implausible(got: StepResult, wanted: StepResult) -> list[str]:
    reasons = []
    for value, model in zip(got.outputs, wanted.outputs, strict=True):
        if not isinstance(model, torch.Tensor):
            continue
        if value.shape != model.shape or value.dtype != model.dtype:
            reasons.append(f"an output is {list(value.shape)}, the original's {list(model.shape)}")
        elif model.is_meta:
            continue  # no values to look at
        elif bool(torch.isfinite(model).all()) and not bool(torch.isfinite(value).all()):
            reasons.append("an output is not finite")
    gradients = [g for g in got.gradients.values() if g is not None and not g.is_meta]
    if any(not bool(torch.isfinite(gradient).all()) for gradient in gradients):
        reasons.append("a gradient is not finite")
    return reasons


def _keys(compiled: Compiled) -> Check:
    name = "checkpoint keys of the stages = keys of the original, one to one"
    wanted = {*compiled.program.module.state_dict(), *compiled.program.unused}
    found = set(compiled.original_state_dict())
    prefixes = ("fine_", "preprocess_", "coarse_", "head.")
    stray = [key for key in compiled.module.state_dict() if not key.startswith(prefixes)]
    wrong = sorted(wanted ^ found) + stray
    reason = f"{len(wrong)} keys differ ({', '.join(wrong[:3])})" if wrong else ""
    return Check(name, None, None, reason, 0.0)


_CHECKS: tuple[_Oracle, ...] = (
    _stages_train,
    _stages_eval,
    _exact_coarse,
    _all_iterations,
    _consistency,
    _network_runs,
    _keys,
)
