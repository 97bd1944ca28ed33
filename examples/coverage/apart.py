"""Check a model in a process of its own, which may crash, hang or fill the memory.

The processes are forks of a server that has imported the libraries once, which takes as long as
most checks.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

from examples.coverage.catalog import Specification

__all__ = ["check_apart"]

_CONTEXT = multiprocessing.get_context("forkserver")
_GRACE = 5.0  # seconds
_PATIENCE = 5.0
"""Wall seconds for every second of processor time that a check may take."""
_CONTEXT.set_forkserver_preload(["examples.coverage.preload"])


def check_apart(specification: Specification, limit: float) -> dict[str, Any]:
    """Run `check` with a time limit.

    Args:
        specification: The model.
        limit: Seconds of processor time; a check may take some times as many on the wall, where
            others use the machine too.

    Returns:
        The row; `phase` is "time" or "crash" where there was none in time.
    """
    start = time.perf_counter()
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_check, args=(specification, sender, limit), daemon=True)
    process.start()
    sender.close()
    row: dict[str, Any] = {"model": specification.text, "group": specification.group, "ok": False}
    try:
        if receiver.poll(_PATIENCE * limit):
            row = receiver.recv()
        else:
            process.kill()
            row |= _late(_PATIENCE * limit)
    except EOFError:
        process.join()
        crash = {"phase": "crash", "cause": f"the process ended with {process.exitcode}"}
        row |= _late(limit) if process.exitcode == -signal.SIGXCPU else crash
    process.join(_GRACE)
    process.kill()  # a library may have left a thread behind that never ends
    return {"seconds": round(time.perf_counter() - start, 1)} | row


def _late(limit: float) -> dict[str, Any]:
    return {"phase": "time", "cause": f"more than {limit:.0f} s"}


def _check(specification: Specification, sender: Connection, limit: float) -> None:
    from examples.coverage.check import check

    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries speak of missing kernels
    warnings.simplefilter("ignore")
    sender.send(check(specification))
