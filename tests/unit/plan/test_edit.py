from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from passes.plan.schema import Plan
from tests.models import loops
from tests.models.builders import mlp

X = torch.randn(4, 8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp(6, 8)


def edited(plan: Plan, edit: Callable[[Any], None]) -> Plan:
    data = copy.deepcopy(json.loads(plan.to_json()))
    edit(data)
    return Plan.from_json(json.dumps(data))


COMPILED = pnn.compile(model(), X, cuts=("_4", "_8"), coarse="lowrank", rank=5)


def first(number: int, name: str) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        data["stages"][number]["first"] = name

    return edit


def after(number: int, name: str) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        data["interfaces"][number]["after"] = name

    return edit


def both(*edits: Callable[[Any], None]) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for each in edits:
            each(data)

    return edit


@pytest.mark.parametrize(
    ("edit", "starts"),
    [
        (first(1, "_2"), ["_2", "_8"]),
        (after(1, "_8"), ["_4", "_9"]),
        (both(first(1, "_6"), after(0, "_5")), ["_6", "_8"]),
        (both(first(1, "_2"), first(2, "_6")), ["_2", "_6"]),
    ],
)
def test_a_moved_cut_is_honoured(edit: Callable[[Any], None], starts: list[str]) -> None:
    assert [stage.first for stage in COMPILED.plan.stages[1:]] == ["_4", "_8"]
    again = pnn.compile(model(), X, plan=edited(COMPILED.plan, edit))

    assert [stage.first for stage in again.plan.stages[1:]] == starts
    assert [stage.coarse.family for stage in again.plan.stages[1:] if stage.coarse] == [
        "lowrank"
    ] * 2
    assert all(s.coarse.rank == 5 for s in again.plan.stages[1:] if s.coarse)
    named = f"first is {starts[0]} in stage 1, {starts[1]} in stage 2"
    assert f"cuts are where they were named: {named}" in again.plan.notes
    assert torch.equal(again.sequential(X), model()(X))


def test_a_plan_that_was_not_edited_is_replayed() -> None:
    assert pnn.compile(model(), X, plan=COMPILED.plan).plan == COMPILED.plan


@pytest.mark.parametrize(
    ("edit", "kind", "message"),
    [
        (
            both(first(1, "_2"), after(0, "_5")),
            pnn.ArtifactError,
            r"plan\.stages\[1\]\.first moves the cut in front of _2, but "
            r"plan\.interfaces\[0\]\.after in front of _6: move one of them",
        ),
        (first(1, "_10"), pnn.PartitionError, r"order of the graph \('_8' comes too late\)"),
        (first(2, "_99"), pnn.ArtifactError, r"plan\.stages\[2\]\.first is '_99'"),
    ],
)
def test_a_cut_that_cannot_be_moved_there_is_refused(
    edit: Callable[[Any], None], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        pnn.compile(model(), X, plan=edited(COMPILED.plan, edit))


def test_a_plan_weighed_by_what_it_does_not_hold_says_how_to_move_its_cuts() -> None:
    plan = pnn.compile(model(), X, stages=3, devices=pnn.load_profile("h100")).plan
    start = plan.stages[1].first
    moved = "_2" if start != "_2" else "_3"
    with pytest.raises(
        pnn.PartitionError, match=rf"costs are those of 'roofline'.*--cut-at {moved},"
    ):
        pnn.compile(model(), X, plan=edited(plan, first(1, moved)))


def test_a_moved_cut_takes_the_iterations_that_the_tolerance_needs() -> None:
    torch.manual_seed(0)
    sampler, noise = loops.DDIM().eval(), loops.inputs(loops.DDIM)
    plan = pnn.compile(sampler, noise, stages=3, tolerance=1e-4, validate="off").plan
    start = f"getitem_{int(plan.stages[1].first.removeprefix('getitem_')) - 6}"

    edit = edited(plan, first(1, start))
    moved = pnn.compile(sampler, noise, plan=edit, validate="off").plan

    assert (moved.stages[1].first, moved.tolerance) == (start, 1e-4)
    assert any("on the example inputs for 0.0001" in note for note in moved.notes)
