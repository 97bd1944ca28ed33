"""What forward changes outside of its model is put back after capture, and named."""

from __future__ import annotations

import contextlib
import types
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from passes.capture import capture
from passes.capture.outside_state import OutsideState
from passes.errors import CaptureError

SEEN: list[Any] = []
LAST: Any = None


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class DefaultList(Layers):
    def forward(self, x: Tensor, cache: list[Any] = []) -> Tensor:  # noqa: B006
        cache.append(self.body(x))
        return cache[-1]


class DefaultDict(Layers):
    def forward(self, x: Tensor, *, cache: dict[str, Any] = {}) -> Tensor:  # noqa: B006
        cache["last"] = self.body(x)
        return cache["last"] * 2


class GlobalList(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return remember(self.body(x))


def remember(y: Tensor) -> Tensor:
    SEEN.append(y)
    return y


class GlobalName(Layers):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        LAST = y = self.body(x)
        return y


class ClassAttribute(Layers):
    store: ClassVar[dict[str, Any]] = {"list": []}

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.store["list"].append(y)
        return y


class ClassName(Layers):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        type(self).last = y = self.body(x)
        return y


def in_closure() -> type[nn.Module]:
    box: list[Any] = []
    state = types.SimpleNamespace(count=0, last=None)

    class InClosure(Layers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            box.append(y)
            state.last = y
            return y

    return InClosure


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (DefaultList, "the default cache of DefaultList.forward"),
        (DefaultDict, "the default cache of DefaultDict.forward"),
        (GlobalList, "the global SEEN"),
        (GlobalName, "the global LAST"),
        (ClassAttribute, "ClassAttribute.store"),
        (ClassName, "attributes of the class ClassName"),
        (in_closure(), "the variable box of a closure"),
    ],
)
def test_it_is_put_back_and_named(kind: type[nn.Module], name: str) -> None:
    model = kind()
    state = OutsideState(model)

    (note,) = capture(model, (torch.randn(3, 4),)).capture.notes

    assert name in note
    assert "outside of the model" in note
    assert state.note() == ""
    model(torch.randn(3, 4))
    assert name in state.note()  # which puts it back


def test_a_model_that_changes_nothing_gets_no_note() -> None:
    class Reader(Layers):
        table: ClassVar = {"scale": 2.0}

        def forward(self, x: Tensor, sizes: tuple[int, ...] = (1, 2)) -> Tensor:
            return self.body(x) * self.table["scale"] + len(SEEN) + sum(sizes)

    assert not capture(Reader(), (torch.randn(3, 4),)).capture.notes


class HooksItself(Layers):
    """Registers a hook at its first call, as models of transformers do to collect states."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.first.register_forward_hook(lambda module, args, output: output * 2)
            self.ready = True
        return self.body(x)


def test_hooks_that_forward_registers_are_taken_back() -> None:
    model, x = HooksItself(), torch.randn(3, 4)
    expected = HooksItself()
    expected.load_state_dict(model.state_dict())
    with contextlib.suppress(CaptureError):
        capture(model, (x,))
    assert not model.first._forward_hooks
    assert torch.equal(model(x), expected(x))  # else they would be registered twice
