"""Inputs of a model and arguments of what builds it, in its file and on the command line."""

from __future__ import annotations

import pytest
import torch

from passes.errors import SourceError
from pnn_compile.sources import load_source, parse_input
from tests.support.sourcefiles import HEAD, INPUTS, NET, Write, refusal

X = ("2x3",)


@pytest.mark.parametrize(
    ("example", "args", "kwargs"),
    [
        ("example_inputs = torch.ones(2, 3)", 1, ()),
        ("def example_inputs(batch=2): return torch.ones(batch, 3)", 1, ()),
        ("example_inputs = (torch.ones(2), torch.ones(3))", 2, ()),
        ("example_inputs = lambda: [torch.ones(2), 3]", 2, ()),
        ("example_inputs = {'x': torch.ones(2)}", 0, ("x",)),
        ("def example_inputs(): return dict(x=torch.ones(2), y=None)", 0, ("x", "y")),
    ],
)
def test_example_inputs(write: Write, example: str, args: int, kwargs: tuple[str, ...]) -> None:
    write("model.py", NET + example)

    source = load_source("model.py")

    assert (len(source.args), tuple(source.kwargs)) == (args, kwargs)


def test_factory_prefers_example_inputs_of_its_own(write: Write) -> None:
    text = "def build_big_net_model():\n    return Net(9)\nbuild_small_model = Net\n"
    text += "def big_net_example_inputs():\n    return torch.ones(2, 9)\n"
    write("model.py", NET + text + INPUTS)

    assert load_source("model.py:build_big_net_model").args[0].shape == (2, 9)
    assert load_source("model.py:build_small_model").args[0].shape == (2, 3)
    assert load_source("model.py:Net").args[0].shape == (2, 3)


def test_inputs_replace_those_of_the_file(write: Write) -> None:
    write("model.py", NET + "def example_inputs():\n    raise RuntimeError\n")

    source = load_source("model.py", ["4x3", "mask=4:bool", "2:int64<50"])

    assert [tuple(each.shape) for each in source.args] == [(4, 3), (2,)]
    assert {name: each.dtype for name, each in source.kwargs.items()} == {"mask": torch.bool}


def test_inputs_of_one_shape_differ_and_repeat(write: Write) -> None:
    write("model.py", NET)

    first, second = load_source("model.py", ["2x3", "2x3"]).args
    again = load_source("model.py", ["2x3", "2x3"]).args

    assert not torch.equal(first, second)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


def test_missing_inputs_are_named_if_the_model_takes_several(write: Write) -> None:
    write("model.py", HEAD + "class Two(nn.Module):\n    def forward(self, x, y, z=None): ...\n")

    assert "add --input x=1x3x32x32 --input y=1x3x32x32 with" in refusal("model.py")


def test_missing_inputs_show_both_ways(write: Write) -> None:
    write("model.py", NET + "def build_model():\n    raise RuntimeError('not before the inputs')\n")

    message = refusal("model.py")

    assert "--input 1x3x32x32" in message
    assert "`def example_inputs(): return (torch.randn(1, 3, 32, 32),)` into model.py" in message


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("example_inputs = 3", "example_inputs is 3: make it a tensor"),
        ("example_inputs = None", "is None"),
        ("example_inputs = ()", "is ()"),
        ("example_inputs = {1: 2}", "is {1: 2}"),
        ("def example_inputs(batch): pass", "example_inputs needs arguments (batch)"),
        ("def example_inputs(): return 1 / 0", "example_inputs raises ZeroDivisionError"),
    ],
)
def test_unfit_example_inputs(write: Write, example: str, message: str) -> None:
    write("model.py", NET + example)
    assert message in refusal("model.py")


