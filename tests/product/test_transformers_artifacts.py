"""Models of transformers as artifacts: saved, and loaded where that library is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pnn_compile as pnn
from examples.coverage.operators import declare
from pnn_compile.sources import load_source
from tests.distributed.ranks import start

QUICK = ("LlamaForCausalLM",)
OTHERS = (
    "bert", "distilbert", "BertForSequenceClassification", "roberta", "gpt2", "GPT2LMHeadModel",
    "llama", "t5", "vit", "olmoe",
)  # fmt: skip

LOAD = """
import sys
import torch
import pnn_compile as pnn
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    compiled = pnn.load(folder)
    report = compiled.verify()
    assert report.ok, (folder, report)
    wanted = torch.load(f"{folder}.pt")
    leaves = torch.utils._pytree.tree_leaves(compiled.sequential.eval()(**compiled.program.args))
    for found, value in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(found, value)
assert "transformers" not in sys.modules
"""


def run(rank: int, folders: list[str]) -> list[float]:
    """Run every artifact on this rank and give the sums of its outputs."""
    return [
        _sum(pnn.runtime.distribute(folder).eval()(**pnn.load(folder).program.args))
        for folder in folders
    ]


def _sum(output: Any) -> float:
    return sum(tensor.double().sum().item() for tensor in _tensors(output))


def _tensors(output: Any) -> list[torch.Tensor]:
    values = [*output.values()] if hasattr(output, "values") else output
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_models_save_load_verify_and_run_on_two_ranks(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    declare()
    pytest.importorskip("transformers")
    folders, sums = [], []
    for name in names:
        source = load_source(f"hf:{name}")
        compiled = pnn.compile(source.model, args=source.args, kwargs=source.kwargs, stages=2)
        folders.append(str(compiled.save(tmp_path / name)))
        wanted = _tensors(source.model.eval()(*source.args, **source.kwargs))
        torch.save(wanted, f"{folders[-1]}.pt")
        sums.append(_sum(compiled.module.eval()(**compiled.program.args)))
    subprocess.run([sys.executable, "-c", LOAD, *folders], check=True, timeout=300)
    results = start(run, 2, tmp_path, folders)
    assert results[1] == pytest.approx(sums, rel=1e-5)  # the rank of the last stage
