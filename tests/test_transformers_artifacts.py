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
from tests.ranks import start

NAMES = (
    "bert", "BertForSequenceClassification", "roberta", "distilbert", "gpt2", "GPT2LMHeadModel",
    "llama", "LlamaForCausalLM", "t5", "vit",
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


def run(rank: int, folders: list[str]) -> list[torch.Tensor]:
    """Run every artifact on this rank and give the sums of its outputs."""
    sums = []
    for folder in folders:
        network = pnn.runtime.distribute(folder).eval()
        outputs = network(**pnn.load(folder).program.args)
        leaves = torch.utils._pytree.tree_leaves(outputs)
        sums.append(sum(leaf.double().sum() for leaf in leaves if isinstance(leaf, torch.Tensor)))
    return sums


def _tensors(output: Any) -> list[torch.Tensor]:
    values = [*output.values()] if hasattr(output, "values") else output
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def test_ten_models_save_load_verify_and_run_on_two_ranks(tmp_path: Path) -> None:
    declare()
    pytest.importorskip("transformers")
    folders, sums = [], []
    for name in NAMES:
        source = load_source(f"hf:{name}")
        compiled = pnn.compile(source.model, args=source.args, kwargs=source.kwargs, stages=2)
        folders.append(str(compiled.save(tmp_path / name)))
        torch.save(
            _tensors(source.model.eval()(*source.args, **source.kwargs)), f"{folders[-1]}.pt"
        )
        outputs = _tensors(compiled.module.eval()(**compiled.program.args))
        sums.append(sum(output.double().sum() for output in outputs))
    subprocess.run([sys.executable, "-c", LOAD, *folders], check=True, timeout=300)
    results = start(run, 2, tmp_path, folders)
    torch.testing.assert_close(torch.stack(results[1]), torch.stack(sums))  # the last stage's rank
