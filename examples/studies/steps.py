"""Seconds that the parts of parareal ResNet-1001 take in a training step, each alone on one device.

    python -m examples.studies.steps --device cuda --stages 3 6 12 18

With one device a stage, a step takes as long as the slowest stage with its guess, then the
corrections one after another and the head. Each part is run forward and backward by itself, so
what devices say to each other is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import pnn_compile as pnn
from examples import resnet1001
from passes.transform.executor import Executor

__all__ = ["main", "measured"]

_WARM_UP, _REPEATS = 2, 5


def measured(compiled: pnn.Compiled, images: torch.Tensor, bfloat16: bool) -> dict[str, Any]:
    """Time the original, every stage with its guess, the sweep and the head.

    Args:
        compiled: The network, in residual form and with a sweep of kind chain.
        images: A batch `[B, 3, H, W]` on the device to measure.
        bfloat16: Whether to run in mixed precision.
    """
    compiled.module.to(images.device).train()
    executor, inputs = Executor(compiled), {"images": images}

    def seconds(run: Callable[[], Any]) -> float:
        found = []
        for _ in range(_WARM_UP + _REPEATS):
            _wait(images.device)
            start = time.perf_counter()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
                leaves = list(_tensors(run()))
            torch.stack([leaf.float().sum() for leaf in leaves]).sum().backward()
            _wait(images.device)
            found.append(time.perf_counter() - start)
        return statistics.median(found[_WARM_UP:])

    with torch.no_grad():
        guesses: list[dict[str, torch.Tensor]] = [{}]
        guesses += [executor.guess(n, inputs) for n in range(1, len(compiled.plan.stages))]
        last = executor.last_state(inputs)
    moved = [{k: v.detach().requires_grad_() for k, v in guess.items()} for guess in guesses]

    def stage(number: int) -> Any:
        state = executor.guess(number, inputs) if number else {}
        return executor.fine(number, state, inputs)

    def correct(number: int) -> Any:
        true = {name: value + 1 for name, value in moved[number].items()}
        return executor.correct(number, guesses[number], true, inputs)

    ended = {name: value.detach().requires_grad_() for name, value in last.items()}
    numbers = range(len(compiled.plan.stages))
    stages = [seconds(lambda n=n: stage(n)) for n in numbers]  # type: ignore[misc]
    sweep = sum(seconds(lambda n=n: correct(n)) for n in numbers[1:])  # type: ignore[misc]
    head = seconds(lambda: executor.head(ended, inputs))
    original = seconds(lambda: compiled.sequential(images))
    return {
        "stages": len(stages), "batch": len(images), "original": original,
        "slowest stage": max(stages), "sweep": sweep, "head": head,
        "speedup": original / (max(stages) + sweep + head),
    }  # fmt: skip


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        yield from value.values() if isinstance(value, dict) else value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile ResNet-1001 for every number of stages and measure its parts."""
    parser = argparse.ArgumentParser(description="Seconds of the parts of parareal ResNet-1001.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 6, 12, 18])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--units", type=int, default=111, help="residual units in a group")
    parser.add_argument("--after", type=Path, help="measure as soon as this file exists")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args(arguments)
    networks = []
    for stages in options.stages:
        torch.manual_seed(0)
        model = resnet1001.build_model(options.units)
        networks.append(
            pnn.compile(model, resnet1001.example_inputs(), stages=stages, coarse="linear")
        )
    while options.after is not None and not options.after.exists():
        time.sleep(0.5)
    name = options.device
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name()
    images = torch.randn(options.batch, 3, 32, 32).to(options.device)
    for compiled in networks:
        row = measured(compiled, images, bfloat16=options.device == "cuda") | {"device": name}
        compiled.module.to("cpu")
        print(json.dumps(row), flush=True)
        if options.results is not None:
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
