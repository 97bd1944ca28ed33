"""Kill saves at random times: `python -m tests.fuzz.saves --count 300`.

A process that writes over something older is killed after its first write. What is there then must
be the old or the new contents, whole; and after one more save nothing else is left.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import pnn_compile as pnn
from pnn_compile.export.onnx.export import drafting
from pnn_compile.export.onnx.run import StageExecutor, session
from pnn_compile.fit.optimizer import FitState
from tests.models.builders import block_chain

REFUSED = 3
"""Exit code of a process whose work ended in a PnnError."""

OUTCOMES = ("old", "new", "lost", "leftovers")


@dataclass(frozen=True)
class Kind:
    """A thing that is saved.

    Attributes:
        save: Writes version 0 or 1 into a directory.
        read: Returns the version that is there; anything else, or an error, is a loss.
    """

    save: Callable[[Path, int], object]
    read: Callable[[Path], int]


@cache
def _network(version: int) -> pnn.Compiled:
    torch.manual_seed(0)
    model = type(f"Version{version}", (nn.Sequential,), {})(*block_chain(4, _width(version)))
    return pnn.compile(model, torch.randn(3, _width(version)), stages=2)


def _width(version: int) -> int:
    return 64 + version


def _read_artifact(folder: Path) -> int:
    compiled = pnn.load(folder / "net")
    compiled.module(*compiled.program.args.values())
    return int(compiled.program.args["input"].shape[1]) - _width(0)


def _save_fit(folder: Path, version: int) -> None:
    layer = nn.Linear(300, 300)
    nn.init.constant_(layer.weight, version)
    nn.init.constant_(layer.bias, version)
    state = FitState(layer, {}, None)
    state._file = folder / "fit.pt"
    state.save()


def _read_fit(folder: Path) -> int:
    layer = nn.Linear(300, 300)
    FitState(layer, {}, folder / "fit.pt")
    assert layer.weight.unique().tolist() == layer.bias.unique().tolist()
    return int(layer.bias[0].item())


def _save_html(folder: Path, version: int) -> None:
    _network(version).export_html(folder / "report.html")


def _read_html(folder: Path) -> int:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")
    return int("Version1" in text)


@cache
def _exported(per_stage: bool, version: int) -> tempfile.TemporaryDirectory[str]:
    """Export once: the lowering takes many times as long as the writing."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) if per_stage else Path(folder.name) / "model.onnx"
    _network(version).export_onnx(path, per_stage=per_stage, verify=False)
    return folder


def _save_onnx(folder: Path, version: int, *, per_stage: bool = False) -> None:
    with drafting(folder) as draft:
        shutil.copytree(_exported(per_stage, version).name, draft, dirs_exist_ok=True)


def _read_onnx(folder: Path) -> int:
    return int(session(folder / "model.onnx").get_inputs()[0].shape[1]) - _width(0)


def _save_stages(folder: Path, version: int) -> None:
    _save_onnx(folder, version, per_stage=True)


def _read_stages(folder: Path) -> int:
    with StageExecutor(folder) as executor:
        return int(executor.manifest.inputs[0].shape[1]) - _width(0)


def _checkpoints(folder: Path) -> tuple[Any, pnn.runtime.Checkpoints]:
    if not dist.is_initialized():
        store = f"file://{tempfile.mkdtemp(dir=folder.parent)}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    module = pnn.runtime.distribute(_network(0), placement=[0, 0])
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    return module, pnn.runtime.Checkpoints(folder / "run", module, optimizer, keep=1)


def _save_run(folder: Path, version: int) -> None:
    module, checkpoints = _checkpoints(folder)
    module.seed = version
    checkpoints.save()


def _read_run(folder: Path) -> int:
    module, checkpoints = _checkpoints(folder)
    module.seed = -1
    checkpoints.resume()
    return int(module.seed)


KINDS: Mapping[str, Kind] = {
    "artifact": Kind(lambda folder, v: _network(v).save(folder / "net"), _read_artifact),
    "checkpoint of a fit": Kind(_save_fit, _read_fit),
    "checkpoint of a run": Kind(_save_run, _read_run),
    "HTML report": Kind(_save_html, _read_html),
    "ONNX model": Kind(_save_onnx, _read_onnx),
    "ONNX stages": Kind(_save_stages, _read_stages),
}


