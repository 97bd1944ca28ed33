"""Validation of a captured graph against the model: outputs, gradients, buffers, both modes.

A front end is believed only after this. Every run starts from the same random state and leaves
the parameters, buffers and modes of the model as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from passes.errors import CaptureError
from passes.ir.example_inputs import Arguments
from passes.ir.run_step import Forward, Run, compare, run

__all__ = ["Reference"]


class Reference:
    """The runs of the original model that every candidate graph is held against.

    Attributes:
        dynamic_batch: Whether the model itself accepts one more sample.
        notes: What could not be compared, and why.
    """

    def __init__(self, model: nn.Module, arguments: Arguments, *, dynamic_batch: bool) -> None:
        self._model = model
        self._arguments = arguments
        self._alone: dict[bool, list[tuple[Arguments, Run]]] = {}
        self.notes: list[str] = []
        self._runs: dict[tuple[bool, bool], Run] = {}
        try:
            self._runs[False, False] = _evaluated(model, arguments)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs "
                f"({_shapes(arguments)}): {_first_line(error)}"
            ) from error
        self.dynamic_batch = dynamic_batch and self._grows(model)
        self._other = arguments.varied(grow=self.dynamic_batch)
        if not self.dynamic_batch:
            self._runs[False, True] = run(model, _call(model), self._other, train=False, grad=False)
        self._train(model)
        if any(
            isinstance(o, torch.Tensor) and o.is_meta
            for r in self._runs.values()
            for o in r.outputs
        ):
            self.notes.append("on the meta device shapes were compared, and no values")

    def _train(self, model: nn.Module) -> None:
        """Run training steps; a batch of one sample may be too small for them, so try both."""
        failures = []
        for other in (False, True):
            arguments = self._other if other else self._arguments
            grad = not any(found.gradients for (mode, _), found in self._runs.items() if mode)
            try:
                self._runs[True, other] = _trained(model, arguments, grad)
            except Exception as error:
                failures.append(_first_line(error))
        if len(failures) == 2:
            self.notes.append(
                f"training mode was not compared: the model fails in it ({failures[0]}); give an "
                "example that it can train on"
            )

    def differentiate(self, model: nn.Module, *, train: bool) -> None:
        """Have the gradients of a mode compared too, which otherwise are in training mode alone.

        Args:
            model: A copy of the model.
            train: The mode.
        """
        if any(found.gradients for (mode, _), found in self._runs.items() if mode == train):
            return
        for mode, other in list(self._runs):
            if mode == train:
                arguments = self._other if other else self._arguments
                self._runs[mode, other] = run(
                    model, _call(model), arguments, train=train, grad=True
                )

    @property
    def random(self) -> bool:
        """Whether a run drew random numbers."""
        return any(found.random for found in self._runs.values())

    @property
    def output_kind(self) -> type:
        """Class of the model's output."""
        return next(iter(self._runs.values())).kind

    @property
    def written(self) -> frozenset[int]:
        """Numbers of the input tensors that the model writes into."""
        return frozenset[int]().union(*(found.written for found in self._runs.values()))

    def _grows(self, model: nn.Module) -> bool:
        other = self._arguments.varied(grow=True)
        try:
            self._runs[False, True] = run(model, _call(model), other, train=False, grad=False)
        except Exception as error:
            self.notes.append(f"batch size fixed: the model refuses another ({_first_line(error)})")
            return False
        return True

    def mismatch(self, candidate: nn.Module, *, modes: Collection[bool] = (False, True)) -> str:
        """Return "" if the candidate graph equals the model, else where it does not.

        Args:
            candidate: The graph.
            modes: Which modes to compare: True for training, False for evaluation.
        """
        for (train, other), wanted in self._runs.items():
            if train not in modes:
                continue
            arguments = self._other if other else self._arguments
            where = f"in {'training' if train else 'evaluation'} mode"
            where += " on a second input" if other else ""
            try:
                got = run(
                    candidate,
                    _call_by_name(candidate),
                    arguments,
                    train=train,
                    grad=bool(wanted.gradients),
                    through=wanted.through,
                )
            except Exception as error:
                return f"the graph fails {where}: {_first_line(error)}"
            if reason := compare(got, wanted):
                return f"{where}, {reason}"
        return self._mismatch_alone(candidate, train=False not in modes)

    def _mismatch_alone(self, candidate: nn.Module, *, train: bool) -> str:
        """Return "" if the outputs are equal wherever one input tensor alone is changed."""
        if train not in self._alone:
            self._alone[train] = list(self._runs_alone(train))
        for arguments, wanted in self._alone[train]:
            try:
                got = run(candidate, _call_by_name(candidate), arguments, train=train, grad=False)
            except Exception as error:
                return f"the graph fails where one input is changed: {_first_line(error)}"
            if reason := compare(got, wanted):
                return f"where one input is changed by itself, {reason}"
        return ""

    def _runs_alone(self, train: bool) -> Iterator[tuple[Arguments, Run]]:
        count = len(self._arguments.leaves)
        for index in range(count if count > 1 else 0):  # a single one is changed anyway
            arguments = self._arguments.varied_alone(index)
            try:
                yield (
                    arguments,
                    run(self._model, _call(self._model), arguments, train=train, grad=False),
                )
            except Exception:  # inputs that must agree with each other
                continue


def _evaluated(model: nn.Module, arguments: Arguments) -> Run:
    """Run in evaluation mode, with gradients where the model has them in that mode.

    The output alone says nothing of a branch that begins at zero, as with a residual scale of zero.
    """
    try:
        return run(model, _call(model), arguments, train=False, grad=True)
    except Exception:
        return run(model, _call(model), arguments, train=False, grad=False)


def _trained(model: nn.Module, arguments: Arguments, grad: bool) -> Run:
    """Run in training mode; some models refuse inputs that gradients shall go through."""
    try:
        return run(model, _call(model), arguments, train=True, grad=grad)
    except Exception:
        if not grad:
            raise
        return run(model, _call(model), arguments, train=True, grad=grad, through=False)


def _call(model: nn.Module) -> Forward:
    return lambda arguments: model(*arguments.args, **arguments.kwargs)


def _call_by_name(module: nn.Module) -> Forward:
    return lambda arguments: module(**arguments.tensor_arguments())


def _shapes(arguments: Arguments) -> str:
    return ", ".join(f"{leaf.argument} {list(leaf.value.shape)}" for leaf in arguments.leaves)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
