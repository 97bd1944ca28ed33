"""Walk over modules and their tensors, without calling a method of theirs.

A model may override what it is asked here (`modules`, `children`), and the walks of `nn.Module` are
nested generators: for a thousand layers they take ten times as long.

>>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
>>> [path for path, _ in named_submodules(model)] == [path for path, _ in model.named_modules()]
True
>>> [name for name, _ in named_buffers(model)]
['1.running_mean', '1.running_var', '1.num_batches_tracked']
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn


def submodules(*modules: nn.Module) -> list[nn.Module]:
    """Return modules and all their submodules, once each, parents first."""
    reached: dict[int, nn.Module] = {}
    pending = [*reversed(modules)]
    while pending:
        module = pending.pop()
        if id(module) not in reached:
            reached[id(module)] = module
            if children := module._modules:
                pending += [child for child in children.values() if child is not None][::-1]
    return [*reached.values()]


def named_submodules(root: nn.Module, *, repeats: bool = False) -> list[tuple[str, nn.Module]]:
    """Return a module and all its submodules with their paths, as `nn.Module.named_modules` does.

    Args:
        root: The module.
        repeats: Whether a module that has several paths is listed under each.
    """
    named: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending = [("", root)]
    while pending:
        path, module = pending.pop()
        if not repeats:
            if id(module) in seen:
                continue
            seen.add(id(module))
        named.append((path, module))
        if children := module._modules:
            stem = f"{path}." if path else ""
            below = [(stem + name, child) for name, child in children.items() if child is not None]
            pending += reversed(below)
    return named


def submodule(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule of a path, as `nn.Module.get_submodule` does.

    Raises:
        AttributeError: There is none.
    """
    module: nn.Module | None = root
    try:
        for name in path.split("."):
            module = module._modules[name]  # type: ignore[union-attr]
    except (KeyError, AttributeError):
        module = None
    return root.get_submodule(path) if module is None else module


def named_parameters(root: nn.Module, *, repeats: bool = False) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters with their names, as `nn.Module.named_parameters` does.

    Args:
        root: The module.
        repeats: Whether a parameter that has several names is listed under each.
    """
    return _named(root, "_parameters", repeats)


def named_buffers(root: nn.Module, *, repeats: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers with their names, as `nn.Module.named_buffers` does.

    Args:
        root: The module.
        repeats: Whether a buffer that has several names is listed under each.
    """
    return _named(root, "_buffers", repeats)


def named_tensors(root: nn.Module, *, repeats: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters, then the buffers, with their names."""
    return [*named_parameters(root, repeats=repeats), *named_buffers(root, repeats=repeats)]


def num_parameters(module: nn.Module) -> int:
    """Return the number of numbers in the parameters."""
    return sum(parameter.numel() for _, parameter in named_parameters(module))


def _named(root: nn.Module, table: str, repeats: bool) -> list[tuple[str, Any]]:
    named: list[tuple[str, Any]] = []
    seen: set[int] = set()
    for path, module in named_submodules(root, repeats=repeats):
        if not (tensors := getattr(module, table)):
            continue
        stem = f"{path}." if path else ""
        for name, tensor in tensors.items():
            if tensor is None or id(tensor) in seen:
                continue
            if not repeats:
                seen.add(id(tensor))
            named.append((stem + name, tensor))
    return named


_MODE_ATTRIBUTES = ("train", "training", "children", "named_children", "__setattr__")
"""What `nn.Module.train` uses of a module."""


def set_mode(module: nn.Module, train: bool, *, afresh: bool = False) -> bool:
    """Set the mode of a module; one that has a fixed mode, as torch.export makes, keeps it.

    Args:
        module: The module.
        train: Whether to set training mode.
        afresh: Whether to go through training mode, which drops what a `train()` of the module's
            own caches in evaluation mode.

    Returns:
        Whether code of the module itself did it, which may do other things too.
    """
    children = submodules(module)
    overrides = any("train" in vars(child) for child in children) or any(
        getattr(kind, name, None) is not getattr(nn.Module, name, None)
        for kind in {*map(type, children)}
        for name in _MODE_ATTRIBUTES
    )
    if overrides:
        with suppress(NotImplementedError):
            if afresh:
                module.train(True)
            module.train(train)
        return True
    for child in children:  # what nn.Module.train does
        vars(child)["training"] = train
    return False
