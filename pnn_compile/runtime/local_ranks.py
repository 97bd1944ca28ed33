"""Start local ranks: processes on this machine that communicate by torch.distributed."""

from __future__ import annotations

import datetime
import gc
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from passes.errors import RuntimeFault

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Environment in which glibc keeps freed memory for the next step.

Otherwise every activation of a training step is mapped, zeroed and unmapped by the kernel, which
slows one process down, and several at once much more.
"""
TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for another one."""


def run_on_ranks(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    threads: int = 1,
    cuda: bool = False,
) -> list[Any]:
    """Run `function(device, *arguments)` in one process per rank; return the results.

    Args:
        function: A function of a module; its arguments and results are pickled.
        ranks: Number of processes.
        arguments: Its arguments, the same on every rank.
        threads: Threads of each process.
        cuda: Use one GPU a rank if there are enough; else all compute on the CPU.

    Raises:
        RuntimeFault: It failed on a rank; the message contains the traceback.
    """
    from torch.multiprocessing.spawn import ProcessException, spawn

    with tempfile.TemporaryDirectory() as folder:
        call = (function, ranks, Path(folder), arguments, threads, cuda)
        try:
            with _environment(KEEP_MEMORY):
                spawn(_enter, call, nprocs=ranks)  # type: ignore[no-untyped-call]
        except ProcessException as error:
            raise RuntimeFault(f"a rank failed: {error}") from error
        return [pickle.loads(_result(Path(folder), rank).read_bytes()) for rank in range(ranks)]


def _enter(
    rank: int,
    function: Callable[..., Any],
    ranks: int,
    folder: Path,
    arguments: tuple[Any, ...],
    threads: int,
    cuda: bool,
) -> None:
    torch.set_num_threads(threads)
    device, backend = torch.device("cpu"), "gloo"
    if cuda and torch.cuda.device_count() >= ranks:
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{folder / 'store'}", TIMEOUT, ranks, rank)
    try:
        _result(folder, rank).write_bytes(pickle.dumps(function(device, *arguments)))
    finally:
        # Objects in reference cycles would keep Gloo's threads alive after the interpreter, and
        # these abort the process if they still own a tensor.
        gc.collect()
        dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pickle"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set yet, for processes that start in this context."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
