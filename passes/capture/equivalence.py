"""Validate a captured graph against the model: outputs, gradients and buffers, in both modes.

A graph of a front end counts only after this validation. Every run starts from the same random
state and leaves the parameters, buffers and modes of the model as they were.

The reference runs cover both modes and two inputs, of which the second has one more sample if the
model allows it; besides, one input tensor at a time is changed, because a graph may ignore an
argument without an effect on the first two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from passes.errors import CaptureError, first_line
from passes.ir.example_inputs import ExampleInputs
from passes.ir.run_step import Forward, StepResult, compare, run_one_step


class Reference:
    """Runs of the original model that every candidate graph is compared with.

    Args:
        model: A copy of the model.
        inputs: Its example inputs.
        dynamic_batch: Whether to try another batch size.

    Attributes:
        dynamic_batch: Whether the model itself accepts one more sample.
        notes: Comparisons that were impossible, and why.

    Raises:
        CaptureError: The model fails on its own example inputs.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs, *, dynamic_batch: bool) -> None:
        self._model = model
        self._inputs = inputs
        self._runs_alone: dict[bool, list[tuple[ExampleInputs, StepResult]]] = {}
        self.notes: list[str] = []
        # By mode (training?) and input (the second?).
        self._runs: dict[tuple[bool, bool], StepResult] = {}
        try:
            self._runs[False, False] = _evaluation_step(model, inputs)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs "
                f"({_shapes(inputs)}): {summarize(error)}"
            ) from error
        self.dynamic_batch = dynamic_batch and self._accepts_larger_batch(model)
        self._second_inputs = inputs.varied(grow=self.dynamic_batch)
        if not self.dynamic_batch:
            self._runs[False, True] = run_one_step(
                model, _call(model), self._second_inputs, train=False, grad=False
            )
        self._run_training(model)
        outputs = [output for result in self._runs.values() for output in result.outputs]
        if any(isinstance(output, torch.Tensor) and output.is_meta for output in outputs):
            self.notes.append("on the meta device shapes were compared, and no values")

    def _accepts_larger_batch(self, model: nn.Module) -> bool:
        larger = self._inputs.varied(grow=True)
        try:
            self._runs[False, True] = run_one_step(
                model, _call(model), larger, train=False, grad=False
            )
        except Exception as error:
            self.notes.append(f"batch size fixed: the model refuses another ({summarize(error)})")
            return False
        return True

    def _run_training(self, model: nn.Module) -> None:
        """Run training steps on both inputs; BatchNorm may refuse a batch of one sample."""
        failures = []
        for second in (False, True):
            grad = not self._has_gradients(train=True)
            try:
                self._runs[True, second] = _training_step(model, self._choose(second), grad)
            except Exception as error:
                failures.append(summarize(error))
        if len(failures) == 2:
            self.notes.append(
                f"training mode was not compared: the model fails in it ({failures[0]}); give an "
                "example that it can train on"
            )

    def _has_gradients(self, *, train: bool) -> bool:
        return any(result.gradients for (mode, _), result in self._runs.items() if mode == train)

    def _choose(self, second: bool) -> ExampleInputs:
        return self._second_inputs if second else self._inputs

    def differentiate(self, model: nn.Module, *, train: bool) -> None:
        """Add gradients to the runs of a mode if they have none.

        Args:
            model: A copy of the model.
            train: Whether the mode is training mode.
        """
        if self._has_gradients(train=train):
            return
        for mode, second in list(self._runs):
            if mode == train:
                self._runs[mode, second] = run_one_step(
                    model, _call(model), self._choose(second), train=train, grad=True
                )

    @property
    def random(self) -> bool:
        """Whether a run drew random numbers."""
        return any(result.drew_random for result in self._runs.values())

    @property
    def output_type(self) -> type:
        """Class of the model's output."""
        return next(iter(self._runs.values())).output_type

    @property
    def written(self) -> frozenset[int]:
        """Positions of the input tensors that the model writes into."""
        return frozenset[int]().union(*(result.written for result in self._runs.values()))

    def mismatch(self, candidate: nn.Module, *, modes: Collection[bool] = (False, True)) -> str:
        """Return "" if the candidate graph equals the model, else where and how it differs.

        Args:
            candidate: The graph.
            modes: Modes to compare: True for training, False for evaluation.
        """
        for (train, second), expected in self._runs.items():
            if train not in modes:
                continue
            where = f"in {'training' if train else 'evaluation'} mode"
            where += " on a second input" if second else ""
            try:
                result = run_one_step(
                    candidate,
                    _call_by_name(candidate),
                    self._choose(second),
                    train=train,
                    grad=bool(expected.gradients),
                    input_gradients=expected.input_gradients,
                )
            except Exception as error:
                return f"the graph fails {where}: {summarize(error)}"
            if reason := compare(result, expected):
                return f"{where}, {reason}"
        return self._mismatch_alone(candidate, train=False not in modes)

    def _mismatch_alone(self, candidate: nn.Module, *, train: bool) -> str:
        """Return "" if the outputs agree wherever a single input tensor is changed."""
        if train not in self._runs_alone:
            self._runs_alone[train] = list(self._run_alone(train))
        for inputs, expected in self._runs_alone[train]:
            try:
                result = run_one_step(
                    candidate, _call_by_name(candidate), inputs, train=train, grad=False
                )
            except Exception as error:
                return f"the graph fails where one input is changed: {summarize(error)}"
            if reason := compare(result, expected):
                return f"where one input is changed by itself, {reason}"
        return ""

    def _run_alone(self, train: bool) -> Iterator[tuple[ExampleInputs, StepResult]]:
        """Run the model on inputs that differ in one tensor each."""
        count = len(self._inputs.leaves)
        for index in range(count if count > 1 else 0):  # the second input changes a single one
            inputs = self._inputs.varied_alone(index)
            try:
                result = run_one_step(
                    self._model, _call(self._model), inputs, train=train, grad=False
                )
            except Exception:  # some inputs must agree with each other
                continue
            yield inputs, result


def _evaluation_step(model: nn.Module, inputs: ExampleInputs) -> StepResult:
    """Run in evaluation mode, with gradients if the model has them in that mode.

    Outputs alone miss errors in a branch that starts at zero, such as one with a residual scale of
    zero.
    """
    try:
        return run_one_step(model, _call(model), inputs, train=False, grad=True)
    except Exception:
        return run_one_step(model, _call(model), inputs, train=False, grad=False)


def _training_step(model: nn.Module, inputs: ExampleInputs, grad: bool) -> StepResult:
    """Run in training mode; some models refuse inputs that require gradients."""
    try:
        return run_one_step(model, _call(model), inputs, train=True, grad=grad)
    except Exception:
        if not grad:
            raise
        return run_one_step(
            model, _call(model), inputs, train=True, grad=grad, input_gradients=False
        )


def _call(model: nn.Module) -> Forward:
    return lambda inputs: model(*inputs.args, **inputs.kwargs)


def _call_by_name(module: nn.Module) -> Forward:
    return lambda inputs: module(**inputs.tensor_arguments())


def _shapes(inputs: ExampleInputs) -> str:
    return ", ".join(f"{leaf.argument} {list(leaf.value.shape)}" for leaf in inputs.leaves)


def summarize(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return ": ".join(filter(None, (type(error).__name__, first_line(error))))
