"""Name the rank whose end made the others fail, and end the others when one cannot go on.

A rank that dies closes its connections. Its neighbors fail and end, so that their neighbors fail:
what most ranks see is the loss of a rank that ended because it had lost another. So a rank leaves a
record in the store of torch.distributed before it ends with an error, and one that fails looks
which processes of this machine are gone, and which of them left no record: these were lost.

A rank whose step fails may live on, where its script catches the error. It takes no further step,
which would meet messages of the old one: it leaves the run, that is, it closes its connections as
if it had died. The others read why in its record.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from passes.errors import RuntimeFault
from pnn_compile.runtime.transport import GroupReference, backend_of

PATIENCE = 3.0
"""Seconds to wait for the end of a process whose connections are closed, or for a refusal."""

_NO_MESSAGE = 2**31 - 1
"""Tag of a message that is never sent."""


class Peers:
    """The other processes of a run.

    Args:
        group: The group of all of them; each must create this.
        others: Groups of some of them.
    """

    def __init__(
        self, group: dist.ProcessGroup, others: Sequence[dist.ProcessGroup | None] = ()
    ) -> None:
        groups = {group, *(other for other in others if other is not None)}
        self._groups = [GroupReference(each) for each in groups]
        self._rank = dist.get_rank(group)
        here = _machine(), os.getpid(), uuid.uuid4().hex
        self._all: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(self._all, here, group=group)
        self._run = f"pnn_compile/{self._all[0][2]}"
        self._refusals = 0
        self._why_left = ""

    def explain(self, error: RuntimeFault, *, exchange: bool = True) -> RuntimeFault:
        """Return the error with the rank that is lost, if one is; record it for the others.

        Args:
            error: The error that this rank is about to end with.
            exchange: Whether it came from an exchange with other ranks, which one of them may have
                caused.
        """
        reason = self._reason() if exchange else ""
        if reason:
            # What torch says of the lost connection is in the traceback.
            cause = error.__cause__
            own = str(error).removesuffix(f": {type(cause).__name__}: {cause}")
            error = RuntimeFault(f"{reason}; {own}")
        self._write(f"ended/{self._rank}", reason or self._own(error))
        return error

    def leave(self, error: BaseException) -> None:
        """Close the connections of this rank, whose step failed: no other waits for it."""
        if self._why_left:
            return
        self._why_left = _read(self._key(f"ended/{self._rank}")) or self._own(error)
        for record in ("ended", "left"):  # the script may end before the others notice
            self._write(f"{record}/{self._rank}", self._why_left)
        with suppress(RuntimeFault):  # the script destroyed them
            for group in self._groups:
                _close(group())

    def check_present(self) -> None:
        """Check that this rank has not left the run, and that its groups still exist.

        Raises:
            RuntimeFault: It has left, or its script has destroyed them.
        """
        if self._why_left:
            raise RuntimeFault(
                f"{self._why_left}; rank {self._rank} takes no further step after that: start all "
                "ranks again, from the last checkpoint if there is one"
            )
        for group in self._groups:
            group()

    def all_refuse(self) -> bool:
        """Whether all ranks refuse the same batch, so that none has begun a step with it."""
        self._refusals += 1
        key, deadline = self._key(f"refusals/{self._refusals}"), time.monotonic() + PATIENCE
        with suppress(Exception):
            number: int = _store().add(key, 1)
            while number < len(self._all) and time.monotonic() < deadline:
                time.sleep(0.02)
                number = _store().add(key, 0)
            return number >= len(self._all)
        return False

    def _reason(self) -> str:
        """Wait for a process to be gone or to leave, and describe it; "" if all go on."""
        deadline = time.monotonic() + PATIENCE
        while True:
            gone = [rank for rank, peer in enumerate(self._all) if self._is_gone(peer)]
            records = {rank: _read(self._key(f"ended/{rank}")) for rank in gone}
            lost = [rank for rank in gone if not records[rank]]
            if 0 in lost and records[0] is None:
                lost = [0]  # the store was in its process
            if lost or (gone and time.monotonic() > deadline - PATIENCE / 2):
                break
            for rank in {*range(len(self._all))} - {self._rank, *gone}:
                if left := _read(self._key(f"left/{rank}")):
                    return left
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.05)
        if not lost:
            return records[gone[0]] or ""
        names = [f"rank {rank} (process {self._all[rank][1]})" for rank in lost]
        are = "have" if len(lost) > 1 else "has"
        return (
            f"{' and '.join(names)} {are} died: see its own output or the log of the system (out "
            "of memory?), then start all ranks again, from the last checkpoint if there is one"
        )

    def _own(self, error: BaseException) -> str:
        """Return what other ranks read of an error that began on this one."""
        text = f"{error}" if isinstance(error, RuntimeFault) else f"{type(error).__name__}: {error}"
        text = text.partition("\n")[0].rstrip(": ")[:300]
        return f"rank {self._rank} ended with an error of its own ({text})"

    def _key(self, name: str) -> str:
        return f"{self._run}/{name}"

    def _write(self, name: str, text: str) -> None:
        with suppress(Exception):  # the process that has the store may be gone
            _store().set(self._key(name), text)

    def _is_gone(self, peer: Sequence[Any]) -> bool:
        machine, process, _ = peer
        if machine != _machine() or process == os.getpid():
            return False
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except OSError:  # another user's, or no /proc
            return False
        return state in "ZX"  # it waits for its parent to notice


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _read(key: str) -> str | None:
    """Return a record; "" if there is none, None if there is no store."""
    try:
        text: str = _store().get(key).decode() if _store().check([key]) else ""
    except Exception:
        return None
    return text


def _close(group: dist.ProcessGroup) -> None:
    """Close the connections of a group, so that no other process waits for this one."""
    with suppress(Exception):
        others = {*range(dist.get_world_size(group))} - {dist.get_rank(group)}
        if others and backend_of(group, torch.device("cpu")) == "gloo":
            # Gloo has no call for it; a receive that is not met in time closes all connections.
            number, never = torch.empty(1, device="cpu"), datetime.timedelta(milliseconds=1)
            work = dist.irecv(number, group=group, group_src=min(others), tag=_NO_MESSAGE)
            assert work is not None
            work.wait(never)
    with suppress(Exception):
        group.abort()


def _machine() -> str:
    """Return the name of what numbers the processes: this machine, or its container."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()
