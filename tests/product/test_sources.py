"""Models are found in files and modules, and what stands in the way is said."""

from __future__ import annotations

import inspect
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from passes.errors import SourceError
from pnn_compile.sources import load_source
from tests.support.sourcefiles import HEAD, INPUTS, NET, Write, refusal

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
X = ("2x3",)


def cause(text: str) -> BaseException | None:
    with pytest.raises(SourceError) as caught:
        load_source(text, X)
    return caught.value.__cause__


@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("decoder.py", (2, 128)),
        ("resnet1001.py", (2, 3, 32, 32)),
        ("unet.py", (2, 1, 64, 64)),
        ("vgg16.py", (2, 3, 32, 32)),
    ],
)
def test_loads_an_example(file: str, shape: tuple[int, ...]) -> None:
    source = load_source(str(EXAMPLES / file))

    assert source.origin == f"{EXAMPLES / file}:build_model"
    assert [tuple(each.shape) for each in source.args] == [shape]
    assert source.kwargs == {}
    assert isinstance(source.model, nn.Module)


def test_loads_the_second_model_of_an_example() -> None:
    with torch.device("meta"):  # 138 million weights
        source = load_source(f"{EXAMPLES / 'vgg16.py'}:build_imagenet_model")

    assert tuple(source.args[0].shape) == (2, 3, 224, 224)


def test_loads_a_class_and_a_builtin_of_torch_by_name() -> None:
    source = load_source("torch.nn:Identity", X)

    assert type(source.model) is nn.Identity
    assert source.origin == "torch.nn:Identity"


def test_first_of_the_usual_names_is_taken(write: Write) -> None:
    third = "model = Net(5)\n"
    second = "def get_model():\n    return Net(4)\n"
    first = "def build_model():\n    return Net(3)\n"
    for text, width in ((third, 5), (third + second, 4), (third + second + first, 3)):
        write("model.py", NET + text + INPUTS)
        assert load_source("model.py").model.in_features == width


def test_only_class_that_needs_no_arguments_is_taken(write: Write) -> None:
    unit = "class Unit(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
    base = "import abc\nclass Base(nn.Module, abc.ABC):\n"
    base += "    @abc.abstractmethod\n    def head(self): ...\n"
    alias = "Alias = Net\nfrom torch.nn import ReLU\n"
    write("model.py", NET + unit + base + alias)

    source = load_source("model.py", X)

    assert type(source.model).__name__ == "Net"


def test_imported_factory_with_arguments_is_passed_over(write: Write) -> None:
    write("zoo.py", "def get_model(name):\n    return name\n")
    write("model.py", NET + "from zoo import get_model\nmodel = Net()\n")

    assert load_source("model.py", X).origin == "model.py:model"


@pytest.mark.parametrize(
    ("name", "width"),
    [("Net", 3), ("net", 6), ("make", 7), ("Zoo.wide", 8), ("part", 9), ("Zoo.net", 6)],
)
def test_name_is_an_instance_a_class_or_a_factory(write: Write, name: str, width: int) -> None:
    text = "import functools\nnet = Net(6)\ndef make(width=7):\n    return Net(width)\n"
    text += "part = functools.partial(Net, 9)\nclass Zoo:\n    net = net\n"
    text += "    @staticmethod\n    def wide():\n        return Net(8)\n"
    write("model.py", NET + text)

    source = load_source(f"model.py:{name}", X)

    assert source.model.in_features == width
    assert source.origin == f"model.py:{name}"


def test_no_model_says_what_was_seen(write: Write) -> None:
    text = "build_model = 3\nfrom tempfile import NamedTemporaryFile\nnet = nn.ReLU()\n"
    text += "class Unit(nn.Module):\n    def __init__(self, width: int):\n        pass\n"
    write("model.py", HEAD + text)

    message = refusal("model.py")

    for part in (
        "no model found in model.py",
        "build_model is of type int",
        "net has another name",
        "Unit needs arguments (width: int)",
        "add a function build_model()",
        "type model.py:name",
    ):
        assert part in message


def test_no_model_in_an_empty_file(write: Write) -> None:
    write("model.py", "")
    assert "no model found in model.py (no nn.Module in it)" in refusal("model.py")


