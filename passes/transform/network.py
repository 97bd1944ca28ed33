"""The module of a network: it is called as its model is, and returns what its model returns.

>>> from torch import nn
>>> from passes.ir.program import CaptureReport
>>> module = fx.symbolic_trace(nn.Linear(4, 2))
>>> inputs = {"input": torch.zeros(3, 4)}
>>> program = Program(module, inputs, ("batch",), CaptureReport("trace"), "Linear")
>>> network = Network(module, module.graph)
>>> network.meta[CALL] = Call.of(program)
>>> network(torch.zeros(5, 4), mask=None).shape
torch.Size([5, 2])
>>> network(torch.zeros(5, 3))
Traceback (most recent call last):
passes.errors.OptionError: input is [5, 3] torch.float32, but Linear was compiled for [any number, \
4] torch.float32 (dimension 1: 3 instead of 4): compile it with an example like the inputs that it \
will run on
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.errors import OptionError, SynthesisError, first_line
from passes.ir.example_inputs import bind
from passes.ir.isolation import preserved
from passes.ir.module_walk import named_tensors, set_mode
from passes.ir.output_types import OutputType, typed
from passes.ir.program import Program, failing_node, tensor_leaves
from passes.transform.constants import PLAIN, check_constant, check_constants, same_constant

CALL = "pnn_call"
"""Key of the `Call` in the `meta` of a network."""

_PASSED_ON = (
    "config", "generation_config", "main_input_name", "loss_type", "_keys_to_ignore_on_save",
)  # fmt: skip
"""Attributes of a model that a trainer reads, as that of transformers does."""


@dataclass(frozen=True)
class Call:
    """What a call of a network takes and returns.

    Attributes:
        model: Name of the model.
        examples: Its arguments by name, in order.
        fixed: Values that arguments outside the graph have in it.
        free_batch: Whether batches of other sizes are fine.
        sequence: Length of the sequences of the example, where others are fine; else None.
        output_types: What makes the containers of the output, as in `Program`.
        attributes: What the network has of the model.
        only_mode: The mode, "training" or "evaluation", that the graph is of; "" for both.
    """

    model: str
    examples: Mapping[str, Any]
    fixed: Mapping[str, Any]
    free_batch: bool
    sequence: int | None
    output_types: tuple[OutputType, ...]
    attributes: Mapping[str, Any]
    only_mode: str = ""

    @classmethod
    def of(cls, program: Program) -> Self:
        """Describe the calls of a program."""
        return cls(
            program.name,
            program.args,
            program.fixed,
            "batch" in program.dynamic,
            program.sequence,
            program.output_types,
            {n: getattr(program.model, n) for n in _PASSED_ON if hasattr(program.model, n)},
            program.capture.only_mode,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def check_others(self, arguments: Mapping[str, Any]) -> None:
        """Check that arguments outside the graph are left out, or have the values that it holds.

        Raises:
            OptionError: One has another value.
        """
        config = self.attributes.get("config")
        for name, value in arguments.items():
            if name in self.fixed:
                check_constant(self.model, name, value, self.fixed[name])
            elif value is not None and not same_constant(value, getattr(config, name, None)):
                raise OptionError(
                    f"{self.model} was compiled without argument {name}: it takes "
                    f"{', '.join(self.examples)}; compile it with an example of that call"
                )

    def without_constants(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Check and leave out the constants among positional arguments, as the model takes them."""
        names = match_arguments(self.examples, self.fixed, args, alone=True)
        if None in names:  # the call fails
            return args
        pairs = [*zip(names, args, strict=True)]
        self.check_others({str(name): value for name, value in pairs if name in self.fixed})
        return tuple(value for name, value in pairs if name not in self.fixed)

    def other_shape(self, inputs: Mapping[str, Any]) -> str:
        """Say which input has another shape than its example; "" if none has.

        Only the number of samples may differ, and integers from floating-point numbers may not.
        """
        tensors = tensor_leaves(dict(self.examples))
        samples = next((leaf.shape[0] for leaf in tensors if leaf.dim()), None)
        for name, value in inputs.items():
            leaves = pytree.tree_leaves(value), pytree.tree_leaves(self.examples[name])
            for actual, expected in zip(*leaves, strict=False):
                if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
                    counts = expected.dim() and expected.shape[0] == samples and self.free_batch
                    if reason := _differs(actual, expected, bool(counts), self.sequence):
                        return (
                            f"{name} is {[*actual.shape]} {actual.dtype}, but {self.model} was "
                            f"compiled for {reason}: compile it with an example like the inputs "
                            "that it will run on"
                        )
        return ""


def match_arguments(
    examples: Collection[str],
    fixed: Collection[str],
    elements: Iterable[Any],
    *,
    alone: bool = False,
) -> list[str | None]:
    """Return the argument that every element of a tuple is; None for what follows them.

    Elements with tensors are the arguments with tensors, in order, and the others the constants.

    Args:
        examples: Names of the arguments of a network.
        fixed: Names of the constants.
        elements: The tuple.
        alone: Whether nothing but arguments is in the tuple.
    """
    tensors, constants = deque(examples), deque(fixed)
    names: list[str | None] = []
    for element in elements:
        name = None
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(element)):
            name = tensors.popleft() if tensors else None
        elif constants and (alone or tensors or isinstance(element, PLAIN)):
            name = constants.popleft()
        elif tensors:
            name = tensors.popleft()
        if name is None:
            constants.clear()  # from here on everything belongs to the loss
        names.append(name)
    return names


