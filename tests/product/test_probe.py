"""A short training of a network beside its original, other forms and early exits."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pnn_compile as pnn
from pnn_compile.cli import main
from pnn_compile.evaluate.probe import Probe, ProbeRow, _conclusion, probe
from pnn_compile.report.tables import probe_table
from pnn_compile.report.terminal import to_text

WIDTH = 8
LABELS = torch.arange(120) % 3
INPUTS = nn.functional.one_hot(LABELS, WIDTH).float()  # the label can be read off
PAIRS = list(zip(INPUTS.split(12), LABELS.split(12), strict=True))
MODEL = """
import torch
from torch import nn

def build_model():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)]
    return nn.Sequential(*blocks, nn.Linear(8, 3))

def example_inputs():
    return torch.randn(2, 8)
"""


def _model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 3))


@pytest.fixture(scope="module")
def network() -> pnn.Compiled:
    return pnn.compile(_model(), INPUTS[:2], stages=3)


@pytest.fixture(scope="module")
def result(network: pnn.Compiled) -> Probe:
    return network.probe(PAIRS, steps=160, learning_rate=1e-2)


def test_all_learn_what_can_be_read_off_the_inputs(result: Probe) -> None:
    assert result.accuracy
    assert (result.samples, result.held_out) == (96, 24)
    by_name = {row.network: row for row in result.rows}
    for name in ("original", "copied blocks", "star", "channel maps"):
        assert by_name[name].scores[-1] == 1.0, name
        assert len(by_name[name].scores) == 8
    assert "as compiled" not in by_name  # that is "copied blocks"
    exits = [row for row in result.rows if row.early_exit]
    assert exits
    assert all(row.parameters < by_name["original"].parameters for row in exits)


def test_nothing_of_the_network_changes(network: pnn.Compiled) -> None:
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    network.probe(PAIRS, steps=8, forms={"other": {"coarse": "linear"}})
    for name, value in network.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in network.module.parameters())


def test_a_form_that_cannot_be_compiled_is_named(network: pnn.Compiled) -> None:
    rows = network.probe(PAIRS, steps=8, forms={"steps": {"coarse": "time_step"}}).rows
    assert next(row for row in rows if row.network == "steps").refused
    assert {"original", "as compiled"} < {row.network for row in rows}


def test_a_form_that_is_no_faster_is_not_trained(network: pnn.Compiled) -> None:
    rows = network.probe(PAIRS, steps=8, forms={"oracle": {"coarse": "exact"}}).rows
    [oracle] = [row for row in rows if row.network == "oracle"]
    assert oracle.refused == "it is predicted no faster"
    assert oracle.speedup <= 1
    assert not oracle.scores
    assert "early exit, as fast as the compiled network" in {row.network for row in rows}


def test_targets_that_are_no_classes_are_fitted_by_their_square(network: pnn.Compiled) -> None:
    pairs = [(x, x[:, :3]) for x, _ in PAIRS]
    short = network.probe(pairs, steps=80, forms={})
    assert not short.accuracy
    original = short.rows[0]
    assert original.scores[-1] < original.scores[0]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (PAIRS[:4], "at least 5 batches"),
        ([(x, x) for x, _ in PAIRS], "do not fit the output"),
        ([(x, y.repeat(2)) for x, y in PAIRS], "not classes of the output"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    network: pnn.Compiled, pairs: list[tuple[Tensor, Tensor]], message: str
) -> None:
    with pytest.raises(pnn.OptionError, match=message):
        probe(network, pairs, steps=8)


def _sentence(result: Probe, form: float, early_exit: float, speedup: float = 2.0) -> str:
    rows = (
        ProbeRow("original", 1.0, scores=(0.7,)),
        ProbeRow("early exit", speedup, early_exit=True, scores=(early_exit,)),
        ProbeRow("star", speedup, scores=(form,)),
        ProbeRow("steps", math.nan, refused="no loop"),
    )
    return _conclusion(replace(result, rows=rows, held_out=1000))


def test_the_conclusion_follows_from_the_scores(result: Probe) -> None:
    assert "keeps what the original learns" in _sentence(result, 0.72, 0.6)
    assert "less than the original so far" in _sentence(result, 0.6, 0.5)
    assert "A shorter network learns as much" in _sentence(result, 0.72, 0.71)
    assert "No form is faster" in _sentence(result, 0.72, 0.6, speedup=0.9)


def test_the_command_prints_the_curves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, samples = tmp_path / "model.py", tmp_path / "samples.safetensors"
    model.write_text(MODEL)
    save_file({"x": INPUTS, "labels": LABELS}, samples)
    main(["probe", str(model), str(samples), "--minutes", "0.01", "--batch", "12", "--json"])
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert {"original", "copied blocks", "star"} <= {row["network"] for row in rows}


def test_the_table_shows_refusals(result: Probe) -> None:
    rows = (*result.rows, ProbeRow("steps", math.nan, refused="no loop"))
    text = to_text(probe_table(replace(result, rows=rows)))
    assert "no loop" in text
    assert "100.0" in text
