"""Starts a function on several processes that reach each other through Gloo."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, start_processes

__all__ = ["begin", "start"]

_NUMBERS = itertools.count()

# The server imports torch once and has no threads: ranks forked from it start in no time.
multiprocessing.set_forkserver_preload(
    [
        "examples.decoder",
        "examples.resnet110",
        "hypothesis",
        "pnn_compile.bench",
        "pnn_compile.runtime",
        "pytest",
        "tests.distributed.ranks",
        "tests.models.distributed_models",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
        "torch.testing",
    ]
)


def start(function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` on every rank; give what each returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException: It raised on some rank; the message holds the
            traceback.
    """
    context, results = begin(function, ranks, folder, *arguments)
    while not context.join():
        pass
    return [torch.load(results / f"{rank}.pt") for rank in range(ranks)]


def begin(
    function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, limit: float = 60
) -> tuple[ProcessContext, Path]:
    """Start it, and give the processes and the folder that their results go to.

    Args:
        function: What to run.
        ranks: Number of processes.
        folder: Where files may be written.
        arguments: Of the function.
        limit: Seconds that a rank waits for another.
    """
    results = folder / f"ranks-{next(_NUMBERS)}"
    results.mkdir()
    context = start_processes(
        _enter,
        (function, ranks, results, limit, arguments),
        nprocs=ranks,
        join=False,
        start_method="forkserver",
    )
    assert context is not None
    return context, results


def _enter(
    rank: int,
    function: Callable[..., Any],
    ranks: int,
    results: Path,
    limit: float,
    arguments: Any,
) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{results / 'store'}", datetime.timedelta(seconds=limit)
    dist.init_process_group("gloo", store, timeout, world_size=ranks, rank=rank)
    try:
        torch.save(function(rank, *arguments), results / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
