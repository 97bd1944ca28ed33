"""Walks over modules list what torch's own walks list, and call nothing of the model."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from passes.capture.model_copy import copy_model
from passes.ir.isolation import rare_collection
from passes.ir.module_walk import (
    named_buffers,
    named_parameters,
    named_submodules,
    set_mode,
    submodule,
    submodules,
)


class Shared(nn.Module):
    """A layer under two names, a weight under two names, and a child that is None."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(2, 2)
        self.first = nn.Sequential(layer, nn.BatchNorm1d(2))
        self.again = self.first
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = layer.weight
        self.missing = None
        self.register_module("none", None)
        self.register_buffer("empty", None)


@pytest.mark.parametrize("repeats", [False, True])
def test_walks_are_those_of_torch(repeats: bool) -> None:
    model, once = Shared(), not repeats

    assert named_submodules(model, repeats=repeats) == [*model.named_modules(remove_duplicate=once)]
    for ours, theirs in (
        (named_parameters(model, repeats=repeats), model.named_parameters(remove_duplicate=once)),
        (named_buffers(model, repeats=repeats), model.named_buffers(remove_duplicate=once)),
    ):
        assert [(name, id(x)) for name, x in ours] == [(name, id(x)) for name, x in theirs]
    assert submodules(model) == [*model.modules()]
    assert submodule(model, "again.1") is model.first[1]
    with pytest.raises(AttributeError, match="nowhere"):
        submodule(model, "first.nowhere")


class Caching(nn.Module):
    """Drops what it caches in evaluation mode when it is trained again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> Caching:
        self.modes.append(mode)
        return super().train(mode)


def test_modes_are_set_by_the_methods_of_the_model_where_it_has_its_own() -> None:
    caching = Caching()
    model = nn.Sequential(nn.Dropout(), caching)
    set_mode(model, False, afresh=True)
    assert caching.modes == [True, False]
    assert not any(module.training for module in model.modules())

    plain = nn.Sequential(nn.Dropout(), nn.Sequential(nn.ReLU()))
    set_mode(plain, False)
    assert not any(module.training for module in plain.modules())
    set_mode(plain, True, afresh=True)
    assert all(module.training for module in plain.modules())


def test_a_copied_layer_is_what_deepcopy_makes_of_it() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.3)).eval()
    vars(model[0])["note"] = ["a list of its own"]
    copied, expected = copy_model(model), copy.deepcopy(model)

    children = (copied.children(), expected.children(), model.children())
    for ours, theirs, original in zip(*children, strict=True):
        assert [*vars(ours)] == [*vars(theirs)]
        tensors = {**ours._parameters, **ours._buffers}
        for name, value in {**theirs._parameters, **theirs._buffers}.items():
            torch.testing.assert_close(tensors[name], value, rtol=0, atol=0)
        own = {id(table) for table in vars(original).values() if isinstance(table, dict | list)}
        assert not own & {id(table) for table in vars(ours).values()}
        assert repr(ours) == repr(theirs)
        assert not ours.training


def test_garbage_is_looked_for_less_often_and_then_as_before() -> None:
    before = gc.get_threshold()
    with rare_collection():
        assert gc.get_threshold()[0] >= 100 * 700 > before[0]
    assert gc.get_threshold() == before


def test_overlapping_threads_leave_the_search_for_garbage_as_it_was() -> None:
    before = gc.get_threshold()
    first, second = rare_collection(), rare_collection()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold()[0] > before[0]
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before
