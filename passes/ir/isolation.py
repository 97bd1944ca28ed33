"""Isolate runs of a model: restore its state, and lock what all threads of the process share.

torch patches classes while it traces (`nn.Module.__call__`) and has one random generator for all
threads. Code that does either holds `LOCK`: two compilations in two threads then take turns, and
models that run in other threads meanwhile are not affected (`exclusive`).
"""

from __future__ import annotations

import functools
import gc
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from torch.utils.checkpoint import CheckpointFunction

from passes.errors import CaptureError
from passes.ir.held_values import Attribute, complex_attributes, contents, has_entries, snapshot
from passes.ir.module_walk import named_parameters, named_submodules, submodules

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


@contextmanager
def rare_collection() -> Iterator[None]:
    """Make Python look for cyclic garbage less often, in all threads.

    Modules and nodes of a deep model are a million objects that live on: to look through them every
    700 allocations takes an eighth of a compilation.
    """
    with _COLLECTION:
        _THRESHOLDS.append(before := gc.get_threshold())
        if before[0]:  # 0: never
            gc.set_threshold(max(before[0], _ALLOCATIONS), *before[1:])
    try:
        yield
    finally:
        with _COLLECTION:  # blocks of other threads may go on: the last to end puts back the first
            if len(_THRESHOLDS) == 1:
                gc.set_threshold(*_THRESHOLDS[0])
            _THRESHOLDS.pop()


_COLLECTION, _THRESHOLDS = threading.Lock(), list[tuple[int, int, int]]()
"""A lock, and what every block of `rare_collection` that is at work found."""
_ALLOCATIONS = 100_000
"""Allocations between two searches for garbage, by `rare_collection`."""


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
    return _sources(modules, complex_attributes(submodules(*modules)))


def _sources(modules: Sequence[nn.Module], attributes: Sequence[Attribute]) -> list[RandomSource]:
    sources = [RandomSource("Python's random module", random.getstate, random.setstate)]
    if numpy := sys.modules.get("numpy"):
        functions = numpy.random.get_state, numpy.random.set_state
        sources.append(RandomSource("numpy's random module", *functions))
    for child, name, value in attributes:
        for leaf in contents([value]):
            if accessors := _generator_accessors(leaf):
                label = f"the {type(leaf).__name__} {_path(modules, child, name)!r}"
                sources.append(RandomSource(label, *accessors))
    return sources