_EVENTS = ("open", "os.", "shutil.", "fcntl.", "ctypes.call_function")


def in_child(
    work: Callable[[], object], pipe: int | None = None, kill_at: int | None = None
) -> int:
    """Start a process that does some work.

    Args:
        work: The work.
        pipe: Gets a byte for every call of the system from the first write of a hidden file on.
        kill_at: The process kills itself before that many such calls.

    Returns:
        The number of the process.
    """
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        begins = event in ("open", "os.mkdir") and str(args[0]).endswith(".new")
        if pipe is not None and (begins or count) and event.startswith(_EVENTS):
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            os.write(pipe, b"w")

    sys.addaudithook(hook)
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os._exit(REFUSED if isinstance(error, pnn.PnnError) else 4)
    finally:
        os._exit(5)


def _measure(kind: Kind, folder: Path) -> tuple[float, int]:
    """Return the seconds from the first write to the end of a save, and its calls of the system."""
    reading, writing = os.pipe()
    child = in_child(lambda: kind.save(folder, 0), writing)
    os.close(writing)
    os.read(reading, 1)
    begun, calls = time.monotonic(), 1
    while more := os.read(reading, 4096):
        calls += len(more)
    os.waitpid(child, 0)
    os.close(reading)
    return time.monotonic() - begun, calls


def kill_once(kind: Kind, folder: Path, draw: random.Random, seconds: float, calls: int) -> str:
    """Kill a save of version 1 over version 0, at a time or at a call; return the outcome."""
    os.waitpid(in_child(lambda: kind.save(folder, 0)), 0)
    reading, writing = os.pipe()
    at = draw.randrange(calls) if draw.random() < 0.7 else None
    child = in_child(lambda: kind.save(folder, 1), writing, at)
    os.close(writing)
    os.read(reading, 1)
    if at is None:
        time.sleep(draw.random() * seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    version = read_in_child(kind, folder)
    if version not in (0, 1):
        return "lost"
    _, status = os.waitpid(in_child(lambda: kind.save(folder, 0)), 0)
    hidden = [path for path in folder.rglob(".*") if path.name != ".metadata"]
    if hidden or status or read_in_child(kind, folder) != 0:
        return "leftovers"
    return ("old", "new")[version]


def read_in_child(kind: Kind, folder: Path) -> int | None:
    """Return the version that another process reads; None if it cannot."""
    reading, writing = os.pipe()
    child = in_child(lambda: os.write(writing, bytes([kind.read(folder)])))
    os.close(writing)
    answer = os.read(reading, 1)
    os.close(reading)
    os.waitpid(child, 0)
    return answer[0] if answer else None


def run(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Kill saves of all kinds in turns; return kind and outcome of each."""
    for version in (0, 1):
        _exported(False, version), _exported(True, version)
    draw = random.Random(seed)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folders = {kind: Path(name) / str(i) for i, kind in enumerate(KINDS)}
        limits = {}
        for kind, folder in folders.items():
            folder.mkdir()
            os.waitpid(in_child(partial(KINDS[kind].save, folder, 0)), 0)
            limits[kind] = _measure(KINDS[kind], folder)
        for number in range(count):
            kind = list(KINDS)[number % len(KINDS)]
            outcome = kill_once(KINDS[kind], folders[kind], draw, *limits[kind])
            results.append((kind, outcome))
    return results


def table(results: Sequence[tuple[str, str]]) -> str:
    """Count outcomes by kind, in Markdown."""
    lines = [f"| saved | kills | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * (len(OUTCOMES) + 1)]
    for kind in [*KINDS, "all"]:
        row = collections.Counter(o for k, o in results if kind in (k, "all"))
        cells = [str(row.total()), *(str(row[name]) for name in OUTCOMES)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Kill as many saves as the command line asks for, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = run(options.count, options.seed)
    sys.stdout.write(table(results) + "\n")
    return int(any(outcome in ("lost", "leftovers") for _, outcome in results))


if __name__ == "__main__":
    sys.exit(main())
