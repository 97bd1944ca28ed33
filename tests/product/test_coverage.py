"""The coverage command: its list, its check of one model, and its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import Tensor, nn

from examples.coverage import __main__ as command
from examples.coverage.apart import check_apart
from examples.coverage.catalog import Specification, specifications
from examples.coverage.check import check
from examples.coverage.operators import declare
from examples.coverage.table import table
from tests.models import zoo

FAST = ("mlp", "unet", "tied_language_model", "dict_output", "lstm", "step_counter")
BY_TEXT = {each.text: each for each in specifications()}


def test_the_list_is_as_broad_as_promised() -> None:
    count = {name: sum(s.library == name for s in BY_TEXT.values()) for name in ("timm", "hf")}
    assert len(BY_TEXT) == len(specifications())
    assert count["timm"] >= 60
    assert count["hf"] >= 30
    assert sum(s.library == "torchvision" for s in BY_TEXT.values()) >= 20


def test_every_capturable_case_of_the_zoo_is_on_the_list() -> None:
    listed = {text.partition(":")[2] for text in BY_TEXT if text.startswith("zoo:")}
    assert {case.name for case in zoo.CASES if "uncapturable" not in case.tags} <= listed


@pytest.mark.parametrize("name", FAST)
def test_a_model_of_the_zoo_is_green(name: str) -> None:
    row = check(BY_TEXT[f"zoo:{name}"])
    assert row["ok"], row.get("cause")
    assert row["phase"] == "done"
    assert set(row["imbalance"]) == {"2", "4", "8"}
    json.dumps(row)


@pytest.mark.parametrize(
    ("library", "text"),
    [
        ("timm", "timm:test_vit"),
        pytest.param("timm", "timm:resnet10t --input 2x3x64x64", marks=pytest.mark.slow),
        pytest.param(
            "torchvision", "torchvision:squeezenet1_1 --input 2x3x64x64", marks=pytest.mark.slow
        ),
        ("transformers", "hf:bert"),
    ],
)
def test_a_model_of_a_library_is_green(library: str, text: str) -> None:
    declare()
    pytest.importorskip(library)
    row = check(BY_TEXT[text])
    assert row["ok"], row.get("cause")


class Short(nn.Module):
    """One layer: nothing to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Specification:
    case = zoo.case("fx", "short", Short, zoo.VECTOR)
    monkeypatch.setattr(zoo, "by_name", {"short": case}.__getitem__)
    return Specification("zoo:short", "zoo", "zoo:short", (), ())


def test_a_model_that_cannot_be_cut_says_why(short: Specification) -> None:
    row = check(short)
    assert not row["ok"]
    assert row["phase"] == "compile"
    assert "legal cuts" in row["cause"]


def test_a_failed_build_is_a_row_too() -> None:
    row = check(Specification("zoo:none", "zoo", "zoo:none", (), ()))
    assert (row["ok"], row["phase"]) == (False, "build")


def test_the_run_resumes_and_forgets_failures_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def apart(specification: Specification, limit: float) -> dict[str, object]:
        asked.append(specification.text)
        row = {"model": specification.text, "group": specification.group, "seconds": limit}
        return row | {"ok": "unet" not in specification.text, "phase": "capture", "cause": "none"}

    results = tmp_path / "results" / "rows.jsonl"
    monkeypatch.setattr(command, "check_apart", apart)
    for words in ("run --only zoo:", "run --only zoo:", "run --only zoo: --again"):
        monkeypatch.setattr(sys, "argv", ["coverage", *words.split(), "--results", str(results)])
        command.main()
    zoo_lines = [text for text in BY_TEXT if text.startswith("zoo:")]
    assert asked == [*zoo_lines, "zoo:unet"]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["model"] for row in rows] == zoo_lines
    assert "| zoo:unet | capture | none |" in table(rows)


def test_a_model_that_takes_too_long_is_a_row_too() -> None:
    row = check_apart(BY_TEXT["zoo:mlp"], 0.01)
    assert (row["ok"], row["phase"]) == (False, "time")
