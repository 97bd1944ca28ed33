"""Find what a graph does not carry over from its model, and say so by module and attribute.

The copy in which a graph was captured has everything of the model (`model_copy.py`); the graph has
calls, parameters and buffers. What lies between the two becomes a note for the user: hooks of
modules that are no call of the graph, tensors that are learned but not registered, attributes that
forward changes, and translations of checkpoints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.capture.model_copy import HOOKS, STATE_HOOKS, walk
from passes.errors import CaptureError
from passes.ir.example_inputs import ExampleInputs
from passes.ir.held_values import PLAIN, contents, plain_attributes
from passes.ir.isolation import preserved, with_plain_transformers
from passes.ir.module_walk import named_submodules, named_tensors, set_mode
from passes.ir.run_step import output_leaves


def join_few(paths: Sequence[str]) -> str:
    """Join the first three paths and count the others.

    >>> join_few(["a", "b.0", "", "b.1", "b.2"])
    'a, b.0, the model itself and 2 more'
    """
    shown = ", ".join(path or "the model itself" for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def notes_on_graph(copied: nn.Module, module: fx.GraphModule) -> list[str]:
    """Return notes on what a graph does not carry over.

    Args:
        copied: The copy that the graph was captured in.
        module: The graph.
    """
    for buffer in module.buffers():
        if buffer.is_leaf:  # a constant that is learned elsewhere: `notes_on_runs` names it
            buffer.requires_grad_(False)
    return [*filter(None, (_silent_hooks(copied, module), _translations(copied)))]


def notes_on_runs(model: nn.Module, copied: nn.Module, inputs: ExampleInputs) -> list[str]:
    """Run a model in both modes; return notes on what it uses besides its own, and changes.

    Args:
        model: The user's model, which is not run.
        copied: A copy of it, which is left as it was.
        inputs: Its example inputs.

    Raises:
        CaptureError: The copy reads a tensor of the user's model.
    """
    with preserved(copied):
        before = _plain_values(copied)
        runs = [_learned(copied, inputs, train) for train in (True, False)]
        learned = [leaf for leaves, _ in runs for leaf in leaves]
        after = _plain_values(copied)
    names = dict.fromkeys((*before, *after))
    changing = [name for name in names if not _same(before.get(name), after.get(name))]
    _check_foreign(model, learned)
    notes = []
    if changing:
        notes.append(
            f"forward changes the attributes {join_few(changing)}, which keep state from one call "
            "to the next: the network computes as the model does in its present state; pass such a "
            "state in and return it instead"
        )
    if not all(trains for _, trains in runs):
        notes.append(
            "torch.utils.checkpoint(use_reentrant=True) gets inputs without gradients, so that the "
            "model does not train what it runs (torch warns of that); the network trains it: "
            "use_reentrant=False does in both"
        )
    return [*notes, *filter(None, [_unregistered(copied, learned)])]


def _learned(
    model: nn.Module, inputs: ExampleInputs, train: bool
) -> tuple[list[torch.Tensor], bool]:
    """Return the tensors, inputs aside, whose gradients the output of a mode leads to.

    Also return whether every reentrant checkpoint trains what it runs.
    """
    # `notes_on_runs` compares attributes as forward leaves them, and puts them back.
    with with_plain_transformers() as trains, torch.enable_grad():
        set_mode(model, train)
        args, kwargs = inputs.copied()
        try:
            outputs = output_leaves(model(*args, **kwargs))
        except Exception:  # the reference runs tell
            return [], True
    pending = [o.grad_fn for o in outputs if isinstance(o, torch.Tensor) and o.grad_fn is not None]
    seen: set[Any] = set()
    leaves: dict[int, torch.Tensor] = {}
    while pending:
        function: Any = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        if (variable := getattr(function, "variable", None)) is not None:
            leaves[id(variable)] = variable
        pending += [source for source, _ in function.next_functions if source is not None]
    return [*leaves.values()], all(trains)


def _check_foreign(model: nn.Module, learned: Iterable[torch.Tensor]) -> None:
    """Refuse a copy whose forward reads the user's own model.

    Raises:
        CaptureError: It does: code of the model names the model by a global variable.
    """
    theirs = {id(tensor): name for name, tensor in named_tensors(model, repeats=True)}
    for tensor in learned:
        if id(tensor) in theirs:
            raise CaptureError(
                f"forward reads {theirs[id(tensor)]} of the model that was passed, not that of the "
                "module that runs, so that a copy would train the model: reach it through self"
            )


def _unregistered(copied: nn.Module, learned: Iterable[torch.Tensor]) -> str:
    """Name the tensors that are learned, but no parameters of the model."""
    registered = {id(tensor) for _, tensor in named_tensors(copied, repeats=True)}
    unknown = [tensor for tensor in learned if id(tensor) not in registered]
    if not unknown:
        return ""
    paths = {id(value): path for path, value in walk(copied)}
    others = [paths.get(id(x), f"a tensor {list(x.shape)} outside the model") for x in unknown]
    return (
        f"{join_few(sorted(set(others)))}: not registered as parameters of the model, so "
        "that the network holds them as constants and does not train them; register them "
        "(nn.ParameterList, register_parameter), or compute them from parameters in forward"
    )


def _silent_hooks(copied: nn.Module, module: fx.GraphModule) -> str:
    """Name the hooks of modules that the graph does not call as a whole."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    silent = [
        path
        for path, child in named_submodules(copied)
        if _hooked(child)
        and not any(path == target or path.startswith(f"{target}.") for target in called)
    ]
    if not silent:
        return ""
    return (
        f"hooks of {join_few(silent)} are not called by the network, which has no such module: "
        "what a forward hook changes is part of the graph, what it collects is not"
    )


