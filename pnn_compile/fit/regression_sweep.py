"""The sweep of calibration: fits guesses and corrections stage by stage, in closed form.

Only the states around one stage are kept at a time, batch by batch, in a quarter of the free memory
of a GPU or else in a temporary folder; of the regressions only sums of products. Where several
networks are offered for one place, all of them are fitted to the same samples, and the cheapest of
those that do best is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.coarse.batchnorm import recalibrate
from passes.coarse.family import copies_blocks, is_fine
from passes.coarse.map_matrix import MatrixFit, fitted_parts
from passes.coarse.spec import OperatorSpec, PreprocessOptions, Trial
from passes.errors import OptionError
from passes.transform.executor import Executor, Operator, State, plus
from pnn_compile.fit.metrics import Energy
from pnn_compile.inputs import device_of

__all__ = ["Batches", "Candidates", "Given", "Sample", "fit_closed_form", "fit_networks"]

_NEARLY = 1.05
"""A cheaper network is taken over the best one if its error is within this factor."""

Batches = Callable[[], Iterable[tuple[bool, dict[str, Any]]]]
"""Goes through the calibration batches: whether each is held out, and its inputs by name."""


class Candidates(Protocol):
    """What calibration may choose from."""

    def guesses(self, number: int) -> Sequence[Operator]:
        """Networks that guess the state in front of a stage."""

    def corrections(self, number: int) -> Sequence[Operator]:
        """Networks that correct what a stage gives."""


class Given:
    """The operators that a network has: one candidate for every place.

    Args:
        executor: Of the network.
    """

    def __init__(self, executor: Executor) -> None:
        self._guesses = dict(executor.guesses)
        self._corrections = dict(executor.corrections)

    def guesses(self, number: int) -> Sequence[Operator]:
        """The guess of the stage."""
        return [self._guesses[number]]

    def corrections(self, number: int) -> Sequence[Operator]:
        """The correction of the stage."""
        return [self._corrections[number]]


def fit_closed_form(
    executor: Executor, batches: Batches, candidates: Candidates, *, keep_better: bool = False
) -> tuple[str, ...]:
    """Fit what `candidates` offers for every place, and leave the best ones in the executor.

    Guesses are fitted to the state that really enters their stage. In a chain every correction is
    fitted, in the order of the sweep, on the residuals that really reach it, to the error that is
    really left behind its stage; in a collapsed sweep to what the corrections of all later stages
    leave of the error of the last state. All networks must be in evaluation mode.

    Args:
        executor: Of the network.
        batches: The calibration batches.
        candidates: What may be chosen from.
        keep_better: Whether an operator keeps its weights where the closed form would not lower
            its error on held-out samples.

    Returns:
        Names of the operators whose BatchNorm statistics were measured anew, which is done where
        it lowers the error.
    """
    with tempfile.TemporaryDirectory(prefix="pnn-calibrate-") as folder:
        room = _room(device_of(executor.stages.head))
        sweep = _Sweep(executor, batches, _Memory(Path(folder), room), keep_better=keep_better)
        sweep.run(candidates)
    return tuple(sweep.recalibrated)


class _Memory:
    """Named states of the calibration batches: in memory as long as there is room, else on disk.

    Args:
        folder: Where the others go.
        room: Bytes that may be held in memory.
    """

    def __init__(self, folder: Path, room: int) -> None:
        self._folder = folder
        self._room = room
        self._held: dict[str, State] = {}

    def put(self, kind: str, batch: int, state: State) -> None:
        key = f"{kind}-{batch}"
        self._room += _bytes(self._held.pop(key, {}))
        if _bytes(state) <= self._room:
            self._room -= _bytes(state)
            self._held[key] = _copied(state)
        else:
            torch.save(state, self._folder / f"{key}.pt")

    def get(self, kind: str, batch: int) -> State:
        key = f"{kind}-{batch}"
        if key in self._held:
            return _copied(self._held[key])  # a stage may write into what it is given
        state: State = torch.load(self._folder / f"{key}.pt", weights_only=True)
        return state


def _bytes(state: State) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _copied(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _room(device: torch.device) -> int:
    """A quarter of the memory that is free on a GPU; a CPU's disk is cached in memory already."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free // 4


