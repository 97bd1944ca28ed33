"""Isolate runs of a model: restore its state, and lock what all threads of the process share.

torch patches classes while it traces (`nn.Module.__call__`) and has one random generator for all
threads. Code that does either holds `LOCK`: two compilations in two threads then take turns, and
models that run in other threads meanwhile are not affected (`exclusive`).
"""

from __future__ import annotations

import functools
import pickle
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.backends import mha
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from passes.errors import CaptureError

_functorch: Any = torch._C._functorch

LOCK = threading.RLock()
"""Guards the state that all threads share: patched methods, random state, backend flags."""

_Patcher: Any = fx._symbolic_trace._Patcher
"""Patches methods on behalf of the tracers of torch.fx and torch.export."""


@contextmanager
def exclusive() -> Iterator[None]:
    """Hold the process lock, and limit methods that torch patches meanwhile to this thread.

    A tracer wraps `nn.Module.__call__` for the whole process: a layer that another thread calls
    would become part of the graph, or fail. Inside this block a wrapper acts only in the thread
    that installed it, and only until the block ends; otherwise it calls the wrapped method. Levels
    of torch.func (vmap, grad, jvp) that a failed trace has entered are left.
    """
    with LOCK:
        owner, active = threading.get_ident(), [True]
        levels = _functorch.get_dynamic_layer_stack_depth()
        patch = _Patcher.patch_method

        @functools.wraps(patch)
        def patch_for_thread(self: Any, cls: type, name: str, new: Any, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
            original = getattr(cls, name)

            @functools.wraps(new)
            def method(*args: Any, **kwargs: Any) -> Any:
                is_ours = active and threading.get_ident() == owner
                return (new if is_ours else original)(*args, **kwargs)

            return patch(self, cls, name, method, *args, **kwargs)

        _Patcher.patch_method = patch_for_thread
        try:
            yield
        finally:
            active.clear()
            _Patcher.patch_method = patch
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(levels)
            if forward_ad._current_level < 0:
                _leave_dual_level()


def _leave_dual_level() -> None:
    """Leave the level of forward-mode differentiation that a failed trace has entered, if any."""
    engine: Any = torch._C
    try:
        level = engine._enter_dual_level()
    except RuntimeError:  # there is one, and levels do not nest
        level = 0
    engine._exit_dual_level(level=level)


@dataclass(frozen=True)
class RandomSource:
    """A random generator that a model can reach.

    Attributes:
        name: What it is, for messages.
        read: Returns its state.
        write: Puts a state back.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]

    def state(self) -> bytes:
        """Return the state as bytes, to compare it with another."""
        state = self.read()
        return bytes(state.tolist()) if isinstance(state, torch.Tensor) else pickle.dumps(state)


def random_sources(*modules: nn.Module) -> list[RandomSource]:
    """Return the generators of Python and numpy, and those that the modules hold.

    torch's own generators are not among them: operators of a graph may draw from these.
    """
    sources = [RandomSource("Python's random module", random.getstate, random.setstate)]
    if numpy := sys.modules.get("numpy"):
        functions = numpy.random.get_state, numpy.random.set_state
        sources.append(RandomSource("numpy's random module", *functions))
    for module in modules:
        for path, child in nn.Module.named_modules(module):
            for name, value in vars(child).items():
                if name in _TORCH_TABLES or _is_plain(value):
                    continue
                label = f"{path}.{name}".lstrip(".")
                sources += _generators(label, pytree.tree_leaves(value))
    return sources


def _generators(label: str, values: list[Any]) -> Iterator[RandomSource]:
    """Make a source of every generator among the values of an attribute."""
    numpy = sys.modules.get("numpy")
    for value in values:
        name = f"the {type(value).__name__} {label!r}"
        if isinstance(value, torch.Generator):
            yield RandomSource(name, value.get_state, value.set_state)
        elif isinstance(value, random.Random):
            yield RandomSource(name, value.getstate, value.setstate)
        elif numpy and isinstance(value, numpy.random.RandomState):
            yield RandomSource(name, value.get_state, value.set_state)
        elif numpy and isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            write = functools.partial(setattr, bits, "state")
            yield RandomSource(name, functools.partial(getattr, bits, "state"), write)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@contextmanager
def _same_random_state(*modules: nn.Module) -> Iterator[None]:
    """Restore every generator on exit."""
    with torch.random.fork_rng():
        states = [(source, source.read()) for source in random_sources(*modules)]
        try:
            yield
        finally:
            for source, state in states:
                source.write(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random generators of torch, and restore their state on exit."""
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class DrawObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Observe whether this thread draws numbers from torch's random generators.

    Operators on fake or meta tensors draw none, nor does this count a generator that is passed.

    Attributes:
        drawn: Whether an operator drew numbers so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and note whether it drew numbers."""
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not (kwargs or {}).get("generator"):
            self.drawn |= any(
                isinstance(leaf, torch.Tensor)
                and not isinstance(leaf, FakeTensor)
                and leaf.device.type != "meta"
                for leaf in pytree.tree_leaves(result)
            )
        return result


@contextmanager
def with_plain_transformers() -> Iterator[None]:
    """Keep torch's transformer layers to what a graph can hold, in this thread.

    They compare their mask with a causal one, and drop it then: a branch on values of a tensor. In
    evaluation without gradients they have a fast path, which returns zeros at padded positions.
    """

    def declared(
        mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None
    ) -> bool:
        return is_causal is True

    with LOCK:
        original, fast = transformer._detect_is_causal_mask, mha.get_fastpath_enabled
        transformer._detect_is_causal_mask = for_this_thread(declared, original)
        mha.get_fastpath_enabled = for_this_thread(lambda: False, fast)
        try:
            yield
        finally:
            transformer._detect_is_causal_mask, mha.get_fastpath_enabled = original, fast


def for_this_thread(new: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `new` in the current thread and `original` in others."""
    owner = threading.get_ident()

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == owner else original)(*args, **kwargs)

    return dispatch


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Restrict cuDNN to deterministic kernels; no effect on a CPU."""
    cudnn: Any = torch.backends.cudnn
    with LOCK:
        flags = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = flags


_TORCH_TABLES = frozenset(vars(nn.Module()))
"""Attributes in which nn.Module keeps its parameters, buffers, submodules, hooks and its mode."""


def set_mode(module: nn.Module, train: bool) -> None:
    """Set the mode of a module; one that has a fixed mode, as torch.export makes, keeps it."""
    with suppress(NotImplementedError):
        module.train(train)


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Restore buffers, attributes, modes, gradients and all random generators on exit.

    Args:
        modules: The modules to restore, with all their submodules.
    """
    with LOCK, _same_random_state(*modules):
        # Unbound, as a model may override what it is asked here.
        children = [c for module in modules for _, c in nn.Module.named_modules(module)]
        # A forward may write to a buffer in place, or replace it by another tensor.
        saved = [
            (child._buffers, name, tensor, None if tensor is None else tensor.detach().clone())
            for child in children
            for name, tensor in child._buffers.items()
        ]
        attributes = [_Attributes(child) for child in children]
        modes = [(child, child.training) for child in children]
        grads = [(p, p.grad) for module in modules for _, p in nn.Module.named_parameters(module)]
        try:
            yield
        finally:
            with torch.no_grad():
                for child in children:
                    child._buffers.clear()
                for buffers, name, tensor, value in saved:
                    buffers[name] = tensor
                    if tensor is not None and value is not None:
                        _restore(tensor, value)
                for record in attributes:
                    record.restore()
            for child, mode in modes:
                child.training = mode
            for parameter, grad in grads:
                parameter.grad = grad


