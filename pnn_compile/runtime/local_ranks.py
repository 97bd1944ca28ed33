"""Start local ranks: processes on this machine that communicate by torch.distributed."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
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
START_METHOD = "spawn"
"""How the processes start (`multiprocessing.get_context`)."""


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
        KeyboardInterrupt: As usual; the ranks are gone then.
    """
    from torch.multiprocessing.spawn import ProcessException, start_processes

    with tempfile.TemporaryDirectory() as folder, _killed_on_error():
        call = (function, ranks, Path(folder), arguments, threads, cuda)
        try:
            with _environment(KEEP_MEMORY), _without_interrupts():
                context = start_processes(  # type: ignore[no-untyped-call]
                    _enter, call, nprocs=ranks, join=False, start_method=START_METHOD
                )
            assert context is not None
            while not context.join():
                pass
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
    # Its parent ends it: with a signal, as ranks start with Ctrl-C blocked, or by its own end.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
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
def _killed_on_error() -> Iterator[None]:
    """Kill the processes that start in this context if it fails: they may wait for minutes."""
    before = {*multiprocessing.active_children()}
    try:
        yield
    except BaseException:
        for process in {*multiprocessing.active_children()} - before:
            process.kill()
            process.join()
        raise


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Put off Ctrl-C to the end of this context; processes that start in it never see it.

    A terminal sends it to all processes of the command, and every rank would show a traceback.
    """
    resource_tracker.ensure_running()  # it unblocks the signal when it starts
    arrived: list[int] = []
    handler = None
    if threading.current_thread() is threading.main_thread():
        # Blocked here, the signal may still reach another thread, and its handler this one.
        handler = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if arrived:
            signal.raise_signal(signal.SIGINT)


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