@dataclass(frozen=True)
class Sample:
    """One batch of a regression.

    Attributes:
        held_out: Whether it judges instead of being fitted.
        features: The tensors that the maps read.
        wanted: What the network should give for them.
        arguments: What the network is called with.
        scale: What errors are relative to.
    """

    held_out: bool
    features: list[torch.Tensor]
    wanted: list[torch.Tensor]
    arguments: list[Any]
    scale: list[torch.Tensor]


_Samples = Callable[[], Iterator[Sample]]


class _Sweep:
    """Walks all batches from stage to stage and fits what stands on the way."""

    def __init__(
        self, executor: Executor, batches: Batches, memory: _Memory, *, keep_better: bool
    ) -> None:
        self.keep_better = keep_better
        self.executor = executor
        self.batches = batches
        self.memory = memory
        self.collapsed = executor.plan.sweep == "collapsed"
        self.recalibrated: list[str] = []

    def run(self, candidates: Candidates) -> None:
        executor, last = self.executor, len(self.executor.plan.stages)
        for index, (_, inputs) in enumerate(self.batches()):
            first = executor.advance(0, {}, executor.fine(0, {}, inputs))
            self.memory.put("true", index, first)
            self.memory.put("swept", index, first)
        for number in range(1, last):
            self._fit_guess(number, candidates.guesses(number))
            self._propagate(number)
            if not self.collapsed:
                self._fit_correction(number, candidates.corrections(number))
            self._advance(number)
        if self.collapsed:
            for number in reversed(range(1, last)):
                self._fit_correction(number, candidates.corrections(number))
                self._advance_collapsed(number)

    def _fit_guess(self, number: int, offered: Sequence[Operator]) -> None:
        names = self.executor.plan.stages[number].consumes

        def samples(guess: Operator) -> Iterator[Sample]:
            for index, (held, inputs) in enumerate(self.batches()):
                true = self.memory.get("true", index)
                given = self._sources(guess, inputs)
                state = [true[name] for name in names]
                yield Sample(held, given, state, given, state)

        name = f"preprocess_{number}"
        fitted = [(each, each.network.operator) for each in offered]
        taken = self._take(name, fitted, samples)
        if copies_blocks(taken.spec.family) and self._refresh(taken, partial(samples, taken)):
            self.recalibrated.append(name)
        self.executor.guesses[number] = taken

    def _refresh(self, guess: Operator, samples: _Samples) -> bool:
        """Measure the statistics of a thinned front, whose blocks meet other states, if it helps.

        The map behind it is solved for either statistics; whichever leave less error stay.
        """
        front, network = guess.network.prologue, guess.network.operator
        assert isinstance(front, nn.Module)
        assert isinstance(network, nn.Module)
        if not any(isinstance(module, _BatchNorm) for module in front.modules()):
            return False
        before = _state_of(guess.network)
        [known] = _errors([network], samples())
        reads = guess.spec.options.inputs
        calls = (
            tuple(self.executor.given(reads, inputs)) for held, inputs in self.batches() if not held
        )
        _measure_statistics(front, calls)
        fit_networks([network], samples)
        if _errors([network], samples()) < [known]:
            return True
        _set_state(guess.network, before)
        return False

    def _sources(self, guess: Operator, inputs: Mapping[str, Any]) -> list[Any]:
        """What the operator of a guess reads."""
        given = self.executor.given(guess.spec.options.inputs, inputs)
        prologue = guess.network.prologue
        if not isinstance(prologue, nn.Module):
            return given
        found = prologue(*given)
        return list(found) if isinstance(found, tuple) else [found]

    def _propagate(self, number: int) -> None:
        """Note what the fine stage makes of the guess and of the true state."""
        executor, memory = self.executor, self.memory
        for index, (_, inputs) in enumerate(self.batches()):
            guess = executor.guess(number, inputs)
            true = memory.get("true", index)
            swept = memory.get("swept", index)
            fine = executor.fine(number, guess, inputs)
            produced = executor.fine(number, true, inputs)
            memory.put(self._kind("guess", number), index, guess)
            memory.put(self._kind("entering", number), index, {name: swept[name] for name in guess})
            memory.put("fine", index, fine)
            memory.put("true", index, executor.advance(number, true, produced))

    def _kind(self, kind: str, number: int) -> str:
        """A collapsed sweep needs what entered every stage to the end, a chain does not."""
        return f"{kind}-{number}" if self.collapsed else kind

    def _fit_correction(self, number: int, offered: Sequence[Operator]) -> None:
        executor, memory = self.executor, self.memory
        names = executor.plan.stages[number].consumes
        wanted = [value.name for value in executor.plan.corrects(number)]
        found = "swept" if self.collapsed else "fine"

        def samples(correction: Operator) -> Iterator[Sample]:
            executor.corrections[number] = correction
            for index, (held, inputs) in enumerate(self.batches()):
                guess = memory.get(self._kind("guess", number), index)
                entering = memory.get(self._kind("entering", number), index)
                true, fine = memory.get("true", index), memory.get(found, index)
                residual = [entering[name] - guess[name] for name in names]
                arguments = executor.correction_arguments(number, guess, residual, inputs)
                left = [true[name] - fine[name] for name in wanted]
                yield Sample(held, residual, left, arguments, [true[name] for name in wanted])

        fitted = [(each, each.network) for each in offered]
        executor.corrections[number] = self._take(f"coarse_{number}", fitted, samples)

    def _take(
        self,
        name: str,
        offered: Sequence[tuple[Operator, Any]],
        samples: Callable[[Operator], Iterator[Sample]],
    ) -> Operator:
        """Fit all operators; give the cheapest of those that nearly reach the smallest error.

        Args:
            name: What the report calls the place.
            offered: The operators, each with the network in it that is fitted.
            samples: Gives the samples of an operator.
        """
        found: list[tuple[Operator, float]] = []
        changed = set[Operator]()
        for group in _by_rank(offered):
            operators, networks = zip(*group, strict=True)
            given = partial(samples, operators[0])
            known = _errors(networks, given()) if self.keep_better else []
            before = [_state_of(network) for network in networks] if self.keep_better else []
            fit_networks(networks, given)
            if self.keep_better:
                reached = _errors(networks, given())
                for network, old, a, b in zip(networks, before, known, reached, strict=True):
                    if b >= a:
                        _set_state(network, old)
            for operator, network in group:
                if not is_fine(operator.spec.family) and _recalibrate(network, given):
                    changed.add(operator)
            if len(offered) > 1:
                found += zip(operators, _errors(networks, given()), strict=True)
        taken, why = _cheapest(found) if found else (offered[0][0], None)
        if taken in changed:
            self.recalibrated.append(name)
        return replace(taken, spec=why) if why else taken

    def _advance(self, number: int) -> None:
        """Carry the swept state behind a stage: corrected in a chain, else as the stage gave it."""
        executor, memory = self.executor, self.memory
        for index, (_, inputs) in enumerate(self.batches()):
            swept, fine = memory.get("swept", index), memory.get("fine", index)
            if not self.collapsed:
                guess = memory.get(self._kind("guess", number), index)
                fine = plus(fine, executor.correct(number, guess, swept, inputs))
            memory.put("swept", index, executor.advance(number, swept, fine))

    def _advance_collapsed(self, number: int) -> None:
        """Add the correction of one stage to the last state."""
        for index, (_, inputs) in enumerate(self.batches()):
            guess = self.memory.get(self._kind("guess", number), index)
            entering = self.memory.get(self._kind("entering", number), index)
            correction = self.executor.correct(number, guess, entering, inputs)
            swept = self.memory.get("swept", index)
            self.memory.put("swept", index, plus(swept, correction))


