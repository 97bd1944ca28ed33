"""The page that shows how to write a family runs, and what it adds is a family like all others."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from passes.coarse.family import FAMILIES
from passes.plan.schema import Plan

PAGE = Path(__file__).resolve().parents[3] / "docs" / "write_a_coarse_family.md"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run all code of the page as one module, in an empty folder."""
    before = dict(FAMILIES)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    file = tmp_path / "written_family.py"
    file.write_text("\n".join(blocks))
    spec = importlib.util.spec_from_file_location("written_family", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "written_family", module)
    torch.manual_seed(0)
    spec.loader.exec_module(module)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)))


def _compiled(**options: object) -> pnn.Compiled:
    settings = {"stages": 3, "coarse": "diagonal"} | options
    return pnn.compile(_model(), torch.randn(2, 16), **settings)  # type: ignore[arg-type]


@pytest.mark.usefixtures("page")
def test_a_family_of_the_user_is_a_family_like_all_others() -> None:
    for options in ({}, {"correction": "difference"}, {"sweep": "collapsed"}, {"iterations": 2}):
        plan = _compiled(**options).plan
        assert {stage.coarse.family for stage in plan.stages if stage.coarse} == {"diagonal"}
        assert all(stage.coarse.parameters == 16 for stage in plan.stages if stage.coarse)
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.usefixtures("page")
def test_its_plan_is_checked_like_all_others() -> None:
    data = json.loads(_compiled().plan.to_json())
    options = data["stages"][1]["coarse"]["options"]
    assert options == {"inputs": [], "start": 1.0}
    options["start"] = "one"
    with pytest.raises(pnn.ArtifactError, match=r"coarse\.options\.start should be float, found"):
        Plan.from_json(json.dumps(data))
    del options["start"]
    with pytest.raises(pnn.ArtifactError, match=r"options\.start is missing: it needs start"):
        Plan.from_json(json.dumps(data))


@pytest.mark.usefixtures("page")
def test_where_it_does_not_fit_its_reason_is_told() -> None:
    model = nn.Sequential(*(nn.Linear(8 + 4 * i, 12 + 4 * i) for i in range(6)))
    with pytest.raises(
        pnn.SynthesisError,
        match=r"coarse='diagonal' does not fit the stage: it leads from \d+ to \d+ channels",
    ):
        pnn.compile(model, torch.randn(2, 8), stages=2, coarse="diagonal")
    with pytest.raises(pnn.OptionError, match="coarse can only sum different ones of: linear"):
        _compiled(coarse="diagonal+linear")


def test_without_its_row_it_is_unknown() -> None:
    with pytest.raises(pnn.OptionError, match=r"unknown coarse \('diagonal'\); choose one of"):
        _compiled()
