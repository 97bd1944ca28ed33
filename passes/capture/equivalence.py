"""Validate a captured graph against the model: outputs, gradients and buffers, in both modes.

A graph of a front end counts only after this validation. The reference is the user's own object,
not a copy, which could lack what the graph lacks: every run starts from the same random state and
leaves the model as it was.

The reference runs cover both modes and two inputs, of which the second has one more sample if the
model allows it; besides, one input tensor at a time is changed, because a graph may ignore an
argument without an effect on the first two.

That is `validate="full"`. "fast" runs no backward pass, which takes most of the time, and compares
on the second input alone; "off" does so in evaluation mode alone.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from passes.capture.model_notes import join_few
from passes.capture.torch_export import SIZES_KEY
from passes.errors import CaptureError, first_line
from passes.ir.example_inputs import ExampleInputs
from passes.ir.isolation import (
    parameters_preserved,
    preserved,
    same_values,
    with_plain_transformers,
)
from passes.ir.module_walk import named_buffers, named_parameters, named_submodules, set_mode
from passes.ir.observer import Observations, Observer, ShapeRecorder
from passes.ir.output_types import OutputType
from passes.ir.program import Interpreter, Validation, failing_node
from passes.ir.run_step import TOLERANCE, Forward, StepResult, compare, output_leaves, run_one_step

PADDING = "pad them to one length (torch.nested.to_padded_tensor), with a mask as a further input"
"""What to do instead of passing, holding or returning nested tensors."""

_SECOND_SEED = 1
"""Seed of the runs on the second input: a graph may hold the random numbers of the first."""


class Reference:
    """Runs of the original model that every candidate graph is compared with.

    Args:
        model: The model itself, which is only read.
        inputs: Its example inputs. If their batch is dynamic, the model runs on one more sample.
        validate: How much to compare.

    Attributes:
        inputs: The example inputs; without "batch" in `dynamic` if the model refuses one more.
        runs: Number of runs so far, of the model and of graphs.
        seconds: Their wall time.
        notes: Comparisons that were impossible, and why.
        observations: What the runs of the last graph showed of its nodes.

    Raises:
        CaptureError: The model fails on its own example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: ExampleInputs,
        *,
        validate: Validation = "full",
    ) -> None:
        self.validate, self.runs, self.seconds = validate, 0, 0.0
        self._model = model
        self.inputs = inputs
        self._parameters = {name: p.detach().clone() for name, p in named_parameters(model)}
        self._runs_alone: dict[bool, list[tuple[ExampleInputs, StepResult]]] = {}
        self._caches: set[str] = set()
        self._lengths: list[tuple[ExampleInputs, StepResult]] = []
        self.notes: list[str] = []
        self.observations: Observations | None = None
        # By mode (training?) and input (the second?).
        self._runs: dict[tuple[bool, bool], StepResult] = {}
        try:
            self._runs[False, False] = self._evaluation_step()
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs "
                f"({_shapes(inputs)}): {summarize(error)}"
            ) from error
        returned = self._runs[False, False].outputs
        if any(isinstance(output, torch.Tensor) and output.is_nested for output in returned):
            raise CaptureError(
                f"{type(model).__name__} returns a nested tensor, rows of several lengths, which "
                f"no network does: {PADDING}"
            )
        if "batch" in inputs.dynamic and not self._accepts_larger_batch():
            self.inputs = inputs.with_dynamic({*inputs.dynamic} - {"batch"})
        free = "batch" in self.inputs.dynamic
        self._second_inputs = inputs.varied(grow=free)
        if not free:
            self._runs[False, True] = self._run(
                self._second_inputs, train=False, grad=False, seed=_SECOND_SEED
            )
        if validate != "off":
            self._run_training()
        self._note_fast_path()
        outputs = [output for result in self._runs.values() for output in result.outputs]
        if any(isinstance(output, torch.Tensor) and output.is_meta for output in outputs):
            self.notes.append("on the meta device shapes were compared, and no values")
        if validate != "full":  # the second input tells a constant of the trace from a value
            del self._runs[False, False]

    def _step(self, *args: Any, **options: Any) -> StepResult:
        start = time.perf_counter()
        try:
            return run_one_step(*args, **options)
        finally:
            self.runs, self.seconds = self.runs + 1, self.seconds + time.perf_counter() - start

    def _run(self, inputs: ExampleInputs, **options: Any) -> StepResult:
        """Run one step of the model, and check that it leaves its parameters as they were."""
        with parameters_preserved(self._model, self._parameters):
            result = self._step(self._model, _call(self._model), inputs, **options)
        shapes = {name: buffer.shape for name, buffer in named_buffers(self._model)}
        filled = {name for name, t in result.changed.items() if shapes.get(name) != t.shape}
        if filled - self._caches:
            self._caches |= self._find_caches(filled)
        return self._without_caches(result)

    def add_length(self) -> None:
        """Compare at other lengths of the sequences too.

        Raises:
            Exception: The model fails at the first of them; the next may be too short for it.
        """
        for inputs in self.inputs.other_lengths():
            try:
                self._lengths.append((inputs, self._run(inputs, train=False, grad=False)))
            except Exception:
                if not self._lengths:
                    raise

    def mismatch_in_length(self, candidate: nn.Module) -> str:
        """Return "" if the graph equals the model at another length, else where it does not."""
        for inputs, expected in self._lengths:
            if not (reason := self._mismatch_on(candidate, inputs, expected, train=False)):
                continue
            place = ""
            if isinstance(candidate, fx.GraphModule):
                place = failing_node(candidate, inputs.tensor_arguments())
            return f"at another length than {self.inputs.sequence}{place}, {reason}"
        return ""

    def _find_caches(self, names: Collection[str]) -> set[str]:
        """Return the buffers that forward fills at its first call and never touches again.

        They follow from the shapes of the inputs, as the next call has other values. A graph
        computes them in every call.
        """
        states = []
        with preserved(self._model), with_plain_transformers(), torch.no_grad():
            set_mode(self._model, False)
            for inputs in (self.inputs, self.inputs.varied(grow=False)):
                args, kwargs = inputs.copied()
                try:
                    self._model(*args, **kwargs)
                except Exception:  # the second input may not suit the model
                    return set()
                buffers = dict(named_buffers(self._model))
                states.append({name: buffers[name].clone() for name in names if name in buffers})
        first, second = states
        caches = {n for n in first if n in second and same_values(first[n], second[n])}
        if caches:
            self.notes.append(
                f"forward fills the buffers {join_few(sorted(caches))} at its first call, by the "
                "shapes of its inputs: the network computes them in every call, and its state "
                "holds them as they are in the model now"
            )
        return caches

    def _without_caches(self, result: StepResult) -> StepResult:
        changed = {n: tensor for n, tensor in result.changed.items() if n not in self._caches}
        return dataclasses.replace(result, changed=changed) if self._caches else result

    def _evaluation_step(self) -> StepResult:
        """Run in evaluation mode, with gradients if the model has them in that mode.

        Outputs alone miss errors in a branch that starts at zero, such as one with a residual scale
        of zero.
        """
        try:
            return self._run(self.inputs, train=False, grad=self.validate == "full")
        except CaptureError:
            raise
        except Exception:
            return self._run(self.inputs, train=False, grad=False)

    def _training_step(self, second: bool, grad: bool) -> StepResult:
        """Run in training mode; some models refuse inputs that require gradients."""
        run = functools.partial(
            self._run, self._choose(second), train=True, grad=grad, seed=_SECOND_SEED * second
        )
        try:
            return run()
        except Exception:
            if not grad:
                raise
            return run(input_gradients=False)

    def _accepts_larger_batch(self) -> bool:
        larger = self.inputs.varied(grow=True)
        try:
            result = self._run(larger, train=False, grad=False, seed=_SECOND_SEED)
        except Exception as error:
            self.notes.append(f"batch size fixed: the model refuses another ({summarize(error)})")
            return False
        shapes = [
            [output.shape for output in run.outputs if isinstance(output, torch.Tensor)]
            for run in (self._runs[False, False], result)
        ]
        counting = {
            leaf.value.shape[0]: leaf.argument for leaf in self.inputs.leaves if leaf.value.dim()
        }
        counting.pop(self.inputs.batch_size or 0, None)
        other = next((counting[s[0]] for s in shapes[0] if s and s[0] in counting), None)
        if shapes[0] == shapes[1] and other is not None:
            self.notes.append(
                f"batch size fixed: the outputs count samples as {other!r} does, not as the first "
                f"input {self.inputs.leaves[0].argument!r}"
            )
            return False
        self._runs[False, True] = result
        return True

    def _note_fast_path(self) -> None:
        """Say where the fast path of torch's encoders returns something else than their layers."""
        encoders = [
            path or "the model itself"
            for path, module in named_submodules(self._model)
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
        ]
        if not encoders:
            return
        with preserved(self._model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are a prototype
            set_mode(self._model, False)
            args, kwargs = self.inputs.copied()
            outputs = output_leaves(self._model(*args, **kwargs))
        plain = dataclasses.replace(self._runs[False, False], gradients={}, changed={})
        if compare(StepResult(outputs, {}, {}), plain):
            self.notes.append(
                f"{join_few(encoders)} (nn.TransformerEncoder) returns zeros at padded positions "
                "in evaluation without gradients, and the network what the layers compute there"
            )

    def _run_training(self) -> None:
        """Run training steps on both inputs; BatchNorm may refuse a batch of one sample."""
        failures = []
        full = self.validate == "full"
        for second in (False, True) if full else (True, False):
            try:
                grad = full and not self._has_gradients(train=True)
                self._runs[True, second] = self._training_step(second, grad)
                if not full:
                    break
            except CaptureError:
                raise
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
        return self._second_inputs if second else self.inputs

    def differentiate(self, *, train: bool) -> None:
        """Add gradients to the runs of a mode if they have none.

        Args:
            train: Whether the mode is training mode.
        """
        if self.validate != "full" or self._has_gradients(train=train):
            return
        for mode, second in list(self._runs):
            if mode == train:
                run = functools.partial(self._run, self._choose(second), train=train, grad=True)
                try:
                    self._runs[mode, second] = run(seed=_SECOND_SEED * second)
                except CaptureError:
                    raise
                except Exception as error:
                    self.notes.append(
                        f"gradients were not compared: the model's own backward fails "
                        f"({summarize(error)})"
                    )
                    return

    @property
    def random(self) -> bool:
        """Whether a run drew random numbers."""
        return any(result.drew_random for result in self._runs.values())

    def output_types(self, *, train: bool) -> tuple[tuple[OutputType, ...], tuple[str, ...]]:
        """Return what makes the containers of the output, and classes of those that it cannot make.

        Args:
            train: Whether the graph is of training mode alone, whose output may be another.
        """
        results = [result for (mode, _), result in self._runs.items() if mode == train]
        result = results[0] if results else next(iter(self._runs.values()))
        return result.types, result.unknown

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
            # What later passes ask for is seen on the way, where other runs call the module itself.
            watched = self.validate == "full" and second and not expected.gradients
            watcher = self._watcher(candidate, train) if watched else None
            try:
                result = self._step(
                    candidate,
                    _call_by_name(candidate) if watcher is None else _call_on(watcher),
                    self._choose(second),
                    train=train,
                    grad=bool(expected.gradients),
                    input_gradients=expected.input_gradients,
                    seed=_SECOND_SEED * second,
                )
            except Exception as error:
                return f"the graph fails {where}: {summarize(error)}"
            if watcher is not None:
                self._observe(watcher)
            result = self._without_caches(result)
            if reason := compare(result, expected, least=_lowest_precision(candidate)):
                return f"{where}, {reason}"
        train = False not in modes
        if not train and (reason := self.mismatch_in_length(candidate)):
            return reason
        if self.validate != "full":
            return self._mismatch_resized(candidate, train)
        return self._mismatch_alone(candidate, train) or self._mismatch_resized(candidate, train)

    def _watcher(self, candidate: nn.Module, train: bool) -> Observer | ShapeRecorder | None:
        """Return what runs a graph and records what the run can show; None if that is nothing."""
        if not isinstance(candidate, fx.GraphModule):
            return None
        if train:
            return Observer(candidate)
        return ShapeRecorder(candidate) if "batch" in self.inputs.dynamic else None

    def _observe(self, watcher: Observer | ShapeRecorder) -> None:
        observed, graph = self.observations, watcher.graph
        if observed is None or observed.graph is not graph:
            observed = Observations(graph)
        self.observations = (
            dataclasses.replace(observed, trained=watcher.facts())
            if isinstance(watcher, Observer)
            else dataclasses.replace(observed, larger=watcher.shapes)
        )

    def _mismatch_alone(self, candidate: nn.Module, train: bool) -> str:
        """Return "" if the outputs agree wherever a single input tensor is changed."""
        if train not in self._runs_alone:
            self._runs_alone[train] = list(self._run_alone(train))
        for inputs, expected in self._runs_alone[train]:
            if reason := self._mismatch_on(candidate, inputs, expected, train):
                return f"where one input is changed by itself, {reason}"
        return ""

    def _mismatch_resized(self, candidate: nn.Module, train: bool) -> str:
        """Return "" if the outputs agree at batch sizes for which forward may have a branch."""
        graph = getattr(candidate, "graph", None)
        if "batch" not in self.inputs.dynamic or not isinstance(graph, fx.Graph):
            return ""
        for size in graph.output_node().meta.get(SIZES_KEY, ()):
            inputs = self.inputs.resized(size)
            try:
                expected = self._run(inputs, train=train, grad=False)
            except Exception:  # BatchNorm refuses a batch of one sample
                continue
            if reason := self._mismatch_on(candidate, inputs, expected, train):
                return (
                    f"at a batch size of {size}, {reason} (forward has a branch on it, or a result "
                    "of another shape: dynamic=() compiles it for the example's)"
                )
        return ""

    def notes_on_sizes(self, candidate: nn.Module) -> list[str]:
        """Say so if the graph holds sizes of the example that the model itself leaves open."""
        sizes = [size for leaf in self.inputs.leaves for size in leaf.value.shape[1:] if size > 1]
        for size in dict.fromkeys(sizes):
            inputs = self.inputs.shortened(size, size - 1)
            try:
                expected = self._run(inputs, train=False, grad=False)
            except Exception:  # the model takes no other size either
                continue
            if self._mismatch_on(candidate, inputs, expected, train=False):
                return [
                    f"sizes of the inputs but the batch are fixed ({_shapes(self.inputs)}): with "
                    f"another one instead of {size}, which the model takes, the network fails or "
                    "computes something else; compile one for every size, or pad"
                ]
        return []

    def _mismatch_on(
        self, candidate: nn.Module, inputs: ExampleInputs, expected: StepResult, train: bool
    ) -> str:
        """Compare the outputs of the graph on some inputs with those of the model."""
        try:
            result = self._step(
                candidate, _call_by_name(candidate), inputs, train=train, grad=False
            )
        except Exception as error:
            return f"the graph fails: {summarize(error)}"
        result = self._without_caches(result)
        return compare(result, expected, least=_lowest_precision(candidate))

    def _run_alone(self, train: bool) -> Iterator[tuple[ExampleInputs, StepResult]]:
        """Run the model on inputs that differ in one tensor each."""
        count = len(self.inputs.leaves)
        for index in range(count if count > 1 else 0):  # the second input changes a single one
            inputs = self.inputs.varied_alone(index)
            try:
                result = self._run(inputs, train=train, grad=False)
            except Exception:  # some inputs must agree with each other
                continue
            yield inputs, result


def _lowest_precision(candidate: nn.Module) -> float:
    """Return the tolerance of the lowest precision that a graph converts values to; 0 if none."""
    graph = getattr(candidate, "graph", None)
    nodes = graph.nodes if isinstance(graph, fx.Graph) else ()
    leaves = (leaf for node in nodes for leaf in tree_leaves((node.args, node.kwargs)))
    return max(
        (TOLERANCE.get(leaf, 0.0) for leaf in leaves if isinstance(leaf, torch.dtype)), default=0.0
    )


def _call(model: nn.Module) -> Forward:
    return lambda inputs: model(*inputs.args, **inputs.kwargs)


def _call_by_name(module: nn.Module) -> Forward:
    # Not `module(...)`: a GraphModule prints the traceback of an error, which is part of a trial.
    return lambda inputs: nn.Module.__call__(module, **inputs.tensor_arguments())


def _call_on(interpreter: Interpreter) -> Forward:
    return lambda inputs: interpreter.run_by_name(inputs.tensor_arguments())


def _shapes(inputs: ExampleInputs) -> str:
    return ", ".join(f"{leaf.argument} {list(leaf.value.shape)}" for leaf in inputs.leaves)


def summarize(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return ": ".join(filter(None, (type(error).__name__, first_line(error))))
