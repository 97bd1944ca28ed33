"""Pages of the documentation: their Python and their commands run, and their links lead somewhere.

The blocks of a page are one session, from top to bottom, in a folder of its own: Python runs, a
block with the title of a file is written, and commands are called. `_SETUP` provides the names that
pages use without defining them; `_LIGHTER` shortens commands that take minutes. Notebooks run cell
by cell.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import pnn_compile as pnn
from examples.coverage.operators import declare
from pnn_compile.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FOLDERS = (ROOT, DOCS, ROOT / "examples" / "studies", ROOT / "tests" / "fuzz")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]

_FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_RUNS = re.compile(r"^(```python|(\$ )?pnn-compile )", re.MULTILINE)
_SLOW = (
    "README", "checkpoints", "coarse_families", "convert", "deploy_with_onnx", "edit_a_plan",
    "forecast", "index", "onnx", "runtime", "train_on_two_processes", "training",
)  # fmt: skip
_ELSEWHERE = ("write_a_coarse_family",)  # tests/unit/coarse/test_write_a_family.py
_RUN = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in _SLOW else [])
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    if page.stem not in _ELSEWHERE and _RUNS.search(page.read_text())
]

_NOTEBOOKS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if "train" in path.stem else [])
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
]

_LIGHTER = (
    ("hf:llama --arg num_hidden_layers=24", "hf:llama --arg num_hidden_layers=4"),
    ("timm:resnet50", "timm:resnet18 --input 2x3x32x32 -n 2"),
    ("--batch 1,2,8 --against direct,threads,ddp,gpipe,1f1b", "--batch 8 --rounds 1 --against ddp"),
    ("--minutes 10", "--minutes 0.05"),
    ("-n 2..16", "-n 2,3"),
)
_LIBRARIES = {" timm:": "timm", " hf:": "transformers"}

_MODEL = """
from torch import nn

from resnet import build_model, example_inputs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(16), *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)), nn.Flatten()
        )

    def forward(self, images):
        return self.layers(images)
"""

_SETUP = """
import torch
import torch.distributed as dist
from torch.nn import functional as F

import pnn_compile as pnn
from resnet import build_model, example_inputs
from sampler import build_model as build_sampler

model, sampler, noise = build_model(), build_sampler(), torch.randn(4, 8)
x = example = images = example_inputs()
labels = torch.randint(10, (32,))
batch, batches, criterion = (images, labels), [example_inputs() for _ in range(6)], F.cross_entropy


def loss_function(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


example_inputs, optimizer = images, torch.optim.AdamW(model.parameters())
"""


def _blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return language, title and text of the fenced blocks of a page."""
    return _FENCE.findall(page.read_text())


def _files(name: str) -> dict[str, str]:
    """Return the files that a page of the documentation tells to save."""
    return {title: text for _, title, text in _blocks(DOCS / name) if title.endswith(".py")}


@pytest.fixture(scope="session")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[pnn.Compiled, Path]:
    """The network of the first tutorial in two stages, and its artifact: to be copied."""
    namespace: dict[str, Any] = {}
    exec(_files("train_on_two_processes.md")["resnet.py"], namespace)
    torch.manual_seed(0)
    compiled = pnn.compile(namespace["build_model"](), namespace["example_inputs"](), stages=2)
    return compiled, compiled.save(tmp_path_factory.mktemp("tutorial") / "net")


@pytest.fixture
def session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tutorial: tuple[pnn.Compiled, Path]
) -> Iterator[dict[str, Any]]:
    """Names and files that pages use without making them, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    compiled, artifact = tutorial
    files = _files("train_on_two_processes.md") | _files("loops_in_time.md") | {"model.py": _MODEL}
    for name in ("resnet.py", "sampler.py", "model.py"):
        Path(name).write_text(files[name])
    Path("examples").mkdir()
    for name in ("resnet110", "resnet1001", "unet", "vgg16"):  # as small as the tutorial's
        Path(f"examples/{name}.py").write_text("from resnet import build_model, example_inputs\n")
    for name in ("net", "other", "model", "resnet", "vgg16"):
        shutil.copytree(artifact, f"build/{name}")
    imported = set(sys.modules)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    namespace: dict[str, Any] = {"compiled": copy.deepcopy(compiled)}
    exec(_SETUP, namespace)
    inputs = torch.randn(192, 3, 8, 8)
    save_file({"input": inputs, "labels": torch.randint(10, (192,))}, "samples.safetensors")
    torch.save(namespace["model"].state_dict(), "resnet.pt")
    yield namespace
    dist.destroy_process_group()
    for name in set(sys.modules) - imported:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.mark.usefixtures("_forked_ranks")
@pytest.mark.parametrize("page", _RUN)
def test_a_page_runs_from_top_to_bottom(page: Path, session: dict[str, Any]) -> None:
    for language, title, text in _blocks(page):
        if title == "on a GPU":  # tests/product/test_cuda.py
            continue
        if title.endswith(".py"):
            Path(title).write_text(text)
        elif language == "python" and _has("transformers" if "from transformers" in text else ""):
            exec(compile(text, page.name, "exec"), session)
        elif language in ("", "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                _call(line.removeprefix("$ "))


@pytest.mark.usefixtures("_forked_ranks")
@pytest.mark.parametrize("notebook", _NOTEBOOKS)
def test_a_notebook_runs_and_is_stored_without_outputs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delitem(sys.modules, "resnet", raising=False)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            exec(compile(text, f"{notebook.name}, cell {number}", "exec"), namespace)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("http") or (notebook.parent / link).exists(), link
    sys.modules.pop("resnet", None)


def _has(*libraries: str) -> bool:
    """Whether optional libraries are installed; ready to be imported if so."""
    declare()
    return all(importlib.util.find_spec(name) for name in libraries if name)


def _call(line: str) -> None:
    """Run a line if it is a command of this program, or starts a script that the page wrote."""
    if "model.pt2" in line:
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)]
        exported = torch.export.export(nn.Sequential(*layers), (torch.randn(2, 8),))
        torch.export.save(exported, "model.pt2")
    for text, lighter in _LIGHTER:
        line = line.replace(text, lighter)
    words = shlex.split(line, comments=True) if line.startswith(("pnn-", "torchrun ")) else []
    libraries = [name for prefix, name in _LIBRARIES.items() if prefix in line]
    if words and not _has(*libraries):
        return
    if words[:1] == ["pnn-compile"]:
        assert main(words[1:]) == 0, line
    elif words and Path(words[-1]).exists():
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        subprocess.run(
            command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
