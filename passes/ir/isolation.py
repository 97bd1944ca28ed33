"""Isolate runs of a model: restore its state, and lock what all threads of the process share.

torch patches classes while it traces (`nn.Module.__call__`) and has one random generator for all
threads. Code that does either holds `LOCK`: two compilations in two threads then take turns, and
models that run in other threads meanwhile are not affected (`exclusive`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LOCK = threading.RLock()
"""Guards the state that all threads share: patched methods, random state, backend flags."""

_Patcher: Any = fx._symbolic_trace._Patcher
"""Patches methods on behalf of the tracers of torch.fx and torch.export."""


@contextmanager
def exclusive() -> Iterator[None]:
    """Hold the process lock, and limit methods that torch patches meanwhile to this thread.

    A tracer wraps `nn.Module.__call__` for the whole process: a layer that another thread calls
    would become part of the graph, or fail. Inside this block a wrapper acts only in the thread
    that installed it, and only until the block ends; otherwise it calls the wrapped method.
    """
    with LOCK:
        owner, active = threading.get_ident(), [True]
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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random generators, and restore their state on exit."""
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
def without_causal_detection() -> Iterator[None]:
    """Keep torch's transformer layers from comparing their mask with a causal one.

    They drop a mask that is causal, which is a branch on values of a tensor: no graph can hold it.
    """

    def declared(
        mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None
    ) -> bool:
        return is_causal is True

    with LOCK:
        original = transformer._detect_is_causal_mask
        transformer._detect_is_causal_mask = _for_this_thread(declared, original)
        try:
            yield
        finally:
            transformer._detect_is_causal_mask = original


def _for_this_thread(new: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
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
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Restore buffers, modes, gradients and the random state on exit.

    Args:
        modules: The modules to restore, with all their submodules.
    """
    with LOCK, torch.random.fork_rng():
        children = [child for module in modules for child in module.modules()]
        # A forward may write to a buffer in place, or replace it by another tensor.
        saved = [
            (child, name, tensor, tensor.detach().clone())
            for child in children
            for name, tensor in child.named_buffers(recurse=False)
        ]
        modes = [(child, child.training) for child in children]
        grads = [(p, p.grad) for module in modules for p in module.parameters()]
        try:
            yield
        finally:
            with torch.no_grad():
                for child, name, tensor, value in saved:
                    _restore(tensor, value)
                    setattr(child, name, tensor)
            for child, mode in modes:
                child.training = mode
            for parameter, grad in grads:
                parameter.grad = grad


def _restore(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy values back in place; torch refuses to write to the repeats of an expanded tensor."""
    for axis, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[axis] > 1:
            tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)
