"""Calibration as a sweep: fit every operator on what really reaches it, then pass its result on.

One iteration of `passes.transform.sweep` is done on all calibration batches, step by step; before
a PREPROCESS or a COARSE step is done, its operator is fitted by regression. Beside the states of
the sweep run the true states s_j, which the original network has after its stages. Two stages:

    y_0 <- fine_0()
    u_0 <- correct_0(y_0)           s_0 = u_0: the first stage reads the inputs alone
    x_1 <- preprocess_1()           fitted first: from the inputs to s_0
    y_1 <- fine_1(x_1)              s_1 = g_1(s_0) beside it
    r_1 <- residual_1(u_0, x_1)
    u_1 <- correct_1(u_0, y_1)      without its correction as yet
    c_1 <- coarse_1(r_1, x_1)       fitted first: from r_1 to s_1 - u_1; then u_1 <- u_1 + c_1

A chain goes on so, stage by stage. In a collapsed sweep every c_j moves the last state: they follow
after all stages, from the last one to the first, each fitted to what those before it leave of
s_{N-1} - u_{N-1}.

States are stored batch by batch, in a quarter of the free memory of a GPU or else in a temporary
folder; a chain keeps those around one stage only. No sample is kept for a regression.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.coarse.family import copies_blocks
from passes.errors import OptionError, why
from passes.transform.executor import Executor, Operator, State, plus
from passes.transform.sweep import Role, Step, Symbol, sweep
from pnn_compile.fit.candidates import (
    Sample,
    fit_best,
    fit_networks,
    keep_if_better,
    measure_statistics,
    state_tensors,
)
from pnn_compile.inputs import device_of

Batches = Callable[[], Iterable[tuple[bool, dict[str, Any]]]]
"""Iterates over the calibration batches: whether each is held out, and its inputs by name."""

_FITTED = (Role.PREPROCESS, Role.COARSE)


class Candidates(Protocol):
    """The operators that calibration may choose from."""

    def preprocess(self, number: int) -> Sequence[Operator]:
        """Return preprocessing operators of a stage."""

    def coarse(self, number: int) -> Sequence[Operator]:
        """Return coarse propagators of a stage."""


class CurrentOperators:
    """The operators that a network has: one candidate for every place.

    Args:
        executor: Of the network.
    """

    def __init__(self, executor: Executor) -> None:
        self._preprocess = dict(executor.guesses)
        self._coarse = dict(executor.corrections)

    def preprocess(self, number: int) -> Sequence[Operator]:
        """Return the preprocessing operator of the stage."""
        return [self._preprocess[number]]

    def coarse(self, number: int) -> Sequence[Operator]:
        """Return the coarse propagator of the stage."""
        return [self._coarse[number]]


def fit_closed_form(
    executor: Executor, batches: Batches, candidates: Candidates, *, keep_better: bool = False
) -> tuple[str, ...]:
    """Fit the candidates for every place, and leave the best ones in the executor.

    All networks must be in evaluation mode.

    Args:
        executor: Of the network.
        batches: The calibration batches.
        candidates: The operators to choose from.
        keep_better: Whether an operator keeps its weights where the closed form would not lower
            its error on held-out samples.

    Returns:
        Names of the operators whose BatchNorm statistics were measured anew, which is done where
        it lowers the error.
    """
    if executor.plan.predicts:
        return ()  # coarse steps of a loop have no weights of their own
    with tempfile.TemporaryDirectory(prefix="pnn-calibrate-") as folder:
        store = _StateStore(Path(folder), _memory_limit(device_of(executor.stages.head)))
        fitting = _RegressionSweep(executor, batches, store, keep_better=keep_better)
        fitting.run(candidates)
    return tuple(fitting.recalibrated)


def fitting_order(stages: int, kind: str, windows: int = 1) -> tuple[Step, ...]:
    """Order the steps of one iteration such that every operator is fitted on what reaches it.

    CORRECT steps read no correction: COARSE steps, which follow, add theirs.

    Args:
        stages: Number of stages.
        kind: "chain" or "collapsed".
        windows: Number of windows.

    >>> print(*fitting_order(3, "collapsed")[-3:], sep="; ")
    u_2 <- correct_2(u_1, y_2); c_2 <- coarse_2(r_2, x_2); c_1 <- coarse_1(r_1, x_1)
    """
    within_stage = (Role.PREPROCESS, Role.FINE, Role.RESIDUAL, Role.CORRECT, Role.COARSE)

    def position(step: Step) -> tuple[bool, int, int]:
        after_all_stages = kind == "collapsed" and step.role is Role.COARSE
        stage = -step.stage if after_all_stages else step.stage
        return after_all_stages, stage, within_stage.index(step.role)

    steps = (
        replace(step, reads=tuple(symbol for symbol in step.reads if symbol.letter != "c"))
        for step in sweep(stages, kind, windows=windows)
        if step.role is not Role.HEAD
    )
    return tuple(sorted(steps, key=position))


class _RegressionSweep:
    """Does the steps of a sweep on all batches, and fits the operators when their turn comes."""

    def __init__(
        self, executor: Executor, batches: Batches, store: _StateStore, *, keep_better: bool
    ) -> None:
        self.keep_better = keep_better
        self.executor = executor
        self.batches = batches
        self.store = store
        self.recalibrated: list[str] = []

    def run(self, candidates: Candidates) -> None:
        plan = self.executor.plan
        # One pass over the batches does all steps up to the next operator that is to be fitted.
        order = fitting_order(len(plan.stages), plan.sweep, plan.windows)
        first, *later = _split_before(order, _FITTED)
        for index, (_, inputs) in enumerate(self.batches()):
            *_, (_, state) = self.executor.run(first, inputs)
            self.store.put("s", index, state)
            self.store.put("u", index, state)
        for steps in later:
            if steps[0].role is Role.PREPROCESS:
                self._fit_preprocess(steps[0], candidates)
            else:
                self._fit_coarse(steps[0], candidates)
            for index, (_, inputs) in enumerate(self.batches()):
                self._compute(steps, index, inputs)

    def _compute(self, steps: Sequence[Step], index: int, inputs: Mapping[str, Any]) -> None:
        """Do steps on one batch, from stored states to stored states."""
        executor, store = self.executor, self.store
        states: dict[Symbol, State] = {}
        for step in steps:
            reads = [
                states[symbol] if symbol in states else store.get(self._key(symbol), index)
                for symbol in step.reads
            ]
            state = states[step.writes] = executor.compute(step, reads, inputs)
            if step.role is Role.FINE:
                before = store.get("s", index)
                produced = executor.fine(step.stage, before, inputs)
                store.put("s", index, executor.advance(step.stage, before, produced))
            elif step.role is Role.COARSE:
                corrected = self._key(Symbol("u", step.stage))
                store.put(corrected, index, plus(store.get(corrected, index), state))
            else:
                store.put(self._key(step.writes), index, state)

    def _key(self, symbol: Symbol) -> str:
        """Return where a state is stored, which overwrites the one of the stage before.

        A collapsed sweep reads all guesses and residuals at its end, and the guesses of a window
        the state before it.
        """
        plan = self.executor.plan
        to_the_end = plan.sweep == "collapsed" and symbol.letter in "xr"
        before_window = symbol.letter == "u" and plan.opens_window(symbol.stage + 1)
        return str(symbol) if to_the_end or before_window else symbol.letter

    def _fit_preprocess(self, step: Step, candidates: Candidates) -> None:
        executor, number = self.executor, step.stage
        names = executor.plan.stages[number].consumes

        def samples(operator: Operator) -> Iterator[Sample]:
            for index, (held_out, inputs) in enumerate(self.batches()):
                true = self.store.get("s", index)
                before = self.store.get(self._key(step.reads[0]), index) if step.reads else {}
                arguments = _arguments(executor, operator, inputs, before)
                state = [true[name] for name in names]
                yield Sample(held_out, arguments, state, arguments, state)

        pairs = [(one, one.network.operator) for one in candidates.preprocess(number)]
        best, recalibrated = fit_best(pairs, samples, keep_better=self.keep_better)
        if copies_blocks(best.spec.family):
            recalibrated |= self._recalibrate_prologue(best, lambda: samples(best))
        if recalibrated:
            self.recalibrated.append(f"preprocess_{number}")
        executor.guesses[number] = best

    def _recalibrate_prologue(
        self, operator: Operator, samples: Callable[[], Iterator[Sample]]
    ) -> bool:
        """Measure the BatchNorm statistics of copied first layers, if that lowers the error.

        Thinned, their blocks meet other states than in the original. The map after them is solved
        for either statistics.
        """
        prologue, network = operator.network.prologue, operator.network.operator
        assert isinstance(prologue, nn.Module)
        assert isinstance(network, nn.Module)
        if not any(isinstance(module, _BatchNorm) for module in prologue.modules()):
            return False
        reads = operator.spec.options.inputs

        def refit() -> None:
            calls = (
                tuple(self.executor.given(reads, inputs))
                for held_out, inputs in self.batches()
                if not held_out
            )
            measure_statistics(prologue, calls)
            fit_networks([network], samples)

        [better] = keep_if_better([network], samples, refit, restored=[operator.network])
        return better

    def _fit_coarse(self, step: Step, candidates: Candidates) -> None:
        executor, store, number = self.executor, self.store, step.stage
        names = [value.name for value in executor.plan.corrects(number)]
        residual_key, guess_key = map(self._key, step.reads)
        reached = self._key(Symbol("u", number))

        def samples(operator: Operator) -> Iterator[Sample]:
            executor.corrections[number] = operator
            for index, (held_out, inputs) in enumerate(self.batches()):
                residual = [*store.get(residual_key, index).values()]
                guess = store.get(guess_key, index)
                true, uncorrected = store.get("s", index), store.get(reached, index)
                arguments = executor.correction_arguments(number, guess, residual, inputs)
                error = [true[name] - uncorrected[name] for name in names]
                yield Sample(held_out, residual, error, arguments, [true[name] for name in names])

        pairs = [(one, one.network) for one in candidates.coarse(number)]
        best, recalibrated = fit_best(pairs, samples, keep_better=self.keep_better)
        if recalibrated:
            self.recalibrated.append(f"coarse_{number}")
        executor.corrections[number] = best


def _arguments(
    executor: Executor, operator: Operator, inputs: Mapping[str, Any], before: State
) -> list[Any]:
    """Return what the fitted part of a preprocessing operator reads, after its prologue."""
    arguments = executor.guess_arguments(operator, inputs, before)
    prologue = operator.network.prologue
    if not isinstance(prologue, nn.Module):
        return arguments
    return [*state_tensors(prologue(*arguments))]


def _split_before(steps: Iterable[Step], roles: Sequence[Role]) -> list[list[Step]]:
    """Split a list of steps before every step of these roles."""
    groups: list[list[Step]] = [[]]
    for step in steps:
        if step.role in roles:
            groups.append([])
        groups[-1].append(step)
    return groups


class _StateStore:
    """States of the calibration batches: in memory up to a limit, the others on disk.

    Args:
        folder: Directory of the others.
        limit: Bytes that may stay in memory.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._free = limit
        self._in_memory: dict[str, State] = {}

    def put(self, key: str, batch: int, state: State) -> None:
        name = f"{key}-{batch}"
        self._free += _bytes(self._in_memory.pop(name, {}))
        if _bytes(state) <= self._free:
            self._free -= _bytes(state)
            self._in_memory[name] = _copied(state)
        else:
            try:
                torch.save(state, self._folder / f"{name}.pt")
            except (OSError, RuntimeError) as error:  # torch raises the second on a full disk
                raise OptionError(
                    f"the states of the samples cannot be kept in {self._folder} ({why(error)}): "
                    "make room there, set TMPDIR to another directory, or give fewer samples"
                ) from error

    def get(self, key: str, batch: int) -> State:
        name = f"{key}-{batch}"
        if name in self._in_memory:
            return _copied(self._in_memory[name])  # a stage may write into what it reads
        state: State = torch.load(self._folder / f"{name}.pt", weights_only=True)
        return state


def _bytes(state: State) -> int:
    return sum(value.nbytes for value in state.values())


def _copied(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _memory_limit(device: torch.device) -> int:
    """Return a quarter of the free memory of a GPU; 0 on a CPU, whose disk is cached anyway."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free // 4