def _is_users(hook: Any) -> bool:
    """Whether a hook is not one of torch's own, such as that of `weight_norm`."""
    hook = getattr(hook, "hook", hook)  # torch wraps hooks of state dicts
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0] != "torch"


def _translations(copied: nn.Module) -> str:
    """Name the modules that translate checkpoints, which an artifact cannot."""
    paths = translating(copied)
    if not paths:
        return ""
    return (
        f"code of {join_few(paths)} takes part in saving and loading state (hooks, overridden "
        "methods, extra state): original_state_dict and load_original_state_dict run it, but not "
        "in a network that was loaded from an artifact without the model"
    )


def translating(model: nn.Module) -> list[str]:
    """Return the paths of the modules whose code takes part in saving and loading a model."""
    return [path for path, child in named_submodules(model) if _translates(child)]


def _translates(module: nn.Module) -> bool:
    """Whether a module changes what `state_dict` and `load_state_dict` do with its tensors."""
    if any(_is_users(hook) for name in STATE_HOOKS for hook in vars(module).get(name, {}).values()):
        return True
    owners = [_owner(type(module), name) for name in _CHECKPOINT_METHODS]
    return any(owner.partition(".")[0] != "torch" for owner in owners)


_CHECKPOINT_METHODS = (
    "state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict",
    "get_extra_state", "set_extra_state",
)  # fmt: skip


def _plain_values(model: nn.Module) -> Mapping[str, list[Any]]:
    """Return the numbers and tensors in every plain attribute of every module."""
    values: dict[str, list[Any]] = {}
    for path, module in named_submodules(model):
        hooks = [hook for name in HOOKS for hook in vars(module)[name].values()]
        computed = {getattr(hook, "name", "") for hook in hooks if not _is_users(hook)}
        for name, value in plain_attributes(module).items():
            if name not in computed:  # of weight_norm, which computes it before every call
                leaves = [value] if type(value) in (bool, int, float, str) else [*_leaves(value)]
                if leaves or value is None:
                    values[f"{path}.{name}".lstrip(".")] = leaves
    return values


def _leaves(value: Any) -> Iterable[Any]:
    for item in contents([value]):
        if isinstance(item, torch.Tensor):
            yield item.detach().clone()
        elif isinstance(item, dict):
            yield from (x for x in item.values() if type(x) in PLAIN)
        elif isinstance(item, list | tuple | set | deque):
            yield from (x for x in item if type(x) in PLAIN)
        elif isinstance(item, int | float | complex | str):
            yield item


def _same(before: list[Any] | None, after: list[Any] | None) -> bool:
    if before is None or after is None or len(before) != len(after):
        return False
    return all(map(_equal, before, after))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and (a.is_meta or bool(torch.isclose(a, b, equal_nan=True).all()))
    return type(a) is type(b) and bool(a == b)


def name_hooks_and_overrides(model: nn.Module) -> str:
    """Name the hooks and the `train()` of its own that a model has; "" if none.

    Nothing is run. The ladder adds this to the advice at the end of its error, when every rung has
    failed, as hooks and overrides often are the reason.
    """
    hooked = [path for path, module in named_submodules(model) if _hooked(module)]
    overriding = [
        path
        for path, module in named_submodules(model)
        if _owner(type(module), "train").partition(".")[0] != "torch"
    ]
    text = ""
    if hooked:
        text = (
            f"hooks of {join_few(hooked)} are part of forward: remove those that only look on "
            "(handle.remove()) before compiling\n"
        )
    if overriding:
        text += f"{join_few(overriding)} overrides train(), which the network does not call\n"
    return text


def _hooked(module: nn.Module) -> bool:
    return any(_is_users(hook) for name in HOOKS for hook in vars(module)[name].values())


def _owner(kind: type, name: str) -> str:
    """Return the Python module of the class that defines a method."""
    return next(base for base in kind.__mro__ if name in vars(base)).__module__
