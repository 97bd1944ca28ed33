"""A loop in time on two processes: what the network computes in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import pnn_compile as pnn
from tests.distributed.ranks import start
from tests.models import loops


def _compiled() -> tuple[pnn.Compiled, torch.Tensor]:
    torch.manual_seed(0)
    [noise] = loops.inputs(loops.Heun)
    return pnn.compile(loops.Heun(6).eval(), noise, stages=4, iterations=2), noise


def _run(rank: int) -> Any:
    compiled, noise = _compiled()
    network = pnn.runtime.distribute(compiled, placement=(0, 0, 1, 1)).eval()
    with torch.no_grad():
        return network(noise)


def test_two_ranks(tmp_path: Path) -> None:
    compiled, noise = _compiled()
    assert compiled.plan.predicts
    *_, result = start(_run, 2, tmp_path)
    torch.testing.assert_close(result, compiled.module.eval()(noise).detach())
