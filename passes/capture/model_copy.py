"""Copy a model, so that the copy computes, trains and reports as the model does.

`copy.deepcopy` alone loses what several parts of a model have in common, and what it takes for a
plain value. Before it runs, its memo is filled with:

| of the model | in the copy |
|---|---|
| parameters over one storage (`a.weight.data = b.weight.data`) | parameters over one storage |
| tensors that an earlier forward computed (old `weight_norm`) | their values |
| gradient hooks and attributes of parameters | the same |
| functions that hold a part of the model (a replaced `forward`) | functions that hold the copy's |
| hooks that hold no part of the model, locks, Python modules, process groups | the same objects |
| wrappers (`torch.compile`, `DataParallel`) | plain modules with the same names of weights |
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from passes.errors import CaptureError, first_line
from passes.ir.held_values import nested_codes, plain_attributes
from passes.ir.module_walk import named_submodules, named_tensors, submodules
from passes.ir.program import storage_id

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Attributes of a module that hold the hooks of its calls."""

STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""Attributes of a module that hold the hooks of its state dict."""

ENCLOSED = "_enclosed"
"""Name in the network of a model whose own names a GraphModule cannot have at its root."""

_WRAPPERS = {
    "passes.capture.model_copy.Enclosing": ENCLOSED,
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",  # the import takes a second
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}
"""Classes of modules that run another one, and the name under which they hold it."""

_SHARDED = {"FullyShardedDataParallel", "FSDPModule", "DTensor", "FlatParameter"}
_SHARED: tuple[type, ...] = (
    types.ModuleType, type(threading.Lock()), type(threading.RLock()), threading.local,
    fx.Node,  # of a graph, which copies its own nodes
    CustomOpDef, torch._ops.OpOverload, torch._ops.OpOverloadPacket,  # registered once a process
)  # fmt: skip
if torch.distributed.is_available():
    _SHARED = (*_SHARED, torch.distributed.ProcessGroup)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)
_STRUCTURE = (
    "parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules",
    "children", "named_children", "get_submodule", "zero_grad", "requires_grad_", "eval",
)  # fmt: skip
"""Methods of nn.Module that torch calls on the root of a model alone, never on a submodule."""


class _Unwrapped(nn.Module):
    """Stands for a wrapper in a copy: calls the wrapped module, which keeps its name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = self.children()
        return module(*args, **kwargs)


class Enclosing(nn.Module):
    """Hold a model one level down, where its names clash with none of a GraphModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(ENCLOSED, model)
        self.training = model.training


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that a model runs: the model, or what its wrappers hold.

    Raises:
        CaptureError: The model is one that Python code of a module no longer describes.
    """
    while name := _wrapped(model):
        model = getattr(model, name)
    for path, module in named_submodules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path or 'the model'} is a TorchScript module "
                f"({getattr(module, 'original_name', type(module).__name__)}), whose Python code "
                "is gone: pass the module that was given to torch.jit.script or torch.jit.trace"
            )
        held: dict[str, Any] = {**module._parameters, **module._buffers}
        if empty := [key for key, tensor in held.items() if is_lazy(tensor)]:
            raise CaptureError(
                f"{f'{path}.{empty[0]}'.lstrip('.')} of a {type(module).__name__} has no values "
                "yet: call the model once before compiling"
            )
        kinds = {kind.__name__ for kind in type(module).__mro__}
        kinds |= {type(parameter).__name__ for parameter in module._parameters.values()}
        if sharded := sorted(kinds & _SHARDED):
            raise CaptureError(
                f"{path or 'the model'} is sharded over ranks ({sharded[0]}): pass the model as it "
                "is before it is sharded; compiled.distribute(shard=True) shards the network"
            )
    return model


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return a module that runs the user's own model, under the names of its wrappers.

    Of `torch.compile(net)` it calls `net` itself, as a child called `_orig_mod`.
    """
    if not (name := _wrapped(model)):
        return model
    shell = _Unwrapped()
    shell.add_module(name, without_wrappers(getattr(model, name)))
    shell.training = model.training
    return shell


def _wrapped(value: Any) -> str:
    """Return the name under which a wrapper holds its module; "" for anything else."""
    return _WRAPPERS.get(f"{type(value).__module__}.{type(value).__qualname__}", "")


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model that has no module and no tensor in common with it.

    Raises:
        CaptureError: The model cannot be copied, or a part of the copy still is the model's.
    """
    name = type(unwrap(model)).__name__
    reached = list(walk(model))
    memo = _Memo(model, reached)
    try:
        memo.fill()
        result = copy.deepcopy(model, memo.entries)
    except Exception as error:
        place = _find_uncopyable(model, memo.shared)
        raise CaptureError(
            f"{name} cannot be copied: {place or first_line(error)}; set the attribute to None "
            "before compiling, or give its class a __deepcopy__ method"
        ) from error
    assert isinstance(result, nn.Module)
    memo.finish(result)
    for path, value in walk(result):
        if id(value) in memo.parts:
            raise CaptureError(
                f"{name} cannot be copied: {path} of the copy still is the model's own "
                f"{type(value).__name__}, so that training the network would train the model; "
                "hold it by an attribute of a module instead"
            )
    return result


def walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield everything that an object holds, with paths such as `blocks.1.scales[0]`, once each.

    Functions hold what their closures, defaults, attributes and global names do.
    """
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", root)]
    while pending:
        path, value = pending.pop()
        if type(value) in _VALUES or isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        yield path.lstrip("."), value
        pending += reversed(list(_children(path, value)))


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds directly."""
    attributes: Any = {}
    if isinstance(value, nn.Module):
        if name := _wrapped(value):
            yield f"{path}.{name}", getattr(value, name)
            return
        attributes = {**value._modules, **value._parameters, **value._buffers}
        for key, item in vars(value).items():
            # Most of them are numbers, and registries of hooks that are empty.
            empty = type(item) in _TABLES and not item
            if key not in _REGISTRIES and type(item) not in _VALUES and not empty:
                attributes[key] = item
    elif isinstance(value, torch.Tensor):
        yield from ((f"{path} (hook)", hook) for hook in _tensor_hooks(value))
        attributes = _attributes(value)
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            yield from ((path, key), (f"{path}[{key!r}]", item))
    elif isinstance(value, list | tuple | deque):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from ((path, item) for item in value)
    elif isinstance(value, types.MethodType):
        yield path, value.__self__
        if not _is_of_class(value):
            yield path, value.__func__
    elif isinstance(value, functools.partial):
        yield from ((path, item) for item in (value.func, value.args, value.keywords))
    elif isinstance(value, weakref.ref):
        yield path, value()
    elif isinstance(value, types.FunctionType):
        yield from ((f"{path} ({held})", item) for held, item in _held(value))
    elif not isinstance(value, _SHARED):
        attributes = _attributes(value)
    yield from ((f"{path}.{key}", item) for key, item in list(attributes.items()))


_REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    try:
        attributes = dict(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        attributes = {}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if isinstance(vars(kind).get(slot), types.MemberDescriptorType):
                attributes[slot] = getattr(value, slot, None)
    return attributes


def _is_of_class(method: types.MethodType) -> bool:
    return getattr(type(method.__self__), method.__func__.__name__, None) is method.__func__


def _held(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function holds besides its code, by name; nothing of a function of torch."""
    if (original := getattr(function, _COMPILED_FROM, None)) is not None:
        yield "", original  # of torch.compile: the rest belongs to torch
        return
    if str(function.__module__).partition(".")[0] != "torch":
        yield from ((name, function.__globals__[name]) for name in _global_names(function))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "default", function.__defaults__
    yield "default", function.__kwdefaults__
    yield "attribute", vars(function)


def _global_names(function: types.FunctionType) -> list[str]:
    """Return the global names that the code of a function, nested functions included, mentions."""
    names = {name for code in nested_codes(function.__code__) for name in code.co_names}
    return sorted(names & function.__globals__.keys())


_COMPILED_FROM = "_torchdynamo_orig_callable"


def _tensor_hooks(tensor: torch.Tensor) -> list[Any]:
    """Return the gradient hooks of a leaf, in order."""
    if not tensor.is_leaf:
        return []
    hooks = [*(tensor._backward_hooks or {}).values()]
    return [*hooks, *(tensor._post_accumulate_grad_hooks or {}).values()]


class _Memo:
    """What `copy.deepcopy` must not decide by itself.

    Args:
        model: The model.
        reached: Everything that it holds.

    Attributes:
        entries: Copies by the id of the original, as `copy.deepcopy` takes them.
        shared: Those of them that are the originals.
        parts: Ids of the modules, parameters and buffers of the model.
    """

    def __init__(self, model: nn.Module, reached: Iterable[tuple[str, Any]]) -> None:
        self.entries: dict[int, Any] = {}
        self.shared: dict[int, Any] = {}
        self.model = model
        self._values = [value for _, value in reached]  # alive, so that ids stay theirs
        self._modules = submodules(model)
        tensors = (tensor for _, tensor in named_tensors(model, repeats=True))
        self.parts = {id(part) for part in (*self._modules, *tensors)}

    def fill(self) -> None:
        """Add the copies of everything that needs care."""
        for value in self._values:
            if isinstance(value, (*_SHARED, FakeTensor)):
                self.entries[id(value)] = value
        for hook in self._hooks():
            if not self._reaches(hook):
                self.entries[id(hook)] = hook
                if isinstance(hook, types.MethodType):
                    self.entries[id(hook.__self__)] = hook.__self__
        self.shared = dict(self.entries)
        functions = [v for v in self._values if isinstance(v, types.FunctionType)]
        shells = [(f, _shell(f)) for f in functions if self._must_copy(f)]
        wrappers = [module for module in self._values if _wrapped(module)]
        self.entries |= {id(function): shell for function, shell in shells}
        for wrapper in wrappers:
            self._unwrap(wrapper)
        tensors = [v for v in self._values if isinstance(v, torch.Tensor)]
        self._copy_tensors([t for t in tensors if id(t) not in self.entries])
        for function, shell in shells:
            self._fill_shell(function, shell)
        for wrapper in wrappers:
            inner = copy.deepcopy(getattr(wrapper, name := _wrapped(wrapper)), self.entries)
            self.entries[id(wrapper)].add_module(name, inner)
        self._copy_layers()

    def _copy_layers(self) -> None:
        """Copy modules of tensors and plain values as `copy.deepcopy` would, in less time.

        It takes each of the ten empty tables of hooks that a module has for an object to rebuild.
        """
        for module in self._modules[::-1] * 2:  # children first, and those that are shared
            kind: Any = type(module)
            ready = all(id(x) in self.entries for x in module._modules.values() if x is not None)
            if not ready or id(module) in self.entries or not _is_plain_layer(module):
                continue
            state = {
                name: type(value)() if type(value) in _TABLES else value
                for name, value in vars(module).items()
            }
            for table in _REGISTRIES:
                parts = vars(module)[table].items()
                state[table] |= {key: copy.deepcopy(part, self.entries) for key, part in parts}
            self.entries[id(module)] = layer = kind.__new__(kind)
            layer.__setstate__(state)

    def _hooks(self) -> Iterator[Any]:
        for module in self._modules:
            for name in (*HOOKS, *STATE_HOOKS):
                yield from vars(module).get(name, {}).values()
        for value in self._values:
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                yield from _tensor_hooks(value)

    def _reaches(self, holder: Any) -> bool:
        return any(id(value) in self.parts for _, value in walk(holder))

    def _must_copy(self, function: types.FunctionType) -> bool:
        return not hasattr(function, _COMPILED_FROM) and self._reaches(function)

    def _fill_shell(self, function: types.FunctionType, shell: types.FunctionType) -> None:
        """Let a copied function hold the copy's parts, and everything else as it is."""

        def copied(value: Any) -> Any:
            return copy.deepcopy(value, self.entries) if self._reaches(value) else value

        for name in _global_names(function):
            shell.__globals__[name] = copied(function.__globals__[name])
        for source, target in zip(function.__closure__ or (), shell.__closure__ or (), strict=True):
            with suppress(ValueError):  # a cell that is not assigned yet
                target.cell_contents = copied(source.cell_contents)
        shell.__defaults__ = copied(function.__defaults__)
        shell.__kwdefaults__ = copied(function.__kwdefaults__)
        vars(shell).update(copied(vars(function)))

    def _unwrap(self, wrapper: nn.Module) -> None:
        kind = type(type(unwrap(wrapper)).__name__, (_Unwrapped,), {})
        self.entries[id(wrapper)] = kind().train(wrapper.training)

    def _copy_tensors(self, tensors: Collection[torch.Tensor]) -> None:
        owners: dict[int, int] = {}
        for tensor in tensors:
            if (storage := storage_id(tensor)) is not None:
                owners[storage] = owners.get(storage, 0) + 1
        for tensor in tensors:
            shared = owners.get(storage_id(tensor) or 0, 0) > 1
            if not tensor.is_leaf or (shared and type(tensor) is nn.Parameter):
                # A plain tensor keeps what it shares with others of the memo; a Parameter does not.
                result = copy.deepcopy(tensor.detach(), self.entries)
                if isinstance(tensor, nn.Parameter):
                    result = nn.Parameter(result, tensor.requires_grad)
                self.entries[id(tensor)] = result.requires_grad_(tensor.requires_grad)
            elif isinstance(tensor, nn.Parameter) or _tensor_hooks(tensor):
                self.entries[id(tensor)] = copy.deepcopy(tensor, self.entries)

    def finish(self, result: nn.Module) -> None:
        """Complete a copy: gradient hooks, attributes of parameters, compiled forwards, roots."""
        for tensor in self._values:
            copied = self.entries.get(id(tensor))
            if isinstance(copied, torch.Tensor) and copied is not tensor and tensor.is_leaf:
                target: Any = copied  # its methods are untyped
                for hook in (tensor._backward_hooks or {}).values():
                    target.register_hook(copy.deepcopy(hook, self.entries))
                for hook in (tensor._post_accumulate_grad_hooks or {}).values():
                    target.register_post_accumulate_grad_hook(copy.deepcopy(hook, self.entries))
                vars(copied).update(copy.deepcopy(_attributes(tensor), self.entries))
        for module in nn.Module.modules(result):
            for name, value in list(vars(module).items()):
                if isinstance(value, weakref.ref) and id(value()) in self.entries:
                    vars(module)[name] = weakref.ref(self.entries[id(value())])
                elif isinstance(value, types.FunctionType) and hasattr(value, _COMPILED_FROM):
                    original = getattr(value, _COMPILED_FROM)
                    vars(module)[name] = copy.deepcopy(original, self.entries)
                elif isinstance(value, types.MethodType) and id(value.__func__) in self.entries:
                    function = self.entries[id(value.__func__)]
                    vars(module)[name] = types.MethodType(function, value.__self__)
        _drop_computed(result)
        result.__class__ = _plain_root(type(result))


_TABLES = frozenset({dict, OrderedDict, set})


def _is_plain_layer(module: nn.Module) -> bool:
    """Whether a module holds children, tensors, plain values and empty tables, and no more."""
    kind: Any = type(module)
    return (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__getstate__ in (object.__getstate__, vars(nn.Module).get("__getstate__"))
        and kind.__new__ is object.__new__
        and not hasattr(kind, "__deepcopy__")
        and all(
            (not value or name in _REGISTRIES)
            if type(value) in _TABLES
            else {*map(type, value if type(value) is tuple else (value,))} <= _VALUES
            for name, value in vars(module).items()
        )
    )


_VALUES = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})


