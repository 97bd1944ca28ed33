"""Two plans side by side."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import pnn_compile as pnn
from pnn_compile.cli import main
from pnn_compile.report.compare import compare, comparison_table
from pnn_compile.report.terminal import to_text
from tests.models.builders import linear_chain


def build(stages: int, *cuts: str, **options: object) -> pnn.Compiled:
    torch.manual_seed(0)
    model = linear_chain(8, 8)
    where: dict[str, object] = {"cuts": list(cuts)} if cuts else {}
    return pnn.compile(model, torch.randn(2, 8), stages=stages, **where, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def even() -> pnn.Compiled:
    return build(2)


def test_a_plan_does_not_differ_from_itself(even: pnn.Compiled) -> None:
    result = compare(even.plan, even.plan)
    assert result.same_program
    assert result.decisions == ()
    assert not any(stage.changed for stage in result.stages)
    assert all(change.before == change.after for change in result.forecast)


def test_moved_cuts_and_their_costs(even: pnn.Compiled) -> None:
    skewed = build(2, "6")
    result = compare(even.plan, skewed.plan)
    assert result.same_program
    assert [stage.moved for stage in result.stages] == [True, True]
    assert result.stages[0].spans == ("0 .. 3", "0 .. 5")
    assert result.stages[0].flops == (1024, 1536)
    text = to_text(comparison_table(result, ("even", "skewed")), 100)
    assert "even -> skewed" in text
    assert "2 of 2 stages begin or end elsewhere" in text
    assert "1.02k -> 1.54k" in text
    assert "speedup" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_stages_that_one_plan_lacks(even: pnn.Compiled) -> None:
    result = compare(even.plan, build(4, sweep="collapsed", coarse="linear").plan)
    assert {change.name for change in result.decisions} == {"stages", "sweep"}
    assert result.stages[3].flops == (None, 512)
    assert "- -> " in to_text(comparison_table(result), 100)


def test_the_command_compares_artifacts_plans_and_models(
    even: pnn.Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before", tmp_path / "after.json"
    even.save(before)
    other = build(4)
    after.write_text(other.plan.to_json())
    assert main(["inspect", str(after), "--against", str(before), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(asdict(compare(even.plan, other.plan))))
    assert main(["inspect", str(before), "--against", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
