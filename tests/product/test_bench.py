"""The benchmark: what it measures, what it says where a contender cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from pnn_compile.bench import Bench, Parts, Timing, bench
from pnn_compile.bench.measurements import PartsTimer
from pnn_compile.cli import main
from pnn_compile.inputs import resized
from pnn_compile.report.tables import bench_table
from pnn_compile.report.terminal import to_text
from pnn_compile.runtime import Kind
from tests.models.builders import block_chain

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("_forked_ranks")


def _compiled() -> pnn.Compiled:
    torch.manual_seed(0)
    model = block_chain(6, 8, activation=nn.ReLU)
    return pnn.compile(model, torch.randn(3, 8), stages=2, coarse_budget=1.0)


def test_contenders_take_turns_on_the_same_ranks() -> None:
    result = bench(
        _compiled(), batches=(3, 4), against=("direct", "threads", "ddp", "gpipe:2"), rounds=2
    )
    by_name = {(each.contender, each.batch): each for each in result.timings}
    assert set(by_name) == {
        (name, batch)
        for name in ("sequential", "parareal", "direct", "threads", "ddp", "gpipe:2", "copies")
        for batch in (3, 4)
    }
    for name, batch in by_name:
        timing = by_name[name, batch]
        if batch == 3 and name in ("ddp", "gpipe:2"):
            assert timing.problem.endswith("of a batch of 3")
            assert not timing.seconds
        else:
            assert not timing.problem
            assert len(timing.seconds) == 2
            assert min(timing.seconds) > 0
    for known in (result.parts, result.together):
        assert [parts.batch for parts in known] == [3, 4]
        for parts in known:
            assert len(parts.forward) == len(parts.backward) == len(parts.optimizer) == 2
            assert min(*parts.forward, parts.serial, *parts.backward, *parts.optimizer) > 0


def test_a_pipeline_beside_windows_takes_consecutive_stages() -> None:
    model = block_chain(6, 8, activation=nn.ReLU)
    compiled = pnn.compile(model, torch.randn(4, 8), stages=2, windows=2, coarse="linear")
    result = bench(compiled, batches=(4,), against=("gpipe:2",), rounds=1)
    assert [timing.problem for timing in result.timings] == [""] * len(result.timings)


def _skip() -> nn.Module:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = y = self.layers[0](x).relu()
            for layer in self.layers[1:]:
                y = layer(y).relu()
            return y + first

    return Skip()


def test_parts_hold_every_instruction_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    compiled = _compiled()
    parts = PartsTimer(compiled, dict(compiled.program.args), (0, 1), True)()
    # Every instruction takes one tick: rank 0 runs fine stage 0 both ways, rank 1 a guess too.
    assert parts.forward == (1.0, 2.0)
    assert parts.backward == (1.0, 2.0)
    serial = (Kind.CORRECT, Kind.CORRECT, Kind.HEAD, Kind.HEAD_BACKWARD, Kind.COARSE_BACKWARD)
    assert parts.serial == len(serial)


def test_figures_are_medians_of_ratios_of_a_round() -> None:
    result = Bench(
        "Net", True, 2, 2, 1, "CPU",
        (
            Timing("sequential", 1, (4.0, 8.0, 6.0)),
            Timing("parareal", 1, (2.0, 8.0, 2.0)),
            Timing("direct", 1, (3.0, 8.0, 3.0)),
            Timing("copies", 1, (5.0, 10.0, 6.0)),
            Timing("ddp", 1, (), "no 2 equal shares of a batch of 1"),
        ),
        (Parts(1, (1.0, 0.5), 0.25, (0.5, 1.25), (1.0, 0.5)),),
        (Parts(1, (1.0, 1.25), 0.25, (0.5, 1.75), (1.0, 0.5)),),
    )  # fmt: skip
    assert result.ratios(result.timings[1]) == (2.0, 1.0, 3.0)
    assert result.bound(1) == 6.0 / (1.0 + 0.25 + 1.75)
    assert result.bound(1, together=True) == 6.0 / (1.25 + 0.25 + 2.25)
    text = " ".join(to_text(bench_table(result)).split())
    assert "batch 1: ddp could not run: no 2 equal shares of a batch of 1" in text
    assert result.machine(1) == 1.6
    assert "in one process, allow 2.00; 100% of it is reached; timed on the ranks" in text
    assert (
        "in the steps themselves, they allow 1.60; 125% of it is reached; parareal is 1.50" in text
    )
    assert "1.50 times as fast as direct; 2 independent copies reach" in text


def test_inputs_are_repeated_or_cut_to_the_batch() -> None:
    compiled = _compiled()
    (example,) = compiled.program.args.values()
    (result,) = resized(compiled, 5, CPU).values()
    assert torch.equal(result, example[[0, 1, 2, 0, 1]])
    (result,) = resized(compiled, 2, CPU).values()
    assert torch.equal(result, example[:2])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(pnn.OptionError, match=r"no contender 'zero'.*gpipe:4"):
        bench(_compiled(), against=("zero",))
    with pytest.raises(pnn.OptionError, match="at least one round"):
        bench(_compiled(), rounds=0)
    with pytest.raises(pnn.RuntimeFault, match="3 ranks for 2 stages"):
        bench(_compiled(), ranks=3)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    compiled = pnn.compile(_skip(), torch.randn(2, 8), stages=3, coarse_budget=1.0)
    arguments = ["bench", str(compiled.save(tmp_path / "artifact")), "--ranks", "2", "--batch", "2"]
    assert main([*arguments, "--against", "gpipe,ddp", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "training step on 2 processes with one thread each, CPU" in out
    assert "could not run" not in out  # a skip over two cuts is nothing special to any of them
    forward = [*arguments, "--against", "direct,ddp,gpipe,1f1b", "--inference", "--json"]
    assert main([*forward, "--rounds", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["training"] is False
    problems = {each["contender"]: each["problem"] for each in result["timings"] if each["problem"]}
    assert problems.keys() == {"1f1b"}
    assert "it only trains" in problems["1f1b"]
    assert result["parts"][0]["optimizer"] == result["together"][0]["optimizer"] == [0.0, 0.0]
    assert main([*arguments, "--batch", "0"]) == 2


def test_pipelines_are_at_their_best_and_what_is_sent_is_counted() -> None:
    compiled = _compiled()
    against = ("ddp", "gpipe", "gpipe:2", "1f1b")
    result = bench(compiled, batches=(1, 4), against=against, rounds=1)
    by_name = {(each.contender, each.batch): each for each in result.timings}
    assert by_name["gpipe", 1].choice == "best of 1 micro-batches: 1"
    assert by_name["gpipe", 4].choice.startswith("best of 1, 2, 4 micro-batches: ")
    assert by_name["1f1b", 4].choice.startswith("best of 2, 4 micro-batches: ")
    assert "at least 2 micro-batches on 2 ranks" in by_name["1f1b", 1].problem
    assert "batch 4: gpipe, best of 1, 2, 4" in to_text(bench_table(result))

    sent = {name: each.sent for (name, batch), each in by_name.items() if batch == 4}
    state = 4 * 8 * 4  # samples, features, bytes
    weights = sum(p.nbytes for p in compiled.sequential.parameters())
    assert sent["sequential"] == sent["copies"] == 0
    assert sent["parareal"] == 2 * state + 8  # the state, its adjoint and the loss
    assert sent["gpipe"] == sent["gpipe:2"] == sent["1f1b"] == 2 * state
    assert sent["ddp"] == 2 * weights  # an all-reduce: half of it to and fro, by either rank
