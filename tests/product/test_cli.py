"""The command line as a new user meets it: what it prints, writes and returns."""

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import pnn_compile as pnn
from passes.coarse.family import names_of
from pnn_compile.cli import cli, main
from pnn_compile.cli.command import Command
from pnn_compile.cli.common import Progress, option_texts

MODEL = """
import torch
from torch import nn

print("hello from the model file")

def build_model():
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)])

def example_inputs():
    return (torch.randn(4, 8),)
"""

UNCAPTURABLE = """
import torch
from torch import nn

class Gate(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), Gate(), nn.Linear(8, 8))
    def forward(self, x):
        return self.layers(x)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return str(file)


def test_the_plain_use_prints_the_report(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "-n", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 stages" in out
    assert out.count("passed") == 7
    assert "hello" not in out


def test_json_is_one_document_and_nothing_else(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model, "-n", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["plan"]["stages"]) == 2
    assert all(check["passed"] for check in document["verify"])
    assert document["capture"]["rung"] == "torch.fx trace"


def test_quiet_prints_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "-n", "2", "-q"]) == 0
    assert capsys.readouterr().out == ""


def test_artifacts_are_saved_inspected_and_verified(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([model, "-n", "3", "-o", str(out), "--emit", "graph,onnx"]) == 0
    assert (out / "model.onnx").stat().st_size > 0
    assert main(["verify", str(out)]) == 0
    dot = tmp_path / "graph.dot"
    assert main(["inspect", str(out), "--dot", str(dot)]) == 0
    assert dot.read_text().startswith("digraph")
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert {"fine", "coarse"} <= {node["role"] for node in nodes}


def test_a_sequential_is_fitted_from_an_npz_of_float64(model: str, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data.npz"
    np.savez(data, input=np.random.default_rng(0).standard_normal((32, 8)))
    words = [model, "-n", "2", "--coarse", "linear", "-o", str(out), "-q"]
    assert main(words) == 0
    (out / "notes.txt").write_text("mine")
    checkpoint = out / "fit.pt"
    assert main(["fit", str(out), str(data), "--batch", "8", "--checkpoint", str(checkpoint)]) == 0
    assert checkpoint.exists()
    assert (out / "notes.txt").read_text() == "mine"
    np.savez(data, np.zeros((256, 8), np.float16))
    assert main([*words, "--calibrate", str(data)]) == 0


BAD_SAMPLES: dict[str, tuple[object, list[str], str]] = {
    "features": (np.zeros((32, 9)), [], "has shape [32, 9], the network takes [samples, 8]"),
    "a number": (np.zeros(()), [], "has shape [], the network takes [samples, 8]"),
    "no samples": (np.zeros((0, 8)), [], "has no samples"),
    "whole numbers": (np.zeros((32, 8), np.uint8), [], "is torch.uint8, the network takes"),
    "text": (np.array(["a"]), [], "cannot be read"),
    "checkpoint": (np.zeros((32, 8)), ["--checkpoint", "nodir/x.pt"], "nodir is not a directory"),
    "learning rate": (np.zeros((32, 8)), ["--learning-rate", "-1"], "must be above 0 (got -1.0)"),
}


def test_samples_that_do_not_fit_get_one_clear_error(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data.npz"
    assert main([model, "-n", "2", "-o", str(out), "-q", "--no-verify"]) == 0
    for case, (array, words, text) in BAD_SAMPLES.items():
        np.savez(data, input=np.asarray(array))
        assert main(["fit", str(out), str(data), *words]) == 2, case
        captured = capsys.readouterr()
        assert text in captured.err, case
        assert "Traceback" not in captured.err


def test_the_output_directory_is_checked_before_anything_is_compiled(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr("pnn_compile.cli.compiling._compile", never)
    assert main([model, "-o", str(tmp_path)]) == 2
    assert "something else than an artifact" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--debug"], ["--json"], ["--debug", "--json"]])
def test_flags_may_stand_in_front_of_a_command(
    flags: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["--debug", model, "-n", "2", "-o", out, "-q"]) == 0
    capsys.readouterr()
    assert main([*flags, "inspect", out]) == 0
    assert ("{" in capsys.readouterr().out) == ("--json" in flags)


def test_a_saved_plan_is_replayed(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([model, "-n", "3", "-o", str(out), "-q"]) == 0
    again = tmp_path / "again"
    assert main([model, "--plan", str(out / "plan.json"), "-o", str(again), "-q"]) == 0
    assert (again / "plan.json").read_text() == (out / "plan.json").read_text()


def test_cuts_can_be_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "--cut-at", "2,5", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [face["module"].split(".")[0] for face in plan["interfaces"][:2]] == ["2", "5"]


def test_inspect_takes_a_model_too(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "-n", "2"]) == 0
    assert "fine_0" in capsys.readouterr().out


BAD: dict[str, tuple[list[str], int, str]] = {
    "no such file": (["nowhere.py"], 2, "no such file"),
    "no stages": (["{model}", "-n", "0"], 2, "at least 1 (got 0)"),
    "too many stages": (["{model}", "-n", "500"], 2, "legal cuts, but 500 stages need 499"),
    "not a number": (["{model}", "-n", "many"], 2, "'many'"),
    "wrong shape": (["{model}", "--input", "4x9"], 2, "fails on the example inputs"),
    "unknown family": (["{model}", "--coarse", "magic"], 2, "choose one of"),
    "unknown emission": (["{model}", "--emit", "tea"], 2, "--emit takes graph, onnx"),
    "onnx to nowhere": (["{model}", "--emit", "onnx"], 2, "add -o DIR"),
    "unknown option": (["{model}", "--frobnicate"], 2, "no such option '--frobnicate'"),
    "bad input": (["{model}", "--input", "4y9"], 2, "--input"),
    "a budget of nothing": (["{model}", "--coarse-budget", "0"], 2, "coarse_budget"),
    "no artifact": (["verify", "nowhere"], 2, "artifact nowhere does not exist"),
    "nothing to inspect": (
        ["inspect", "build/nowhere"],
        2,
        "artifact build/nowhere does not exist",
    ),
    "unknown cost": (["{model}", "--cost", "gold"], 2, "'gold' is not one of 'flops', 'measured'"),
    "unknown sweep": (["{model}", "--sweep", "round"], 2, "is not one of 'chain', 'collapsed'"),
    "no options": (["{model}", "--config", "nowhere.toml"], 2, "nowhere.toml cannot be read"),
    "missing plan": (["{model}", "--plan", "nowhere.json"], 2, "nowhere.json"),
    "unwritable": (["{model}", "-o", "/proc/out"], 2, "/proc"),
    "mistyped command": (["inspct", "out"], 2, "did you mean 'pnn-compile inspect'"),
    "another word for a command": (["iterate", "out"], 2, "did you mean 'pnn-compile dial'"),
    "unknown cut": (["{model}", "--cut-at", "seventh"], 2, "'seventh'"),
    "missing argument": (["fit", "build/nowhere"], 2, "argument 'SAMPLES'; pnn-compile fit --help"),
    "missing option": (["export", "{model}"], 2, "option '--onnx'; pnn-compile export --help"),
    "too many windows": (["{model}", "--windows", "7"], 2, "ask for fewer windows"),
    "a folder": (["/proc/self"], 2, "no Python file in"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_a_mistake_gets_one_clear_error(
    case: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, code, text = BAD[case]
    assert main([word.replace("{model}", model) for word in words]) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1
    assert "Errno" not in captured.err
    assert captured.out == ""


def test_a_module_that_cannot_be_captured_is_kept_whole_and_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gate.py"
    file.write_text(UNCAPTURABLE)
    assert main([f"{file}:Net", "--input", "2x8", "-n", "2"]) == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert "layers.1 (Gate) is kept whole" in out
    assert f"{file}:7" in out


def test_a_model_that_cannot_be_captured_names_module_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gate.py"
    file.write_text(UNCAPTURABLE)
    assert main([f"{file}:Gate", "--input", "2x8", "-n", "2"]) == 2
    err = capsys.readouterr().err
    assert "Gate" in err
    assert f"{file}:7" in err


def test_a_corrupted_artifact_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([model, "-n", "2", "-o", str(out), "-q"]) == 0
    plan = out / "plan.json"
    plan.write_text(plan.read_text()[:100])
    assert main(["inspect", str(out)]) == 2
    assert "plan.json" in capsys.readouterr().err


def test_a_failed_verification_exits_with_3(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from passes.coarse import wrappers

    def wrong(self: torch.nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
        return arguments[0] * 2

    monkeypatch.setattr(wrappers.Exact, "forward", wrong)
    assert main([model, "-n", "2"]) == 3
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "failed verification" in captured.err


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["compile", "--help"]])
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    code = "import sys; from pnn_compile.cli import main; main(sys.argv[1:])"
    code += "; sys.exit('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "pnn-compile" in shown.stdout


def test_the_help_names_every_family() -> None:
    assert all(f'"{name}"' in option_texts()["coarse"] for name in names_of("coarse"))
    assert all(f'"{name}"' in option_texts()["preprocess"] for name in names_of("preprocess"))


@pytest.mark.parametrize("name", list(cli.commands))
def test_the_help_of_a_command_is_grouped_and_has_three_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\nOutput:\n" in shown
    assert shown.partition("\nExamples:\n")[2].count("  pnn-compile ") >= 3
    assert "\\b" not in shown
    assert "\b" not in shown


def test_the_examples_of_the_help_can_be_parsed() -> None:
    for name, command in cli.commands.items():
        assert isinstance(command, Command)
        for words, _ in command.examples:
            command.make_context(name, words.split())


def test_summaries_of_commands_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "..." not in shown
    assert "on local processes." in shown


def test_options_are_saved_to_a_file_and_read_from_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.toml"
    words = ["-n", "3", "--coarse", "linear", "--no-verify", "--save-config", str(file), "--json"]
    assert main([model, *words]) == 0
    first = json.loads(capsys.readouterr().out)
    assert file.read_text() == 'stages = 3\ncoarse = "linear"\nverify = false\njson = true\n'
    assert main([model, "--config", str(file)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["plan"] == first["plan"]
    assert again["verify"] is None
    assert main(["--config", str(file), model, "-n", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["plan"]["stages"]) == 2
    file.write_text('coars = "linear"')
    assert main([model, "--config", str(file)]) == 2
    assert "unknown option 'coars'; did you mean coarse?" in capsys.readouterr().err


def test_lists_in_a_file_of_options(model: str, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text('emit = ["graph"]\ninput = ["2x8"]\ncut-at = ["2", "5"]\n')
    folder = tmp_path / "out"
    assert main([model, "--config", str(file), "-o", str(folder), "-q"]) == 0
    assert len(pnn.load(folder).plan.stages) == 3


def test_steps_are_shown_with_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(silent=False)("first") as begin:
        time.sleep(0.11)
        begin("second")
        begin("third")
        time.sleep(0.11)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["first", "third"]
    assert all(line.endswith(" s") for line in lines)
    with Progress(silent=True)("first"), Progress(silent=True).bar("fitting") as advance:
        time.sleep(0.11)
        advance(1, 1, 0.5)
    assert capsys.readouterr().err == ""
    with Progress(silent=False).bar("fitting") as advance:
        for step in range(40):
            advance(step + 1, 40, 0.5)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 10
    assert shown[0].startswith("fitting: step 4 of 40, loss 0.5, ")


def test_completion() -> None:
    words = {"_PNN_COMPILE_COMPLETE": "bash_complete", "COMP_WORDS": "pnn-compile compile --sweep ",
             "COMP_CWORD": "3"}  # fmt: skip
    code = "from pnn_compile.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | words
    )
    assert shown.stdout.split() == ["plain,chain", "plain,collapsed", "plain,auto"]


@pytest.mark.parametrize(
    "text",
    [
        "stages = " + "[" * 3000 + "]" * 3000, "quiet = 7", "quiet = [true]", "output = {a = 1}",
        r'output = "a\u0000b"', "stages = true", "stages = 2020-01-01", "input = [[1]]",
        r'coarse = "\u001b[31m"',
    ],
)  # fmt: skip
def test_values_of_other_types_in_a_file_of_options_are_refused(
    text: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.toml"
    file.write_text(text)
    assert main([model, "--config", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_options_that_toml_must_escape_are_saved(model: str, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    odd = 'a"b\\c\x7f\U0001f600'
    assert main([model, "-n", "2", "-o", str(tmp_path / odd), "--save-config", str(file)]) == 0
    assert tomllib.loads(file.read_text())["output"] == str(tmp_path / odd)
    assert main([model, "--cost", "\udcff", "--save-config", str(file)]) == 2
