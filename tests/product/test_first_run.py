"""`pnn-compile run`: what every rank holds, and whether they compute what one process does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import pnn_compile as pnn
from pnn_compile.bench.first_run import FirstRun, RankReport
from pnn_compile.cli import main
from pnn_compile.report.tables import first_run_table
from pnn_compile.report.terminal import to_text
from tests.models.distributed_models import network

pytestmark = pytest.mark.usefixtures("_forked_ranks")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(network(3).save(tmp_path_factory.mktemp("run") / "artifact"))


def test_ranks_hold_their_stages_and_give_the_outputs(
    artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", artifact, "--ranks", "2", "--batch", "6", "--train", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["equal"]
    assert (data["batch"], data["training"]) == (6, True)
    assert [rank["stages"] for rank in data["ranks"]] == [[0, 1], [2]]
    assert sum(rank["parameters"] for rank in data["ranks"]) == data["parameters"]
    assert all(rank["seconds"] > 0 for rank in data["ranks"])


def test_too_many_ranks_and_no_artifact_are_mistakes(
    artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", artifact, "--ranks", "4"]) == 2
    assert "4 ranks for 3 stages" in capsys.readouterr().err
    assert main(["run", str(Path(artifact).parent / "nothing")]) == 2


def test_a_fixed_batch_is_the_only_one(tmp_path: Path) -> None:
    from pnn_compile.bench.first_run import first_run

    compiled = network(2)
    fixed = replace(compiled, program=replace(compiled.program, dynamic=()))
    path = fixed.save(tmp_path / "artifact")
    with pytest.raises(pnn.OptionError, match="batches of 4 only"):
        first_run(path, batch=5)


def test_the_table_says_who_holds_what() -> None:
    ranks = (
        RankReport(0, (0, 1), ("stem", "blocks.3"), 1234, 4936, 0.0123),
        RankReport(1, (2,), ("blocks.4", "blocks.4"), 99, 396, 0.0124),
    )
    run = FirstRun("Net", 4, False, ranks, 1333, 1e-7)
    text = " ".join(to_text(first_run_table(run)).split())
    for words in ("stem .. blocks.3", "0, 1", "1,234", "12.3", "outputs equal", "1,333"):
        assert words in text
    assert "NOT equal" in to_text(first_run_table(replace(run, error=0.1)))
