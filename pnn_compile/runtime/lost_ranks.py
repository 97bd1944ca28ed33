"""Name the rank whose end made the others fail.

A rank that dies closes its connections. Its neighbors fail and end, so that their neighbors fail:
what most ranks see is the loss of a rank that ended because it had lost another. So a rank leaves a
record in the store of torch.distributed before it ends with an error, and one that fails looks
which processes of this machine are gone, and which of them left no record: these were lost.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from passes.errors import RuntimeFault

PATIENCE = 3.0
"""Seconds to wait for the end of a process whose connections are closed."""


class Peers:
    """The other processes of a run.

    Args:
        group: The group of all of them; each must create this.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._here = _machine(), os.getpid()
        self._all: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(self._all, self._here, group=group)

    def explain(self, error: RuntimeFault, *, exchange: bool = True) -> RuntimeFault:
        """Return the error with the rank that is lost, if one is; record it for the others.

        Args:
            error: The error that this rank is about to end with.
            exchange: Whether it came from an exchange with other ranks, which one of them may have
                caused.
        """
        reason = self._reason() if exchange else ""
        if reason:
            error = RuntimeFault(f"{reason}; {error}")
        with suppress(Exception):  # the process that has the store may be gone
            dist.distributed_c10d._get_default_store().set(_key(self._here), str(error))
        return error

    def _reason(self) -> str:
        """Wait for a process to be gone, and describe it; "" if all go on."""
        deadline = time.monotonic() + PATIENCE
        while True:
            gone = [rank for rank, peer in enumerate(self._all) if self._is_gone(peer)]
            records = {rank: self._record(rank) for rank in gone}
            lost = [rank for rank in gone if not records[rank]]
            if 0 in lost and records[0] is None:
                lost = [0]  # the store was in its process
            if lost or (gone and time.monotonic() > deadline - PATIENCE / 2):
                break
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.05)
        if not lost:
            return f"rank {gone[0]} ended with an error of its own ({records[gone[0]]})"
        names = [f"rank {rank} (process {self._all[rank][1]})" for rank in lost]
        are = "have" if len(lost) > 1 else "has"
        return (
            f"{' and '.join(names)} {are} died: see its own output or the log of the system (out "
            "of memory?), then start all ranks again, from the last checkpoint if there is one"
        )

    def _is_gone(self, peer: Sequence[Any]) -> bool:
        machine, process = peer
        if machine != self._here[0] or process == self._here[1]:
            return False
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except OSError:  # another user's, or no /proc
            return False
        return state in "ZX"  # it waits for its parent to notice

    def _record(self, rank: int) -> str | None:
        """Return what a rank left before it ended, shortened; None if there is no store."""
        try:
            store = dist.distributed_c10d._get_default_store()
            if not store.check([_key(self._all[rank])]):
                return ""
            text = store.get(_key(self._all[rank])).decode()
        except Exception:
            return None
        return text.partition("\n")[0][:300]


def _machine() -> str:
    """Return the name of what numbers the processes: this machine, or its container."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _key(peer: Sequence[Any]) -> str:
    machine, process = peer
    return f"pnn_compile/ended/{machine}/{process}"
