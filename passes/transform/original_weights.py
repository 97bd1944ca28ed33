"""Weights of a network under the keys of the model, in both directions.

The stages hold the model's tensors under its qualified names. That is its state dict, unless code
of the model translates: hooks, overridden methods, extra state, old names. Then the copy of the
model that the program keeps (`Program.model`) does the work, and tensors go there and back by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.capture.model_copy import ENCLOSED, copy_model
from passes.capture.model_notes import translating
from passes.errors import OptionError
from passes.ir.module_walk import named_submodules
from passes.ir.program import Program, resolve
from passes.transform.split import Stages

_PREFIX = f"{ENCLOSED}."


def weights_by_name(program: Program, stages: Stages) -> dict[str, Any]:
    """Return the tensors of the stages, the head and what no stage reads, by qualified name."""
    weights: dict[str, Any] = dict(program.unused)
    for piece in (*stages.fine, stages.head):
        weights.update(piece.state_dict())
    return weights


def to_state_dict(program: Program, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Convert tensors by qualified name to the state dict of the model."""
    if program.model is not None and translating(program.model):
        weights = _filled(program.model, weights).state_dict()
    return {key.removeprefix(_PREFIX): value for key, value in weights.items()}


def load_state_dict(
    program: Program, stages: Stages, state: Mapping[str, Any], *, strict: bool
) -> None:
    """Copy a checkpoint of the model into the tensors of a network; all of it or nothing.

    A rank that read its own part of an artifact has the other weights on the meta device: what the
    checkpoint says of those is checked, and not loaded.

    Args:
        program: The program.
        stages: Its stages.
        state: The checkpoint, on any device that has its values.
        strict: Whether all keys of the model must be there, and no others.

    Raises:
        OptionError: The checkpoint does not fit, changes what is not a tensor, or the network has
            no memory for it.
    """
    name, model, weights = program.name, program.model, weights_by_name(program, stages)
    _check_names(name, state)
    if any(key.startswith(_PREFIX) for key in weights):
        state = {f"{_PREFIX}{key}": value for key, value in state.items()}
    values = pytree.tree_leaves(dict(program.args))
    if model is not None:  # of an artifact, which has none, weights may lie on other ranks
        values += weights.values()
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in values):
        raise OptionError(
            f"{name} was compiled on the meta device, by shapes: its weights, preprocessing "
            "operators and coarse propagators have no values. Move the model to memory with "
            'model.to_empty(device="cpu"), load the checkpoint into it, and compile it again'
        )
    if model is not None and translating(model):
        state = _translated(model, name, weights, state, strict=strict)
    elif strict and weights.keys() != state.keys():
        state = _with_old_names(model, name, weights, state)
    common = [key for key in weights if key in state]
    for key in common:
        if not isinstance(weights[key], torch.Tensor):
            _check_equal(name, key, weights[key], state[key])
    common = [key for key in common if isinstance(weights[key], torch.Tensor)]
    _check_shapes(name, weights, state, common)
    with torch.no_grad():
        for key in common:
            weights[key].copy_(state[key])


def _check_names(name: str, state: Any) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise OptionError(
            f"a checkpoint of {name} is a dict of tensors by name, as of state_dict()"
        )


def _with_old_names(
    model: nn.Module | None, name: str, weights: Mapping[str, Any], state: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Convert a checkpoint of other keys, if the model loads it all the same.

    Raises:
        OptionError: It does not.
    """
    missing = sorted(weights.keys() - state.keys())
    unknown = sorted(state.keys() - weights.keys())
    misfit = OptionError(
        f"the checkpoint does not fit {name}: {len(missing)} keys missing "
        f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])}); "
        "pass strict=False to load what fits"
    )
    if model is None:
        raise misfit
    try:
        return _translated(model, name, weights, state, strict=True)
    except OptionError as error:
        raise misfit from error


def _check_shapes(
    name: str, weights: Mapping[str, Any], state: Mapping[str, Any], keys: list[str]
) -> None:
    for key in sorted(keys):
        value = state[key]
        if not isinstance(value, torch.Tensor):
            raise OptionError(f"{key} is a {type(value).__name__} in the checkpoint, no tensor")
        if value.is_meta:
            raise OptionError(f"{key} has no data in the checkpoint: load it to a device")
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise OptionError(
                f"{key} is sparse, quantized or nested in the checkpoint: convert it to a dense "
                "tensor first (.to_dense(), .dequantize())"
            )
        if value.is_complex() and not weights[key].is_complex():
            raise OptionError(f"{key} is complex in the checkpoint, and real in {name}")
        if value.shape != weights[key].shape:
            raise OptionError(
                f"{key} has shape {list(value.shape)} in the checkpoint and "
                f"{list(weights[key].shape)} in {name}"
            )


def _check_equal(name: str, key: str, value: Any, loaded: Any) -> None:
    """Refuse an entry that is not a tensor and differs: the graph fixes what follows from it."""
    try:
        (first, structure), (second, other) = map(pytree.tree_flatten, (value, loaded))
        same = structure == other and all(map(_alike, first, second))
    except Exception:  # objects that cannot be compared
        same = False
    if not same:
        raise OptionError(
            f"{key} is not a tensor and differs from that of {name} when it was compiled: load the "
            "checkpoint into the model and compile it again"
        )


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)


def _translated(
    model: nn.Module,
    name: str,
    weights: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    strict: bool,
) -> dict[str, Any]:
    """Let a copy of the model load a checkpoint; return its tensors by qualified name."""
    trial = _filled(model, weights)
    before = _extra_state(trial)
    try:
        # A method of the model's own may not take the option.
        trial.load_state_dict(state, **({} if strict else {"strict": False}))
    except Exception as error:
        raise OptionError(
            f"load_state_dict of {name} refuses the checkpoint: {' '.join(str(error).split())}"
        ) from error
    for path, value in _extra_state(trial).items():
        _check_equal(name, f"the extra state of {path}", before.get(path), value)
    return {
        key: resolve(trial, key).detach() if isinstance(value, torch.Tensor) else value
        for key, value in weights.items()
    }


def _filled(model: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a model with other tensors."""
    model = copy_model(model)
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor):
            continue
        path, _, leaf = key.rpartition(".")
        owner: Any = resolve(model, path) if path else model
        target = getattr(owner, leaf)
        if (target.dtype, target.device) == (value.dtype, value.device):
            target.data.copy_(value)
        elif isinstance(target, nn.Parameter):
            owner._parameters[leaf] = nn.Parameter(value.detach(), target.requires_grad)
        else:
            owner._buffers[leaf] = value
    return model


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """Return the extra state of every module that has any, by path."""
    none: Any = nn.Module.get_extra_state
    return {
        path or "the model itself": module.get_extra_state()
        for path, module in named_submodules(model)
        if type(module).get_extra_state is not none
    }
