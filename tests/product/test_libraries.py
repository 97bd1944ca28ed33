"""Models by the name that a library gives them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.coverage.operators import declare
from passes.errors import SourceError
from pnn_compile.sources import load_source

FAKE_TIMM = """
from torch import nn
def is_model(name): return name == "net"
def list_models(): return ["net", "other"]
def create_model(name, width=3, in_chans=3, img_size=None):
    model = nn.Conv2d(in_chans, width, 1)
    model.default_cfg = {"input_size": (3, 8, 6)}
    return model
"""
FAKE_MODELS = """
from torch import nn
class Head(nn.Sequential): pass
def net(*, weights=None, classes=4): return nn.Sequential(nn.Conv2d(3, classes, 1))
net.__module__ = "torchvision.models.resnet"
def detect(*, weights=None, weights_backbone=1): return nn.Identity()
detect.__module__ = "torchvision.models.detection.rcnn"
def list_models(): return ["net", "detect"]
def get_model_builder(name): return globals()[name]
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in front of every installed package, and no library imported."""
    for name in _imported():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in _imported():
        del sys.modules[name]


def _imported() -> list[str]:
    libraries = ("timm", "torchvision", "transformers")
    return [name for name in sys.modules if name.partition(".")[0] in libraries]


@pytest.fixture
def fake_timm(fakes: Path) -> Path:
    (fakes / "timm.py").write_text(FAKE_TIMM)
    return fakes


@pytest.fixture
def fake_torchvision(fakes: Path) -> Path:
    package = fakes / "torchvision" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(FAKE_MODELS)
    return fakes


def refusal(text: str, *arguments: str) -> str:
    with pytest.raises(SourceError) as caught:
        load_source(text, (), arguments)
    return str(caught.value)


# --- what a library that is not there says --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "package"),
    [("timm:net", "timm"), ("torchvision:net", "torchvision"), ("hf:bert", "transformers")],
)
def test_a_missing_library_is_named_with_the_word_that_installs_it(
    text: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(text)
    assert text in message
    assert f"pip install {package}" in message or package in message


def test_a_library_that_lacks_another_says_which(fakes: Path) -> None:
    (fakes / "timm.py").write_text("import no_such_dependency")
    assert "pip install no_such_dependency" in refusal("timm:net")


def test_a_library_that_fails_on_import_is_told_apart_from_one_that_is_missing(
    fakes: Path,
) -> None:
    (fakes / "timm.py").write_text("raise RuntimeError('operator x::nms does not exist')")
    message = refusal("timm:net")
    assert "operator x::nms does not exist" in message
    assert "made for each other" in message


def test_an_import_that_fails_inside_a_library_is_told_with_its_cause(write: Any) -> None:
    write(
        "model.py",
        "try:\n"
        "    raise RuntimeError('operator x::nms does not exist')\n"
        "except RuntimeError as error:\n"
        "    raise ModuleNotFoundError('Could not import module LlamaConfig.') from error\n",
    )
    message = refusal("model.py")
    assert "The cause is RuntimeError: operator x::nms does not exist" in message
    assert "install" not in message


# --- timm and torchvision, as far as they are used ------------------------------------------------


@pytest.mark.usefixtures("fake_timm")
def test_timm_gives_images_of_the_size_that_the_model_is_made_for() -> None:
    source = load_source("timm:net", (), ["width=5"])
    assert [tuple(each.shape) for each in source.args] == [(2, 3, 8, 6)]
    assert source.model(*source.args).shape[1] == 5


@pytest.mark.usefixtures("fake_timm")
def test_timm_follows_the_arguments_that_change_the_image() -> None:
    source = load_source("timm:net", (), ["img_size=16", "in_chans=1"])
    assert tuple(source.args[0].shape) == (2, 1, 16, 16)
    assert tuple(load_source("timm:net", ["1x3x4x4"]).args[0].shape) == (1, 3, 4, 4)


@pytest.mark.usefixtures("fake_timm")
def test_timm_refuses_what_it_does_not_know() -> None:
    assert "did you mean net?" in refusal("timm:nett")
    assert "unexpected keyword argument 'depth'" in refusal("timm:net", "depth=3")
    assert "nothing is downloaded" in refusal("timm:net", "pretrained=True")


@pytest.mark.usefixtures("fake_torchvision")
def test_torchvision_builds_without_weights() -> None:
    source = load_source("torchvision:net", (), ["classes=7"])
    assert tuple(source.args[0].shape) == (2, 3, 224, 224)
    assert source.model(*source.args).shape[1] == 7


@pytest.mark.usefixtures("fake_torchvision")
def test_torchvision_refuses_what_it_does_not_know() -> None:
    assert "did you mean net" in refusal("torchvision:nett")
    assert "takes no argument 'depth'" in refusal("torchvision:net", "depth=3")
    assert "nothing is downloaded" in refusal("torchvision:net", "weights=DEFAULT")
    assert "--input" in refusal("torchvision:detect")


# --- the libraries themselves, where they are installed -------------------------------------------


def test_timm_itself() -> None:
    declare()
    pytest.importorskip("timm")
    source = load_source("timm:test_vit", (), ["num_classes=5"])
    assert source.model(*source.args).shape == (2, 5)


def test_torchvision_itself() -> None:
    declare()
    pytest.importorskip("torchvision")
    source = load_source("torchvision:squeezenet1_1", ["2x3x64x64"], ["num_classes=5"])
    assert source.model(*source.args).shape == (2, 5)


def test_labels_alone_are_completed_by_the_inputs_that_the_model_needs() -> None:
    declare()
    pytest.importorskip("transformers")
    source = load_source("hf:T5ForConditionalGeneration", ("labels=3x8:int64",))

    assert {name: tuple(x.shape) for name, x in source.kwargs.items()} == {
        "input_ids": (3, 16), "labels": (3, 8),
    }  # fmt: skip
    assert source.model(**source.kwargs).loss.isfinite()


@pytest.mark.parametrize("name", ["llama", "LlamaConfig", "LlamaForCausalLM", "t5", "vit", "clip"])
def test_transformers_itself(name: str) -> None:
    declare()
    pytest.importorskip("transformers")
    source = load_source(f"hf:{name}")
    with torch.no_grad():
        source.model.eval()(*source.args, **source.kwargs)
    assert sum(p.numel() for p in source.model.parameters()) < 5_000_000


def test_a_folder_with_a_configuration(tmp_path: Path) -> None:
    declare()
    transformers = pytest.importorskip("transformers")
    saved = transformers.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    saved.architectures = ["BertForMaskedLM"]
    saved.save_pretrained(tmp_path)
    source = load_source(f"hf:{tmp_path}", (), ["num_hidden_layers=3"])
    assert type(source.model).__name__ == "BertForMaskedLM"
    config: Any = source.model.config
    assert config.num_hidden_layers == 3


def test_transformers_refuses_what_it_does_not_know() -> None:
    declare()
    pytest.importorskip("transformers")
    assert "did you mean" in refusal("hf:lama")
    assert "no setting 'num_layer'" in refusal("hf:t5", "num_layer=3")
    assert "nothing is downloaded" in refusal("hf:meta/llama")
