"""What a run of a model may not leave behind: guards of its state, and one lock of the process.

torch patches classes while it traces (`nn.Module.__call__`), and has one random generator for all
threads. Whoever does either holds `exclusive()`, so that two compilations in two threads take
turns, and models that run beside them in other threads see nothing of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import transformer

__all__ = ["LOCK", "exclusive", "masks_kept", "preserved", "repeatable", "seeded"]

LOCK = threading.RLock()
"""Held by whoever changes what all threads share: patched methods, random state, backend flags."""

_Patcher: Any = fx._symbolic_trace._Patcher
"""What tracers of torch.fx and torch.export put their wrappers around methods with."""


@contextmanager
def exclusive() -> Iterator[None]:
    """Hold the lock of the process; methods that torch patches meanwhile change for this thread.

    A tracer wraps `nn.Module.__call__` for everybody: a layer that another thread calls would
    become part of the graph, or fail. Here the wrapper works in the thread that put it there and
    until this block ends, and calls what it wraps otherwise.
    """
    with LOCK:
        owner, active = threading.get_ident(), [True]
        patch = _Patcher.patch_method

        @functools.wraps(patch)
        def patch_for_thread(self: Any, cls: type, name: str, new: Any, *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
            plain = getattr(cls, name)

            @functools.wraps(new)
            def method(*args: Any, **kwargs: Any) -> Any:
                ours = active and threading.get_ident() == owner
                return (new if ours else plain)(*args, **kwargs)

            return patch(self, cls, name, method, *rest, **more)

        _Patcher.patch_method = patch_for_thread
        try:
            yield
        finally:
            active.clear()
            _Patcher.patch_method = patch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from a seed; the state of the generator comes back on exit."""
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def masks_kept() -> Iterator[None]:
    """Keep torch's transformers from looking whether a mask is causal, to drop it then."""

    def given(
        mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None
    ) -> bool:
        return is_causal is True

    with LOCK:
        original = transformer._detect_is_causal_mask
        transformer._detect_is_causal_mask = _for_this_thread(given, original)
        try:
            yield
        finally:
            transformer._detect_is_causal_mask = original


def _for_this_thread(new: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    owner = threading.get_ident()

    def either(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == owner else plain)(*args, **kwargs)

    return either


@contextmanager
def repeatable() -> Iterator[None]:
    """Have cuDNN take kernels that give the same digits whenever they run; no effect on a CPU."""
    library: Any = torch.backends.cudnn
    with LOCK:
        before = library.deterministic, library.benchmark
        library.deterministic, library.benchmark = True, False
        try:
            yield
        finally:
            library.deterministic, library.benchmark = before


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Restore buffers, modes, gradients and the random state of modules on exit."""
    with LOCK, torch.random.fork_rng():
        children = [child for module in modules for child in module.modules()]
        # A forward may write to a buffer, or put another tensor in its place.
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
                    _put_back(tensor, value)
                    setattr(child, name, tensor)
            for child, mode in modes:
                child.training = mode
            for parameter, grad in grads:
                parameter.grad = grad


def _put_back(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor its values again; each element of an expanded one once."""
    for axis, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[axis] > 1:
            tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)