def _shell(function: types.FunctionType) -> types.FunctionType:
    """Return a function with the same code and empty closure cells."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    names = dict(function.__globals__)
    shell = types.FunctionType(function.__code__, names, function.__name__, None, cells)
    shell.__qualname__, shell.__doc__ = function.__qualname__, function.__doc__
    return shell


def _drop_computed(model: nn.Module) -> None:
    """Let modules that clear a cache in `train()` clear it, and keep all modes as they are."""
    modes = [(module, module.training) for module in nn.Module.modules(model)]
    for module, _ in modes:
        overridden: Any = type(module).train
        if overridden is not nn.Module.train and any(
            isinstance(value, torch.Tensor) for _, value in walk(plain_attributes(module))
        ):
            module.train(True)
    for module, mode in modes:
        module.training = mode


def _plain_root(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class whose structure torch can list as that of a submodule."""
    overridden: dict[str, Callable[..., Any]] = {}
    for name in _STRUCTURE:
        base = next(base for base in kind.__mro__ if name in vars(base))
        if not base.__module__.startswith("torch."):
            overridden[name] = getattr(nn.Module, name)
    return type(kind.__name__, (kind,), overridden) if overridden else kind


def _find_uncopyable(model: nn.Module, shared: dict[int, Any]) -> str:
    """Name the first attribute of a module that cannot be copied by itself; "" if there is none."""
    entries = {**shared, **{id(module): module for module in nn.Module.modules(model)}}
    for path, module in named_submodules(model):
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(entries))
            except Exception as error:
                where = f"{path}.{name}".lstrip(".")
                return f"attribute {where} is a {type(value).__name__} ({first_line(error)})"
    return ""