def _cheapest(found: Sequence[tuple[Operator, float]]) -> tuple[Operator, OperatorSpec]:
    """The cheapest operator that nearly reaches the smallest error, and what its plan says then."""
    found = sorted(found, key=lambda pair: pair[0].spec.flops)
    least = min(error for _, error in found)
    taken, error = next(pair for pair in found if pair[1] <= _NEARLY * least)
    tried = tuple(Trial(_label(each.spec), each.spec.flops, error) for each, error in found)
    why = f"error {error:.3f} on held-out samples, best of {len(found)} tried: {least:.3f}"
    return taken, replace(taken.spec, why=why, tried=tried)


def _by_rank(offered: Sequence[tuple[Operator, Any]]) -> list[list[tuple[Operator, Any]]]:
    """Operators in groups that differ by their rank alone; the largest rank first."""
    groups: dict[Hashable, list[tuple[Operator, Any]]] = {}
    for pair in offered:
        spec = pair[0].spec
        rest = tuple((key, value) for key, value in vars(spec.options).items() if key != "rank")
        groups.setdefault((spec.family, rest), []).append(pair)
    return [
        sorted(group, key=lambda pair: pair[0].spec.rank or 0, reverse=True)
        for group in groups.values()
    ]


def fit_networks(networks: Sequence[nn.Module], samples: Callable[[], Iterator[Sample]]) -> None:
    """Fit the linear parts one after the other, each to what is left by the others.

    The networks differ by their rank alone, so that the first part of all of them is solved from
    the same sums.
    """
    columns = [fitted_parts(network) for network in networks]
    for parameter in (p for parts in columns for part in parts for p in part.parameters()):
        parameter.zero_()
    for position in range(len(columns[0])):
        fitted = columns[:1] if position == 0 else columns
        fits = [MatrixFit(parts[position]) for parts in fitted]
        for sample in samples():
            _check_finite((*sample.features, *sample.wanted))
            for fit, network in zip(fits, networks, strict=False):
                done = _tensors(network(*sample.arguments))
                left = [w.double() - d for w, d in zip(sample.wanted, done, strict=True)]
                fit.add(sample.features, left, held_out=sample.held_out)
        for number, parts in enumerate(columns):
            fits[number % len(fits)].finish(parts[position])


