"""`OptimizerState`: the state of an optimizer by the keys of its parameters, not by their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from passes.errors import RuntimeFault

__all__ = ["OptimizerState"]

_STATE, _OPTIONS = "optimizer.state.", "optimizer.options."


class OptimizerState:
    """What an optimizer knows of every parameter, as one flat dict that ranks can share out.

    Args:
        optimizer: The optimizer of a rank.
        keys: Key of every parameter of the rank.

    Raises:
        RuntimeFault: The optimizer has parameters that are not of this rank.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, keys: Mapping[nn.Parameter, str]) -> None:
        self._optimizer = optimizer
        held = [p for group in optimizer.param_groups for p in group["params"]]
        strange = [p for p in held if p not in keys]
        if strange:
            raise RuntimeFault(
                f"the optimizer has {len(strange)} parameters that are not of this rank, the "
                f"first of shape {list(strange[0].shape)}: make it of module.parameters()"
            )
        self._keys = keys
        self._parameters = {key: parameter for parameter, key in keys.items()}

    def values(self) -> dict[str, Any]:
        """State and options of every parameter."""
        found: dict[str, Any] = {}
        for group in self._optimizer.param_groups:
            options = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                key = self._keys[parameter]
                found[_OPTIONS + key] = options
                for name, value in self._optimizer.state.get(parameter, {}).items():
                    found[f"{_STATE}{key}.{name}"] = value
        return found

    def keys_in(self, stored: Iterable[str]) -> list[str]:
        """The keys among these that belong to parameters of this rank."""
        own = {self._keys[p] for group in self._optimizer.param_groups for p in group["params"]}

        def belongs(key: str) -> bool:
            if key.startswith(_OPTIONS):
                return key.removeprefix(_OPTIONS) in own
            return key.startswith(_STATE) and key.removeprefix(_STATE).rpartition(".")[0] in own

        return [key for key in stored if belongs(key)]

    def empty(self, key: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor to read a state into, sharded as its parameter where it has its shape."""
        parameter = self._parameters[key.removeprefix(_STATE).rpartition(".")[0]]
        if parameter.shape == size:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    def load(self, values: Mapping[str, Any]) -> None:
        """Take up what `values` gave, on this or another rank.

        Raises:
            RuntimeFault: A parameter is missing, or the parameters of one group had different
                options.
        """
        states: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name.startswith(_STATE):
                key, _, leaf = name.removeprefix(_STATE).rpartition(".")
                states.setdefault(key, {})[leaf] = value
        saved = self._optimizer.state_dict()
        by_number: dict[Any, dict[str, Any]] = {}
        for group, described in zip(
            self._optimizer.param_groups, saved["param_groups"], strict=True
        ):
            keys = [self._keys[parameter] for parameter in group["params"]]
            described.update(_common_options(keys, values))
            numbers = dict(zip(keys, described["params"], strict=True))
            by_number |= {numbers[key]: states[key] for key in keys if key in states}
        self._optimizer.load_state_dict({**saved, "state": by_number})


def _common_options(keys: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    missing = [key for key in keys if _OPTIONS + key not in values]
    if missing:
        raise RuntimeFault(
            f"the checkpoint knows no optimizer of {missing[0]} ({len(missing)} such): give the "
            "optimizer the parameters that it had"
        )
    options = [values[_OPTIONS + key] for key in keys]
    for key, each in zip(keys, options, strict=True):
        if each != options[0]:
            raise RuntimeFault(
                f"{keys[0]} and {key} are in one group of the optimizer, and had different "
                "options in the checkpoint: make the groups as they were"
            )
    return options[0] if options else {}
