"""Stage models side by side, beside the original in one ONNX Runtime session, on the same cores.

python -m examples.studies.onnx_speed examples/resnet1001.py -n 2 --cut-at group2.42.norm1

All contenders run in one process, in turns, round after round: one run that is not timed, then the
mean of three; with `--cold` one run alone, after a pause in which the cores went idle. `--folder`
keeps what was exported and measures what is there already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import pnn_compile as pnn
from examples.studies.onnx_export import load
from pnn_compile.export.onnx import StageExecutor, export_onnx, lower_network, open_streams
from pnn_compile.export.onnx.run import session

Feeds = Mapping[str, np.ndarray]
Run = Callable[[Feeds], object]

BASELINE = "original, 1 thread"

_PAUSE = 0.1
"""Seconds between contenders: threads of ONNX Runtime spin for a while after a run."""
_RUNS = 3
"""Runs of a turn, behind one that is not timed, as in a server that is busy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("-n", "--stages", type=int, default=2)
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", action="store_true", help="time one run after a pause alone")
    parser.add_argument("--cut-at", metavar="NAMES", help="modules that start stages 1.., by comma")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--export-only", action="store_true")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = words.folder or Path(temporary)
        if not (folder / "manifest.json").exists():
            export(words.model, words.stages, words.cut_at, folder)
        if words.export_only:
            return
        print(
            "| batch | contender | median, ms | from .. to | times as fast |\n|---|---|---|---|---|"
        )
        contenders = make(folder, words.stages)
        for batch in map(int, words.batch.split(",")):
            for line in measured(contenders, folder, batch, words.rounds, words.cold):
                print(f"| {' | '.join(line)} |", flush=True)


def export(model: str, stages: int, cut_at: str | None, folder: Path) -> None:
    """Write the original as one model, the network as one model and as stage models."""
    source = load(model)
    cuts = cut_at.split(",") if cut_at else None
    compiled = pnn.compile(source.model, args=source.args, kwargs=source.kwargs, stages=1)
    compiled.export_onnx(folder / "original.onnx", verify=False)
    compiled = pnn.compile(
        source.model, args=source.args, kwargs=source.kwargs, stages=stages, cuts=cuts
    )
    lowered = lower_network(compiled)
    export_onnx(compiled, folder / "model.onnx", verify=False, lowered=lowered)
    export_onnx(compiled, folder, per_stage=True, lowered=lowered)


def make(folder: Path, stages: int) -> dict[str, Run]:
    """The contenders by name."""
    original, whole = folder / "original.onnx", folder / "model.onnx"
    executor = StageExecutor(folder)
    copies = [session(original) for _ in range(stages)]
    pool = ThreadPoolExecutor(stages)

    def run_copies(feeds: Feeds) -> None:
        for done in [pool.submit(copy.run, None, dict(feeds)) for copy in copies]:
            done.result()

    def parallel(options: Any) -> None:
        options.inter_op_num_threads = stages + 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL

    return {
        BASELINE: _run(session(original)),
        f"original, {stages} threads": _run(session(original, threads=stages)),
        f"original, {stages} copies at once": run_copies,
        f"stage models, {stages} threads": executor.run,
        "one file, 1 thread": _run(session(whole)),
        "one file, ORT_PARALLEL alone": _run(session(whole, options=parallel)),
        "one file, a stream a stage": _run(open_streams(whole)),
    }


def _run(opened: Any) -> Run:
    return lambda feeds: opened.run(None, dict(feeds))


def measured(
    contenders: Mapping[str, Run], folder: Path, batch: int, rounds: int, cold: bool
) -> list[list[str]]:
    """Run all contenders in turns; one line each."""
    feeds = inputs(folder, batch)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first round warms up
        for name, run in contenders.items():
            time.sleep(_PAUSE)
            if not cold:
                run(feeds)
            count = 1 if cold else _RUNS
            start = time.perf_counter()
            for _ in range(count):
                run(feeds)
            if number:
                seconds[name].append((time.perf_counter() - start) / count)
    lines = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[BASELINE], times, strict=True)]
        least, most = min(times) * 1e3, max(times) * 1e3
        median = statistics.median(times) * 1e3
        ratio = statistics.median(ratios)
        lines.append(
            [f"{batch}", name, f"{median:.1f}", f"{least:.1f} .. {most:.1f}", f"{ratio:.2f}"]
        )
    return lines


def inputs(folder: Path, batch: int) -> Feeds:
    """Random inputs of the types in the manifest."""
    random = np.random.default_rng(0)
    feeds = {}
    for slot in json.loads((folder / "manifest.json").read_text())["inputs"]:
        shape = [batch if isinstance(size, str) else size for size in slot["shape"]]
        if slot["dtype"].startswith("float"):
            feeds[slot["name"]] = random.standard_normal(shape).astype(slot["dtype"])
        else:
            feeds[slot["name"]] = random.integers(0, 2, shape).astype(slot["dtype"])
    return feeds


if __name__ == "__main__":
    main()