def _differs(
    actual: torch.Tensor, expected: torch.Tensor, counts: bool, sequence: int | None
) -> str:
    """Describe the tensor that was expected, and the first dimension that differs; "" if none."""
    sizes = ["any number" if counts else str(expected.shape[0])] if expected.dim() else []
    text = f"[{', '.join([*sizes, *map(str, expected.shape[1:])])}] {expected.dtype}"
    if actual.dim() != expected.dim():
        return f"{text} ({actual.dim()} dimensions instead of {expected.dim()})"
    for axis, (size, example) in enumerate(zip(actual.shape, expected.shape, strict=True)):
        free = counts if axis == 0 else example == sequence
        if size != example and not free:
            return f"{text} (dimension {axis}: {size} instead of {example})"
    return "" if actual.is_floating_point() == expected.is_floating_point() else text


class Network(fx.GraphModule):
    """A graph that is called as its model is; `meta[CALL]` says how that is.

    Trainer writes state dicts to files of safetensors, which name a tensor once: so does the state
    dict of a model with a configuration. One that names it more often is loaded as well.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Raises:
            OptionError: An argument is unknown, a constant is another one than that of the example,
                the network fails on an input of another shape, or is in a mode that its graph does
                not have.
        """
        call: Call = self.meta[CALL]
        check_mode(call.model, call.only_mode, training=self.training)
        if call.fixed and not all(isinstance(value, torch.Tensor) for value in args):
            args = call.without_constants(args)
        if others := kwargs.keys() - call.examples.keys():
            call.check_others({name: kwargs[name] for name in others})
            kwargs = {name: value for name, value in kwargs.items() if name not in others}
        named = dict(zip(call.examples, args, strict=False)) | kwargs
        for name, value in named.items():
            if not isinstance(value, torch.Tensor):
                check_constants(call.model, name, value, call.examples[name])
        try:
            outputs = super().__call__(*args, **kwargs)
        except Exception as error:
            if reason := call.other_shape(named):
                raise OptionError(reason) from error
            raise
        return typed(outputs, call.output_types)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model that trainers read."""
        call = self.__dict__.get("meta", {}).get(CALL)
        if call is not None and name in call.attributes:
            return call.attributes[name]
        if call is not None and name == "generate" and "generation_config" in call.attributes:
            raise AttributeError(
                f"{call.model} has no generate() as a network, which keeps no cache: load "
                "compiled.original_state_dict() into the model, and let that generate"
            )
        return super().__getattr__(name)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Return the state; that of a model with a configuration names every tensor once."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if "config" in self.meta[CALL].attributes:
            for alias in self._aliases():
                state.pop(f"{prefix}{alias}", None)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for alias, name in self._aliases().items():
            if f"{prefix}{name}" in state_dict:
                state_dict.setdefault(f"{prefix}{alias}", state_dict[f"{prefix}{name}"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _aliases(self) -> dict[str, str]:
        """Return the further names of shared tensors, and the first name of the same tensor."""
        first: dict[int, str] = {}
        named = named_tensors(self, repeats=True)
        pairs = [(name, first.setdefault(id(tensor), name)) for name, tensor in named]
        return {name: kept for name, kept in pairs if name != kept}


def check_mode(model: str, only: str, *, training: bool) -> None:
    """Check that a network is in a mode that its graph has.

    Args:
        model: Name of the model.
        only: The mode of the graph, as in `Call`.
        training: Whether the network is in training mode.

    Raises:
        OptionError: The graph is of the other mode alone.
    """
    if only == "evaluation" and training:
        raise OptionError(
            f"{model} was captured for evaluation mode alone, as training mode has another graph "
            "(a note of the report says which): call .eval() on the network, which can be trained "
            "in that mode too"
        )
    if only == "training" and not training:
        raise OptionError(
            f"{model} was captured for training mode alone, as evaluation mode has another graph "
            "(a note of the report says which): call .train() on the network, or compile "
            "model.eval() for evaluation"
        )


def check_length(program: Program, network: fx.GraphModule) -> None:
    """Check that a network takes another length of the sequences, if that is to be free.

    Raises:
        SynthesisError: An operator that the compiler made has a fixed length.
    """
    if program.sequence is None:
        return
    inputs = bind(program.module, (), dict(program.args)).with_dynamic(program.dynamic)
    with preserved(program.module, network), torch.no_grad():
        set_mode(program.module, False)
        set_mode(network, False)
        for other in inputs.other_lengths():
            try:
                network(**other.tensor_arguments())
            except Exception as error:
                place = failing_node(network, other.tensor_arguments())
                if failing_node(program.module, other.tensor_arguments()):
                    continue  # too short for the model itself
                raise SynthesisError(
                    f"the sequence of {program.name} cannot be free: the network fails at another "
                    f"length than {program.sequence}{place} ({first_line(error)}); guesses and "
                    "corrections of family 'linear', 'units', 'thinned' and 'identity' take any "
                    "length, where a state has as many positions as the inputs"
                ) from error