def test_several_classes_are_named(write: Write) -> None:
    write("model.py", NET + "class Other(nn.Module):\n    pass\n")

    message = refusal("model.py")

    assert "2 models" in message
    assert "type model.py:Net or model.py:Other" in message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("model.py:Nett", "there is no 'Nett' in model.py; did you mean Net?"),
        ("model.py:zzz", "there is no 'zzz' in model.py; there is Net"),
        ("model.py:Net.forwards", "there is no 'forwards' in model.py; did you mean forward?"),
        ("torch.nn:Linaer", "there is no 'Linaer' in torch.nn; did you mean Linear"),
    ],
)
def test_unknown_name_lists_close_ones(write: Write, text: str, meant: str) -> None:
    write("model.py", NET)
    assert meant in refusal(text)
    assert isinstance(cause(text), AttributeError)


def test_factory_with_arguments_shows_its_signature(write: Write) -> None:
    write("model.py", NET + "def build_model(width: int, bias=True) -> Net: ...\n")
    for text in ("model.py", "model.py:build_model"):
        message = refusal(text, *X)
        assert "model.py:build_model needs arguments (width: int, bias=True)" in message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("build_model = 1\n", "build_model is of type int: name a model or factory"),
        (
            "def build_model():\n    return 1, 2\n",
            "build_model returns a tuple: return",
        ),
        ("def build_model():\n    pass\n", "build_model returns a NoneType"),
        ("class build_model:\n    pass\n", "build_model returns a build_model"),
    ],
)
def test_factory_of_something_else(write: Write, value: str, message: str) -> None:
    write("model.py", HEAD + value)
    assert message in refusal("model.py:build_model", *X)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models/vg16.py", "no such file: models/vg16.py; in models, did you mean vgg16.py?"),
        ("models/vg16.py:Net", "no such file: models/vg16.py; in models, did you mean vgg16.py?"),
        ("models/q.py", "in models, there is unet.py, vgg16.py"),
        ("nowhere/q.py", "no such file: nowhere/q.py; there is no Python file in nowhere"),
        ("models", "models is a directory; in models, there is unet.py, vgg16.py"),
        ("models.unet", "a model of a module is typed package.module:name"),
        ("notes.txt", "notes.txt is not a Python file"),
        ("notes.txt:Net", "notes.txt is not a Python file"),
        ("models/vgg16.py:", "cannot read 'models/vgg16.py:': type file.py:name or package.mod"),
        ("models/vgg16.py:build-model", "cannot read"),
        (":Net", "cannot read ':Net'"),
        ("", "is a directory"),
    ],
)
def test_no_such_place(write: Write, text: str, message: str) -> None:
    for name in ("models/vgg16.py", "models/unet.py", "notes.txt"):
        write(name, NET)
    assert message in refusal(text, *X)


@pytest.mark.parametrize("text", ["no_such_package:Net", "torch.no_such_module:Net"])
def test_no_such_module(text: str) -> None:
    message = refusal(text, *X)
    assert "raises ModuleNotFoundError: No module named" in message
    assert "(" not in message  # no line of the user's is to blame
    assert isinstance(cause(text), ModuleNotFoundError)


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("x = 1\nraise ValueError('no\\nsense')\n", "ValueError: no (model.py:2)", ValueError),
        ("import no_such_one\n", f"install it for {sys.executable}", ImportError),
        ("import no_such_one\n", "No module named 'no_such_one' (model.py:1)", ImportError),
        ("from torch import no_such_one\n", "ImportError: cannot import name", ImportError),
        ("x = (\n", "SyntaxError: '(' was never closed (model.py:1)", SyntaxError),
        ("def f():\n    assert 0\n\nf()\n", "AssertionError (model.py:2)", AssertionError),
        ("import json\njson.loads('{')\n", "(model.py:2)", ValueError),
        ("from torch import nn\n\nnn.Linear('a', 1)\n", "(model.py:3)", TypeError),
        ("import broken\n", "KeyError: 'a' (broken.py:2)", KeyError),
        ("from . import broken\n", "name a file of a package as package.module:name", ImportError),
        ("import sys\nsys.path.insert(0, 'x')\nraise OSError\n", "OSError (model.py:3)", OSError),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 (model.py:2); put what runs", SystemExit),
    ],
)
def test_file_that_raises(write: Write, code: str, message: str, kind: type[BaseException]) -> None:
    write("broken.py", "\n{}['a']\n")
    write("model.py", code)
    known, path = set(sys.modules), list(sys.path)

    refused = refusal("model.py")
    assert refused.startswith("model.py raises ")
    assert message in refused
    assert isinstance(cause("model.py"), kind)
    assert sys.path == path
    assert not [name for name in set(sys.modules) - known if name.startswith("_pnn_source")]


