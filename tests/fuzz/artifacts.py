"""Damage artifacts in every way and load them: `python -m tests.fuzz.artifacts --count 5000`.

A damaged artifact must be refused with an ArtifactError, or load as a network that can be reported
and run; one whose tensors alone were damaged must be refused or equal. Nothing may run, crash, hang
or ask for more memory than the files justify.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import pnn_compile as pnn
from examples import decoder
from pnn_compile.report.html import page
from pnn_compile.report.page_data import page_data
from pnn_compile.report.terminal import stage_tree, to_text
from tests.fuzz.edits import EDITS, JSON_FILES, Case
from tests.models.builders import block_chain

OUTCOMES = ("refused", "equal", "edited", "wrong", "foreign", "memory", "executed", "hang", "crash")
BAD = frozenset(OUTCOMES[3:])
SECONDS = 60
MEMORY = 3 * 2**30
_FORBIDDEN = ("os.system", "os.exec", "os.mkdir", "os.fork", "os.posix_spawn", "subprocess.Popen",
              "pickle.find_class", "socket.connect", "shutil.rmtree", "ctypes.dlopen")  # fmt: skip


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(6, 6, batch_first=True) for _ in range(3))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = x + layer(x)[0]
        return {"y": self.norm(x) * scale}


def _networks() -> list[pnn.Compiled]:
    torch.manual_seed(0)
    images = nn.Sequential(*(
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4)
    ))  # fmt: skip
    sequence = (torch.randn(2, 5, 6), torch.randn(2, 1, 1))
    text = decoder.build_model(layers=2, width=16)
    return [
        pnn.compile(block_chain(6, 8, norm=True, dropout=0.1), torch.randn(4, 8), stages=3),
        pnn.compile(images, torch.randn(2, 3, 8, 8), stages=2, coarse="units"),
        pnn.compile(_Recurrent(), sequence, stages=2, coarse="linear+lowrank"),
        pnn.compile(text, decoder.example_inputs(), stages=2, sweep="collapsed"),
    ]


def _run(compiled: pnn.Compiled) -> list[Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = compiled.module.eval()(**compiled.program.args)
    return pytree.tree_leaves(outputs)


@dataclass
class Base:
    """An intact artifact, and what it computes."""

    folder: Path
    outputs: list[Any]
    data: tuple[Any, ...]

    @classmethod
    def of(cls, compiled: pnn.Compiled, folder: Path) -> Base:
        compiled.save(folder)
        (folder / "report.html").unlink()
        return cls(folder, _run(pnn.load(folder)), _json(folder))


def _json(folder: Path) -> tuple[Any, ...]:
    return tuple(json.loads((folder / name).read_text()) for name in JSON_FILES)


def make_case(number: int, bases: Sequence[Base], work: Path) -> tuple[str, Base, Path, Path]:
    """Damage a copy of an artifact; the number decides how."""
    draw = random.Random(number)
    base, other = draw.choice(bases), draw.choice(bases)
    folder, flag = work / f"case-{number}", work / f"flag-{number}"
    shutil.copytree(base.folder, folder)
    edit = draw.choice(EDITS)
    edit(Case(folder, other.folder, draw, flag))
    return edit.__name__, base, folder, flag


def judge(base: Base, folder: Path) -> tuple[str, str]:
    """Load a damaged artifact and use it; return the outcome and a message."""
    try:
        compiled = pnn.load(folder)
    except pnn.ArtifactError as error:
        memory = any(word in str(error) for word in ("allocate", "MemoryError", "bad_alloc"))
        return ("memory" if memory else "refused"), str(error)
    except BaseException as error:
        return "foreign", f"load: {type(error).__name__}: {error}"
    try:
        shown = compiled.report() + to_text(stage_tree(compiled)) + repr(compiled)
        page(page_data(compiled))
        outputs = _run(compiled)
    except BaseException as error:
        return "foreign", f"use: {type(error).__name__}: {error}"
    if not all(line.isprintable() for line in shown.splitlines()):
        return "foreign", "control characters are shown"
    same = len(outputs) == len(base.outputs) and all(map(_equal, outputs, base.outputs))
    if same:
        return "equal", ""
    return ("wrong" if _json(folder) == base.data else "edited"), "other outputs"


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other or bool(one == other)
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _watched(work: Callable[[], tuple[str, str]], flag: Path) -> tuple[str, str]:
    """Judge, and notice what runs: calls of the system while the files are read."""
    events: list[str] = []
    active = [True]

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if active[0] and event.startswith(_FORBIDDEN):
            events.append(event)

    sys.addaudithook(hook)
    outcome = work()
    active[0] = False
    return ("executed", ", ".join(events)) if events or flag.exists() else outcome


def _child(numbers: Sequence[int], bases: Sequence[Base], work: Path, pipe: int) -> None:
    """Judge cases one after another, each with a limit of time; write a line for each."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    for number in numbers:
        kind, base, folder, flag = make_case(number, bases, work)
        os.write(pipe, (json.dumps([number, kind, "", ""]) + "\n").encode())
        signal.alarm(SECONDS)
        outcome, message = _watched(partial(judge, base, folder), flag)
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)
        text = json.dumps([number, kind, outcome, message[:400]])
        os.write(pipe, (text + "\n").encode())


def _spawn(numbers: Sequence[int], bases: Sequence[Base], work: Path) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _child(numbers, bases, work, writing)
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def run(numbers: Sequence[int], jobs: int) -> list[tuple[int, str, str, str]]:
    """Judge cases in processes; return number, kind, outcome and message of each."""
    results: list[tuple[int, str, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bases = [Base.of(c, work / f"base-{i}") for i, c in enumerate(_networks())]
        for base in bases:
            assert judge(base, base.folder)[0] == "equal"
        pending = [list(numbers[i : i + 25]) for i in range(0, len(numbers), 25)]
        while pending:
            batch = [pending.pop(0) for _ in range(min(jobs, len(pending)))]
            for chunk, (child, reading) in [(c, _spawn(c, bases, work)) for c in batch]:
                with os.fdopen(reading) as lines:
                    begun: dict[int, Any] = {}
                    done: dict[int, Any] = {}
                    for line in lines:
                        number, kind, outcome, message = json.loads(line)
                        (done if outcome else begun)[number] = (kind, outcome, message)
                _, status = os.waitpid(child, 0)
                results += [(n, *row) for n, row in done.items()]
                for lost in begun.keys() - done.keys():
                    ended = os.WTERMSIG(status)
                    kind = "hang" if ended == signal.SIGALRM else "crash"
                    results.append((lost, begun[lost][0], kind, f"signal {ended}"))
                rest = [n for n in chunk if n not in begun]
                if rest and begun.keys() - done.keys():
                    pending.insert(0, rest)
    return results


def table(results: Sequence[tuple[int, str, str, str]]) -> str:
    """Count outcomes by kind of edit, in Markdown."""
    counts: dict[str, collections.Counter[str]] = {}
    for _, kind, outcome, _ in results:
        counts.setdefault(kind, collections.Counter())[outcome] += 1
    counts = dict(sorted(counts.items()))
    counts["all"] = sum(counts.values(), collections.Counter())
    lines = [f"| edit | count | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * (len(OUTCOMES) + 1)]
    for kind, row in counts.items():
        cells = [str(row.total()), *(str(row[name]) for name in OUTCOMES)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases that the command line asks for, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    results = run(range(options.first, options.first + options.count), options.jobs)
    bad = [row for row in results if row[2] in BAD]
    for number, kind, outcome, message in bad:
        sys.stdout.write(f"{outcome} case {number} ({kind}): {message}\n")
    sys.stdout.write(table(results) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