def _check_finite(tensors: Iterable[torch.Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise OptionError(
            "calibration met values that are not finite: check the samples, and whether the model "
            "gives finite outputs on them"
        )


def _recalibrate(network: nn.Module, samples: Callable[[], Iterator[Sample]]) -> bool:
    """Measure BatchNorm statistics on what the network sees, and keep them if its error falls."""
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return False
    before = _state_of(network)
    [known] = _errors([network], samples())
    _measure_statistics(network, (tuple(s.arguments) for s in samples() if not s.held_out))
    if _errors([network], samples()) < [known]:
        return True
    _set_state(network, before)
    return False


def _state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _set_state(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    for name, value in network.state_dict().items():
        value.copy_(state[name])


def _measure_statistics(network: nn.Module, calls: Iterable[tuple[Any, ...]]) -> None:
    try:
        recalibrate(network, calls)
    except ValueError as error:
        raise OptionError(
            f"BatchNorm statistics cannot be measured on these batches ({error}): give larger ones"
        ) from error


def _errors(networks: Sequence[nn.Module], samples: Iterable[Sample]) -> list[float]:
    """Errors that networks leave on held-out samples, relative to the state."""
    energies = [Energy() for _ in networks]
    for sample in samples:
        if not sample.held_out:
            continue
        for network, energy in zip(networks, energies, strict=True):
            done = _tensors(network(*sample.arguments))
            for found, wanted, scale in zip(done, sample.wanted, sample.scale, strict=True):
                energy.add(scale.double() + found - wanted, scale)
    return [energy.share for energy in energies]


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    return value if isinstance(value, tuple) else (value,)


def _label(spec: OperatorSpec) -> str:
    rank = f", rank {spec.rank}" if spec.rank is not None else ""
    copied = spec.options.copied if isinstance(spec.options, PreprocessOptions) else None
    return spec.family + rank + (f", behind a copy of {copied[0]} to {copied[1]}" if copied else "")
