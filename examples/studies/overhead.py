"""What calling layers costs: a model, the program captured from it, and its layers called directly.

    python -m examples.studies.overhead examples/resnet1001.py --batch 1,2,8

A training step of each in one process and one thread, of the kind that the ranks are, in turns;
the table says how many times as fast as the model each is, round by round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from passes.capture.ladder import capture
from passes.ir.direct_call import DirectCaller, with_frame_headroom
from pnn_compile.bench.measurements import mean_square, optimizer_of
from pnn_compile.runtime.local_ranks import run_on_ranks
from pnn_compile.sources import load_source

MODEL, CAPTURED, DIRECT = "model", "captured program", "layers called directly"
_WARM_UP = 2


def study(
    device: torch.device, model: str, batches: Sequence[int], rounds: int
) -> list[dict[str, list[float]]]:
    """Seconds of every round, by contender, for every batch size."""
    source = load_source(model, (), ())
    program = capture(source.model, source.args, source.kwargs)
    runs: dict[str, Callable[..., Any]] = {MODEL: source.model.train()}
    runs[CAPTURED] = captured = copy.deepcopy(program.module).train()
    direct = copy.deepcopy(captured)
    runs[DIRECT] = DirectCaller(direct)
    modules = {MODEL: source.model, CAPTURED: captured, DIRECT: direct}
    optimizers = {name: optimizer_of(module) for name, module in modules.items()}

    def step(name: str, batch: Sequence[torch.Tensor]) -> None:
        optimizer = optimizers[name]
        assert optimizer is not None
        optimizer.zero_grad()
        mean_square(runs[name](*batch)).backward()
        optimizer.step()

    found = []
    for size in batches:
        batch = [each[:1].repeat(size, *[1] * (each.dim() - 1)) for each in source.args]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        names = [*runs]
        for turn in range(_WARM_UP + rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                with_frame_headroom(step, name, batch)
                seconds[name].append(time.perf_counter() - start)
        found.append({name: own[_WARM_UP:] for name, own in seconds.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--batch", default="1,2,8")
    parser.add_argument("--rounds", type=int, default=15)
    words = parser.parse_args()
    batches = [int(each) for each in words.batch.split(",")]
    (found,) = run_on_ranks(study, 1, words.model, batches, words.rounds)
    print("| batch | contender | median, ms | times as fast | from .. to |\n|---|---|---|---|---|")
    for batch, seconds in zip(batches, found, strict=True):
        for name, own in seconds.items():
            ratios = [a / b for a, b in zip(seconds[MODEL], own, strict=True)]
            print(
                f"| {batch} | {name} | {statistics.median(own) * 1e3:.0f} | "
                f"{statistics.median(ratios):.2f} | {min(ratios):.2f} .. {max(ratios):.2f} |"
            )


if __name__ == "__main__":
    main()
