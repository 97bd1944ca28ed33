"""Fit the candidates for one place of a network to its samples, and choose the best of them.

Candidates that differ by their rank alone share the sums of one regression. The cheapest candidate
is taken whose error on held-out samples is within 5 % of the smallest:

    family        FLOPs   error
    lowrank, 8      100   0.31
    lowrank, 32     400   0.204     taken: 0.204 <= 1.05 * 0.20
    linear        1,600   0.20
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.coarse.family import is_fine
from passes.coarse.map_matrix import MatrixFit, fitted_parts
from passes.coarse.spec import OperatorSpec, PreprocessOptions, Trial
from passes.coarse.thinned_blocks import recalibrate
from passes.errors import OptionError, amount
from passes.transform.executor import Operator
from pnn_compile.fit.metrics import RelativeError

_TOLERANCE = 1.05
"""A cheaper operator is taken over the best one if its error is within this factor."""


@dataclass(frozen=True)
class Sample:
    """One batch of a regression.

    Attributes:
        held_out: Whether it is held out to measure errors, instead of being fitted.
        features: The tensors that the fitted maps read.
        targets: What the network should return.
        arguments: What the network is called with.
        scale: The tensors whose energy errors are relative to.
    """

    held_out: bool
    features: list[torch.Tensor]
    targets: list[torch.Tensor]
    arguments: list[Any]
    scale: list[torch.Tensor]


Samples = Callable[[], Iterator[Sample]]


def fit_best(
    candidates: Sequence[tuple[Operator, Any]],
    samples: Callable[[Operator], Iterator[Sample]],
    *,
    keep_better: bool,
) -> tuple[Operator, bool]:
    """Fit all candidates; return the cheapest of those that nearly reach the smallest error.

    Args:
        candidates: The operators, each with the network in it that is fitted.
        samples: Iterates over the samples of an operator; the same for those of one family and
            different ranks.
        keep_better: Whether a network keeps its weights where the fit would not lower its error.

    Returns:
        The operator; and whether its BatchNorm statistics were measured anew.
    """
    results: list[tuple[Operator, float]] = []
    recalibrated = set[Operator]()
    for group in _by_rank(candidates):
        operators, networks = zip(*group, strict=True)
        group_samples = partial(samples, operators[0])
        fit = partial(fit_networks, networks, group_samples)
        if keep_better:
            keep_if_better(networks, group_samples, fit)
        else:
            fit()
        for operator, network in group:
            if not is_fine(operator.spec.family) and _recalibrate(network, group_samples):
                recalibrated.add(operator)
        if len(candidates) > 1:
            results += zip(operators, _errors(networks, group_samples()), strict=True)
    if not results:
        [(only, _)] = candidates
        return only, only in recalibrated
    best, spec = _cheapest(results)
    return replace(best, spec=spec), best in recalibrated


def _cheapest(results: Sequence[tuple[Operator, float]]) -> tuple[Operator, OperatorSpec]:
    """Return the cheapest operator that nearly reaches the smallest error, and its new spec."""
    results = sorted(results, key=lambda pair: pair[0].spec.flops)
    least = min(error for _, error in results)
    best, error = next(pair for pair in results if pair[1] <= _TOLERANCE * least)
    tried = tuple(
        Trial(_label(one.spec), one.spec.flops, error)
        for one, error in results
        if math.isfinite(error)
    )
    why = f"error {error:.3f} on held-out samples, of {amount(len(results), 'candidate')}"
    why += "" if error <= least else f"; the least was {least:.3f}"
    return best, replace(best.spec, why=why, tried=tried)


def _label(spec: OperatorSpec) -> str:
    rank = f", rank {spec.rank}" if spec.rank is not None else ""
    copied = spec.options.copied if isinstance(spec.options, PreprocessOptions) else None
    return spec.family + rank + (f", after a copy of {copied[0]} to {copied[1]}" if copied else "")


def _by_rank(candidates: Sequence[tuple[Operator, Any]]) -> list[list[tuple[Operator, Any]]]:
    """Group operators that differ by their rank alone; the largest rank first."""
    groups: dict[Hashable, list[tuple[Operator, Any]]] = {}
    for pair in candidates:
        spec = pair[0].spec
        options = tuple((key, value) for key, value in vars(spec.options).items() if key != "rank")
        groups.setdefault((spec.family, options), []).append(pair)
    return [
        sorted(group, key=lambda pair: pair[0].spec.rank or 0, reverse=True)
        for group in groups.values()
    ]


def fit_networks(networks: Sequence[nn.Module], samples: Samples) -> None:
    """Fit the linear parts of networks one after the other, each to what the others leave.

    Args:
        networks: Differ by their rank alone, so that the first part of all of them is solved from
            the same sums.
        samples: Iterates over the samples.

    Raises:
        OptionError: A sample is not finite.
    """
    columns = [fitted_parts(network) for network in networks]
    for parameter in (p for parts in columns for part in parts for p in part.parameters()):
        parameter.zero_()
    for position in range(len(columns[0])):
        # All parts are zero before the first one is solved: one set of sums serves every rank.
        fitted = columns[:1] if position == 0 else columns
        fits = [MatrixFit(parts[position]) for parts in fitted]
        for sample in samples():
            _check_finite((*sample.features, *sample.targets))
            for fit, network in zip(fits, networks, strict=False):
                outputs = state_tensors(network(*sample.arguments))
                pairs = zip(sample.targets, outputs, strict=True)
                errors = [target.double() - output for target, output in pairs]
                fit.add(sample.features, errors, held_out=sample.held_out)
        for number, parts in enumerate(columns):
            fits[number % len(fits)].finish(parts[position])


def _check_finite(tensors: Iterable[torch.Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise OptionError(
            "calibration met values that are not finite: check the samples, and whether the model "
            "returns finite outputs on them"
        )


def keep_if_better(
    networks: Sequence[nn.Module],
    samples: Samples,
    change: Callable[[], object],
    *,
    restored: Sequence[nn.Module] | None = None,
) -> list[bool]:
    """Change networks, and take back the change of those whose held-out error does not fall.

    Args:
        networks: What is judged.
        samples: Iterates over their samples.
        change: Changes the networks.
        restored: What is put back for each of them; the network itself if None.

    Returns:
        Whether each change was kept.
    """
    restored = networks if restored is None else restored
    before = _errors(networks, samples())
    states = [
        {name: value.clone() for name, value in module.state_dict().items()} for module in restored
    ]
    change()
    after = _errors(networks, samples())
    kept = [new < old for new, old in zip(after, before, strict=True)]
    for module, state, better in zip(restored, states, kept, strict=True):
        if not better:
            for name, value in module.state_dict().items():
                value.copy_(state[name])
    return kept


def _recalibrate(network: nn.Module, samples: Samples) -> bool:
    """Measure BatchNorm statistics on what the network sees, and keep them if its error falls."""
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return False

    def change() -> None:
        measure_statistics(network, (tuple(s.arguments) for s in samples() if not s.held_out))

    [better] = keep_if_better([network], samples, change)
    return better


def measure_statistics(network: nn.Module, calls: Iterable[tuple[Any, ...]]) -> None:
    """Set the BatchNorm statistics of a network to their average over calls.

    Raises:
        OptionError: A batch is too small for a variance.
    """
    try:
        recalibrate(network, calls)
    except ValueError as error:
        raise OptionError(
            f"BatchNorm statistics cannot be measured on these batches ({error}): pass larger ones"
        ) from error


def _errors(networks: Sequence[nn.Module], samples: Iterable[Sample]) -> list[float]:
    """Return the error of every network on held-out samples, relative to their scale."""
    errors = [RelativeError() for _ in networks]
    for sample in samples:
        if not sample.held_out:
            continue
        for network, error in zip(networks, errors, strict=True):
            outputs = state_tensors(network(*sample.arguments))
            for output, target, scale in zip(outputs, sample.targets, sample.scale, strict=True):
                error.add(scale.double() + output - target, scale)
    return [error.value for error in errors]


def state_tensors(value: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors of a state that a network returned: a tensor, or several in a tuple."""
    return value if isinstance(value, tuple) else (value,)