def _generator_accessors(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """Return what reads and what writes the state of a random generator; None for other values."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if numpy and isinstance(value, numpy.random.RandomState):
        return value.get_state, value.set_state
    if numpy and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
    return None


def _path(modules: Sequence[nn.Module], child: nn.Module, attribute: str) -> str:
    """Return the qualified name of an attribute of a submodule."""
    named = (pair for module in modules for pair in named_submodules(module))
    path = next((path for path, module in named if module is child), "")
    return f"{path}.{attribute}".lstrip(".")


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, Python and numpy."""
    _seed_torch(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random generators of torch, and restore their state on exit."""
    with LOCK, torch.random.fork_rng():
        _seed_torch(seed)
        yield


def _seed_torch(seed: int) -> None:
    """Seed torch's generators; without an accelerator, not at the price of `torch.manual_seed`.

    That one takes a millisecond to look for devices, and a second at first, to import dynamo.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that watches operators, without torch's guard that keeps dynamo out of it.

    The guard costs time at every operator, and imports dynamo at the first one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        """Leave out what torch does here: it adds the guard."""


class DrawObserver(DispatchMode):
    """Observe whether this thread draws numbers from torch's random generators.

    Operators on fake or meta tensors draw none, nor does this count a generator that is passed.

    Attributes:
        drawn: Whether an operator drew numbers so far.
    """

    def __init__(self) -> None:
        super().__init__()
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
def with_plain_transformers() -> Iterator[list[bool]]:
    """Keep what torch offers to forward to what a graph can hold, in this thread.

    Transformer layers compare their mask with a causal one, and drop it then: a branch on values of
    a tensor. In evaluation without gradients they have a fast path, which returns zeros at padded
    positions. A reentrant checkpoint hides what it runs, and refuses to be differentiated alone.

    Yields:
        Whether each reentrant checkpoint trains what it runs: one of its inputs needs a gradient.
    """
    trains: list[bool] = []

    def declared(
        mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None
    ) -> bool:
        return is_causal is True

    def run(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        needed = any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)
        trains.append(needed or not torch.is_grad_enabled())
        return function(*args)

    kind: Any = CheckpointFunction
    with LOCK:
        original, fast = transformer._detect_is_causal_mask, mha.get_fastpath_enabled
        before, checkpointed = vars(kind).get("apply"), kind.apply
        transformer._detect_is_causal_mask = for_this_thread(declared, original)
        mha.get_fastpath_enabled = for_this_thread(lambda: False, fast)
        kind.apply = staticmethod(for_this_thread(run, checkpointed))
        try:
            yield trains
        finally:
            if before is None:
                del kind.apply
            else:
                kind.apply = before
            transformer._detect_is_causal_mask, mha.get_fastpath_enabled = original, fast


@contextmanager
def without_caches(model: nn.Module) -> Iterator[bool]:
    """Switch off the caches of models of transformers (`config.use_cache`), which are not tensors.

    Yields:
        Whether a configuration asks for one.
    """
    configs: list[Any] = [vars(module).get("config") for module in submodules(model)]
    asking = {id(c): c for c in configs if getattr(c, "use_cache", None) is True}
    with LOCK:
        for config in asking.values():
            config.use_cache = False
        try:
            yield bool(asking)
        finally:
            for config in asking.values():
                config.use_cache = True


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


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[Mapping[int, torch.Tensor]]:
    """Restore buffers, attributes, modes, gradients and all random generators on exit.

    Args:
        modules: The modules to restore, with all their submodules.

    Yields:
        Copies of the buffers and tensors to restore, by the `id` of these.
    """
    with LOCK, torch.random.fork_rng():
        children = submodules(*modules)
        attributes = complex_attributes(children)
        states = [(source, source.read()) for source in _sources(modules, attributes)]
        # A forward may count its calls, keep tensors for the next call, write to a buffer in place
        # or replace it by another tensor.
        # It may register hooks too, as models of transformers do at their first call.
        tables = [
            (table, dict(table))
            for child in children
            for table in (vars(child), child._buffers, *_hooks(child))
        ]
        held = [*contents(value for _, _, value in attributes)]
        containers = snapshot(held)
        tensors = [
            (leaf, leaf.detach().clone() if leaf.requires_grad else leaf.clone())
            for leaf in (*(t for child in children for t in child._buffers.values()), *held)
            if type(leaf) is torch.Tensor
            or (isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter))
        ]
        grads = [
            (p, p.grad) for child in children for p in child._parameters.values() if p is not None
        ]
        for parameter, grad in grads:
            if grad is not None:
                parameter.grad = None  # a backward inside a backward adds to it
        try:
            yield {id(tensor): value for tensor, value in tensors}
        finally:
            for table, entries in tables:
                if not has_entries(table, entries):
                    table.clear()
                    table.update(entries)
            for _, put_back in containers:
                put_back()
            _restore(tensors)
            for parameter, grad in grads:
                if parameter.grad is not grad:
                    parameter.grad = grad
            for source, state in states:
                source.write(state)


def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
    """Return the tables of a module's hooks."""
    return [t for name, t in vars(module).items() if "_hooks" in name and isinstance(t, dict)]


@contextmanager
def parameters_preserved(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Check on exit that the parameters of a module are what they were, and put them back if not.

    Args:
        module: The module.
        values: Copies of its parameters, by name.

    Raises:
        CaptureError: The code in the block changed or replaced a parameter.
    """
    parameters = dict(named_parameters(module))
    children = submodules(module)
    storages = {name: parameter.data for name, parameter in parameters.items()}
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        yield
    finally:
        changed, toggled = [], []
        for name, parameter in parameters.items():
            if parameter.requires_grad != flags[name]:
                toggled.append(name)
                parameter.requires_grad_(flags[name])
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
    if toggled:
        raise CaptureError(
            f"forward sets requires_grad of the parameter {toggled[0]}, which no graph can hold: "
            "set it outside forward"
        )
    after = dict(named_parameters(module))
    if [*map(id, after.values())] != [*map(id, parameters.values())] or (
        [*map(id, submodules(module))] != [*map(id, children)]
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
    a, b = strided(a), strided(b)
    if a.dtype.itemsize == 1 and a.is_floating_point():  # float8 has no comparison of its own
        a, b = a.float(), b.float()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is stored densely; sparse ones are converted."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _restore(tensors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy values back in place, those of most buffers of a model by one call."""
    targets, values, others = list[torch.Tensor](), list[torch.Tensor](), []
    for tensor, value in tensors:
        if type(tensor) is torch.Tensor and tensor.is_cpu and tensor.is_contiguous():
            targets.append(tensor.detach() if tensor.requires_grad else tensor)
            values.append(value)
        else:
            others.append((tensor.detach(), value))
    with torch.no_grad():
        if targets:
            torch._foreach_copy_(targets, values)
        for tensor, value in others:
            _restore_one(tensor, value)


def _restore_one(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy values back in place; torch refuses to write to the repeats of an expanded tensor."""
    if tensor.layout is torch.strided:
        for axis, step in enumerate(tensor.stride()):
            if step == 0 and tensor.shape[axis] > 1:
                tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)
