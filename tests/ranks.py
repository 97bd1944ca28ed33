"""Starts a function on several processes that reach each other through Gloo."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

__all__ = ["start"]

TIMEOUT = datetime.timedelta(seconds=60)


def start(function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` on every rank; give what each returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException: It raised on some rank; the message holds the
            traceback.
    """
    spawn(_enter, (function, ranks, folder, arguments), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _enter(
    rank: int, function: Callable[..., Any], ranks: int, folder: Path, arguments: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder / 'store'}", TIMEOUT, world_size=ranks, rank=rank
    )
    try:
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
