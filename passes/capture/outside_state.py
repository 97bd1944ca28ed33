"""Put back what a forward changes outside of its model, and name it.

    def forward(self, x, cache=[]):
        y = self.body(x)
        cache.append(y)       a list of the function, which every call extends
        Net.last = y          an attribute of the class
        HISTORY.append(y)     a global list
        return y

Capture calls a model on example inputs and on symbolic values, which would stay in such places: the
next call of the user's own model would meet a proxy there. A graph neither reads nor changes them.

What the code of forward names is followed: methods, functions, the variables of their closures, and
globals; no code of torch or of the standard library.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from passes.capture.model_notes import join_few
from passes.ir.held_values import contents, is_foreign, nested_codes, snapshot
from passes.ir.module_walk import submodules


@contextmanager
def outside_preserved(model: nn.Module) -> Iterator[OutsideState]:
    """Put back on exit what forward changes outside of a model.

    Yields:
        The state, which can say what has changed.
    """
    state = OutsideState(model)
    try:
        yield state
    finally:
        state.restore()


_ABSENT: Any = object()
_Restore = Callable[[], bool]


class OutsideState:
    """What the code of a model can change outside of the model, as it is now.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._restores: list[tuple[str, _Restore]] = []
        self._changed: dict[str, None] = {}
        self._codes: set[int] = set()
        self._held = {id(module) for module in submodules(model)}
        kinds = {type(module) for module in submodules(model)}
        bases = {base for kind in kinds for base in kind.__mro__ if not is_foreign(base)}
        self._classes = sorted(bases, key=lambda base: (base.__module__, base.__qualname__))
        self._names, pending = set[str](), {"__call__", "forward"}
        while pending:  # names of methods that the code seen so far mentions
            self._names |= pending
            mentioned = set[str]()
            for base in self._classes:
                for name in pending & vars(base).keys():
                    mentioned |= self._visit(f"{base.__qualname__}.{name}", vars(base)[name])
            pending = mentioned - self._names
        for base in self._classes:
            self._add_attributes(base)

    def restore(self) -> None:
        """Put everything back."""
        self._changed |= {label: None for label, restore in self._restores if restore()}

    def note(self) -> str:
        """Put everything back, and name what was changed since the beginning; "" if nothing was."""
        self.restore()
        if not self._changed:
            return ""
        return (
            f"forward changes {join_few([*self._changed])}, outside of the model: the network "
            "neither changes nor reads that; return such values instead"
        )

    def _visit(self, label: str, value: Any) -> set[str]:
        """Add what a method or function can change; return the names that its code mentions."""
        names = set[str]()
        pending = [(label, value)]
        while pending:
            label, value = pending.pop()
            function = _function(value)
            if function is None:
                self._add_contents(label, value)
                continue
            if id(function.__code__) in self._codes or is_foreign(function):
                continue
            self._codes.add(id(function.__code__))
            codes = nested_codes(function.__code__)
            mentioned = {name for code in codes for name in code.co_names}
            names |= mentioned
            for index, default in enumerate(function.__defaults__ or ()):
                count = function.__code__.co_argcount - len(function.__defaults__ or ())
                name = function.__code__.co_varnames[count + index]
                self._add_contents(f"the default {name} of {label}", default)
            for name, default in (function.__kwdefaults__ or {}).items():
                self._add_contents(f"the default {name} of {label}", default)
            for name in sorted(mentioned):
                pending += self._add_global(function.__globals__, name)
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            for name, cell in cells:
                pending += self._add_cell(name, cell)
        return names

    def _add_global(self, table: dict[str, Any], name: str) -> list[tuple[str, Any]]:
        value = table.get(name, _ABSENT)

        def restore() -> bool:
            if (changed := table.get(name, _ABSENT) is not value) and value is _ABSENT:
                del table[name]
            elif changed:
                table[name] = value
            return changed

        self._restores.append((f"the global {name}", restore))
        if value is _ABSENT or isinstance(value, types.ModuleType):
            return []
        return [(name if _function(value) else f"the global {name}", value)]

    def _add_cell(self, name: str, cell: types.CellType) -> list[tuple[str, Any]]:
        value = _content(cell)

        def restore() -> bool:
            changed = _content(cell) is not value
            if changed and value is not _ABSENT:
                cell.cell_contents = value
            return changed

        label = f"the variable {name} of a closure"
        self._restores.append((label, restore))
        return [] if value is _ABSENT else [(name if _function(value) else label, value)]

    def _add_attributes(self, base: type) -> None:
        before = _attributes(base)

        def restore() -> bool:
            now = _attributes(base)
            changed = [n for n in {**before, **now} if before.get(n, _ABSENT) is not now.get(n)]
            for name in changed:
                if name in before:
                    setattr(base, name, before[name])
                else:
                    delattr(base, name)
            return bool(changed)

        self._restores.append((f"attributes of the class {base.__qualname__}", restore))
        for name, value in before.items():
            self._add_contents(f"{base.__qualname__}.{name}", value)

    def _add_contents(self, label: str, value: Any) -> None:
        if isinstance(value, type):
            values = [] if is_foreign(value) else [*_attributes(value).values()]
        else:
            values = [value]
        held = contents(values, self._held)
        self._restores += [(label, restore) for _, restore in snapshot(held)]


def _attributes(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("__")}


def _function(value: Any) -> types.FunctionType | None:
    """Unwrap a method, a property or a functools wrapper to the function in it."""
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property | functools.partial | functools.partialmethod):
        value = value.func
    elif hasattr(type(value), "cache_info"):
        value = value.__wrapped__
    return value if isinstance(value, types.FunctionType) else None


def _content(cell: types.CellType) -> Any:
    with suppress(ValueError):  # not assigned yet
        return cell.cell_contents
    return _ABSENT