def test_factory_that_raises(write: Write) -> None:
    write("model.py", NET + "\n\ndef build_model():\n    return Net('a')\n")

    message = refusal("model.py", *X)

    assert message.startswith("model.py:build_model raises TypeError: ")
    assert "(model.py:5)" in message  # the call of torch in Net, the user's innermost line
    assert "--debug" in message
    assert isinstance(cause("model.py"), TypeError)


def test_interrupt_is_not_caught(write: Write) -> None:
    write("model.py", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_source("model.py")


def test_siblings_and_the_working_directory_can_be_imported(write: Write) -> None:
    write("models/sibling.py", "WIDTH = 5\n")
    write("common.py", "SCALE = 2\n")
    code = "def build_model():\n    from sibling import WIDTH\n    from common import SCALE\n"
    write("models/net.py", NET + code + "    return Net(WIDTH * SCALE)\n")
    path = list(sys.path)

    source = load_source("models/net.py", X)

    assert source.model.in_features == 10
    assert sys.path == path


def test_loading_twice_gives_fresh_modules(write: Write) -> None:
    for width in (4, 5):  # of the same size, within a second
        write("model.py", NET + f"net = Net({width})\n")
        assert load_source("model.py:net", X).model.in_features == width
    first, second = (load_source("model.py:net", X).model for _ in range(2))

    assert first is not second
    assert type(first) is not type(second)
    assert pickle.loads(pickle.dumps(first)).in_features == 5
    assert pickle.loads(pickle.dumps(second)).in_features == 5


def test_siblings_of_one_name_do_not_mix(write: Write) -> None:
    for width in (4, 5, 6):
        write(f"m{width}/layers/block.py", f"WIDTH = {width}\n")  # a namespace package
        write(f"m{width}/net.py", NET + "from layers.block import WIDTH\nnet = Net(WIDTH)\n")
    for width in (4, 5, 6, 4):
        assert load_source(f"m{width}/net.py:net", X).model.in_features == width


def test_module_of_a_package(write: Write) -> None:
    write("sources_pkg/__init__.py", "")
    write("sources_pkg/layers.py", NET)
    write("sources_pkg/net.py", HEAD + "from .layers import Net\n" + INPUTS)
    path = list(sys.path)

    source = load_source("sources_pkg.net:Net")

    assert source.origin == "sources_pkg.net:Net"
    assert source.args[0].shape == (2, 3)
    assert sys.path == path
    assert "relative import" in refusal("sources_pkg/net.py:Net")


def test_main_block_does_not_run(write: Write) -> None:
    write("model.py", NET + 'if __name__ == "__main__":\n    raise SystemExit(1)\n')
    assert load_source("model.py", X).model.in_features == 3


def test_dataclasses_pickle_and_source_are_as_in_a_module(write: Write) -> None:
    text = "from dataclasses import KW_ONLY, dataclass\n@dataclass\nclass Config:\n"
    text += "    width: 'int' = 3\n    _: KW_ONLY\n    bias: 'bool' = True\n"
    write("my model.py", "from __future__ import annotations\n" + NET + text)

    source = load_source("my model.py:Net", X)

    module = sys.modules[type(source.model).__module__]
    assert isinstance(module, types.ModuleType)
    assert module.__file__ == str(Path.cwd() / "my model.py")
    assert inspect.getsource(type(source.model)).startswith("class Net(nn.Linear)")
    assert pickle.loads(pickle.dumps(source.model)).in_features == 3