_PLAIN = frozenset({bool, int, float, str, type(None)})


def _is_plain(value: Any) -> bool:
    """Whether an attribute is a number, a text or a tuple of these, as nearly all of torch.nn are.

    Flattening such a value takes longer than looking at it, and a deep model has thousands.
    """
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value))


class _Attributes:
    """Plain attributes of a module: what is bound to them, and what containers and tensors hold.

    A forward may count its calls, or keep tensors for the next call (`self.cache = ...`).

    Args:
        module: The module, without its submodules.
    """

    def __init__(self, module: nn.Module) -> None:
        self._table = vars(module)
        self._values = {k: v for k, v in self._table.items() if k not in _TORCH_TABLES}
        self._contents = [
            (value, type(value)(value))
            for value in self._values.values()
            if type(value) in (list, dict, set)
        ]
        self._contents += [(v, v.copy()) for v in self._values.values() if type(v) is deque]
        self._tensors = [
            (leaf, leaf.detach().clone())
            for leaf in pytree.tree_leaves([v for v in self._values.values() if not _is_plain(v)])
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter)
        ]

    def restore(self) -> None:
        """Put everything back."""
        for name in [name for name in self._table if name not in _TORCH_TABLES]:
            if name not in self._values:
                del self._table[name]
        self._table.update(self._values)
        for container, content in self._contents:
            container.clear()
            add = container.extend if isinstance(container, list | deque) else container.update
            add(content)
        for tensor, value in self._tensors:
            _restore(tensor, value)


@contextmanager
def parameters_preserved(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Check on exit that the parameters of a module are what they were, and put them back if not.

    Args:
        module: The module.
        values: Copies of its parameters, by name.

    Raises:
        CaptureError: The code in the block changed or replaced a parameter.
    """
    parameters = dict(nn.Module.named_parameters(module))
    children = [child for _, child in nn.Module.named_modules(module)]
    storages = {name: parameter.data for name, parameter in parameters.items()}
    try:
        yield
    finally:
        changed = []
        for name, parameter in parameters.items():
            if not same_values(parameter, values[name]):
                changed.append(name)
                parameter.data = storages[name]
                with torch.no_grad():
                    parameter.copy_(values[name])
    if changed:
        raise CaptureError(
            f"forward changes the parameter {changed[0]}, which no graph can hold: make it a "
            "buffer, or change it outside forward"
        )
    after = dict(nn.Module.named_parameters(module))
    modules = [child for _, child in nn.Module.named_modules(module)]
    if [*map(id, after.values())] != [*map(id, parameters.values())] or (
        [*map(id, modules)] != [*map(id, children)]
    ):
        raise CaptureError(
            "forward adds or replaces parameters or submodules, which no graph can hold: call the "
            "model once before you compile it, or build them in __init__"
        )


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape and values; NaNs are equal, layouts do not matter."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return True
    a, b = strided(a.detach()), strided(b.detach())
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is stored densely; sparse ones are converted."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _restore(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy values back in place; torch refuses to write to the repeats of an expanded tensor."""
    tensor = tensor.detach()
    if tensor.layout is torch.strided:
        for axis, step in enumerate(tensor.stride()):
            if step == 0 and tensor.shape[axis] > 1:
                tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)