@pytest.mark.parametrize(
    ("text", "name", "shape", "dtype"),
    [
        ("2x3x32x32", None, (2, 3, 32, 32), torch.float32),
        ("7", None, (7,), torch.float32),
        ("2x128:int64", None, (2, 128), torch.int64),
        ("mask=2x128:bool", "mask", (2, 128), torch.bool),
        ("2x3:bfloat16", None, (2, 3), torch.bfloat16),
        ("_x1=2:float16", "_x1", (2,), torch.float16),
        ("2x3:float64", None, (2, 3), torch.float64),
        ("2x3:complex64", None, (2, 3), torch.complex64),
        ("2x10:int32<50", None, (2, 10), torch.int32),
        ("2x10:uint8<256", None, (2, 10), torch.uint8),
    ],
)
def test_input(text: str, name: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parsed, tensor = parse_input(text)
    assert (parsed, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype)


def test_numbers_of_an_input() -> None:
    state = torch.get_rng_state()

    normal, flags = parse_input("100x100")[1], parse_input("1000:bool")[1]
    small, large = parse_input("1000:int64")[1], parse_input("1000:int64<50")[1]

    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
    assert 0.4 < flags.float().mean() < 0.6
    assert set(small.tolist()) == {0, 1}
    assert set(large.tolist()) == set(range(50))
    assert torch.equal(normal, parse_input("100x100")[1])
    assert not torch.equal(normal, parse_input("100x100", seed=1)[1])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "cannot read the end at character 1"),
        ("2x3y4", "cannot read 'y4' at character 4"),
        ("2x0x3", "cannot read 'x0x3' at character 2"),
        ("2x3x", "cannot read 'x' at character 4"),
        ("-1x3", "cannot read '-1x3' at character 1"),
        ("x=", "cannot read the end at character 3"),
        ("2=2x3", "cannot read '=2x3' at character 2"),
        ("m=2x3:", "cannot read ':' at character 6"),
        (":int64", "cannot read ':int64' at character 1"),
        ("2:int64<0", "cannot read '<0' at character 8"),
        ("2:int64<5x", "cannot read 'x' at character 10"),
        ("2<5", "cannot read '<5' at character 2"),
        ("2 x 3", "cannot read ' x 3' at character 2"),
    ],
)
def test_bad_input_shows_position_and_grammar(text: str, found: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_input(text)
    assert f"bad --input {text!r}: {found}" in str(caught.value)
    assert "[name=]SIZExSIZE...[:dtype[<bound]]" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2x3:float33", "unknown dtype 'float33' in --input '2x3:float33': use one of float32, "),
        ("2x3:float32<5", "float32 cannot be drawn below 5"),
        ("2x3:bool<2", "bool cannot be drawn below 2"),
        ("2x3:int8<129", "int8 cannot be drawn below 129; use int64"),
        ("99999999999x99999999999", "is too large"),
    ],
)
def test_impossible_input(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_input(text)


def test_bad_input_is_met_before_the_import(write: Write) -> None:
    write("model.py", "raise RuntimeError")
    assert "bad --input" in refusal("model.py", "2x")
    assert "repeats a name" in refusal("model.py", "x=2", "x=3")


FACTORY = HEAD + "def build_model(width, depth=2, kind='x', *, flag=False):\n"
FACTORY += "    model = nn.Linear(width, depth)\n    model.seen = (width, depth, kind, flag)\n"
FACTORY += "    return model\n" + INPUTS


@pytest.mark.parametrize("name", ["model.py", "model.py:build_model"])
def test_arguments_are_literals_or_text(write: Write, name: str) -> None:
    write("model.py", FACTORY)
    source = load_source(name, (), ["width=3", "depth=4", "kind=small-1", "flag=True"])
    assert source.model.seen == (3, 4, "small-1", True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["depth=3"], "needs arguments (width, depth=2, kind='x', *, flag=False)"),
        (["width=3", "dept=1"], "takes no argument 'dept'; did you mean depth?"),
        (["width=3", "width=4"], "sets 'width' twice"),
        (["width"], "type name=value"),
        (["=3"], "type name=value"),
    ],
)
def test_bad_arguments_are_refused(write: Write, arguments: list[str], said: str) -> None:
    write("model.py", FACTORY)
    with pytest.raises(SourceError) as caught:
        load_source("model.py:build_model", (), arguments)
    assert said in str(caught.value)


def test_a_model_that_is_built_already_takes_no_arguments(write: Write) -> None:
    write("model.py", NET + INPUTS + "model = Net()\n")
    with pytest.raises(SourceError, match=r"takes no --arg \(width\)"):
        load_source("model.py:model", (), ["width=3"])
