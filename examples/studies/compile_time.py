"""CPU seconds to compile and verify, from six layers to 10,000, beside torch.export.

    python -m examples.studies.compile_time
    python -m examples.studies.compile_time --blocks 333 1000 3333

Every row is a process of its own, as a first compilation imports what later ones find.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["main", "measured"]


def six_layers() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model of six convolutions, and its input."""
    layers = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6)]
    return nn.Sequential(*layers), (torch.randn(2, 3, 16, 16),)


def resnet(blocks: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A ResNet of so many residual blocks, three layers each, and its input."""
    from examples import resnet1001

    return resnet1001.build_model(blocks // 3), resnet1001.example_inputs()


def measured(blocks: int, export: bool = True) -> dict[str, float]:
    """Measure one model in this process: compile, verify, torch.export.

    Args:
        blocks: Residual blocks; 0 for the model of six layers.
        export: Whether to run torch.export, which takes minutes for a deep model.

    Returns:
        CPU seconds by name.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds: dict[str, float] = {}

    def clocked(name: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        seconds[name] = time.process_time() - start
        return result

    import pnn_compile as pnn

    model, inputs = resnet(blocks) if blocks else six_layers()
    compiled = clocked("compile", lambda: pnn.compile(model, inputs, stages=3))
    verification = clocked("verify", compiled.verify)
    assert verification.ok
    if export:
        clocked("torch.export", lambda: torch.export.export(model, inputs))
    with torch.no_grad():
        clocked("forward", lambda: model(*inputs))
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, a row a model."""
    parser = argparse.ArgumentParser(description="CPU seconds to compile.")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 333])
    parser.add_argument("--row", action="store_true", help="measure in this process")
    parser.add_argument("--no-export", action="store_true", help="leave torch.export out")
    options = parser.parse_args(arguments)
    if options.row:
        [blocks] = options.blocks
        seconds = measured(blocks, export=not options.no_export)
        columns = ("compile", "verify", "torch.export", "forward")
        cells = " | ".join(f"{seconds[name]:.2f}" if name in seconds else "-" for name in columns)
        print(f"| {f'{blocks} blocks' if blocks else 'six layers'} | {cells} |")
        return
    print("| model | compile | verify | torch.export | forward |\n|---|---|---|---|---|")
    for blocks in options.blocks:
        command = [sys.executable, "-m", "examples.studies.compile_time"]
        command += ["--row", "--blocks", str(blocks), *["--no-export"] * options.no_export]
        done = subprocess.run(command, capture_output=True)
        sys.stdout.write(done.stdout.decode() or f"{blocks}: {done.stderr.decode()[-300:]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
